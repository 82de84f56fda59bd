"""`attn_implementation="neoflix"` in programs that know this project by one import."""

import subprocess

import pytest
import torch
from conftest import PYTHON, ROOT, tiny_config
from transformers import (
    GPTNeoForCausalLM,
    GPTNeoForQuestionAnswering,
    GPTNeoForSequenceClassification,
    GPTNeoForTokenClassification,
)

import neoflix.model.register  # noqa: F401  what is tested
from neoflix.model.attention import ATTENTION_NAME, GPTNeoFastAttention

TOLERANCE = {"atol": 2e-5, "rtol": 2e-5}
HEADS = [
    GPTNeoForCausalLM,
    GPTNeoForQuestionAnswering,
    GPTNeoForSequenceClassification,
    GPTNeoForTokenClassification,
]
PROGRAM = """
import sys, torch
from transformers import AutoModelForCausalLM
import neoflix.model.register

eager = AutoModelForCausalLM.from_pretrained(sys.argv[1], attn_implementation="eager")
ours = AutoModelForCausalLM.from_pretrained(sys.argv[1], attn_implementation="neoflix")
assert type(ours.transformer.h[0].attn.attention).__name__ == "GPTNeoFastAttention"
ids = torch.arange(1, 40).unsqueeze(0)
torch.testing.assert_close(ours(ids).logits, eager(ids).logits, atol=1e-4, rtol=1e-4)
ours.save_pretrained(sys.argv[2])
again = AutoModelForCausalLM.from_pretrained(sys.argv[2])
assert again.config._attn_implementation == "eager"
torch.testing.assert_close(again(ids).logits, eager(ids).logits)
"""


def make_pair(head=GPTNeoForCausalLM, **overrides):
    """(eager, ours), with the same weights."""
    torch.manual_seed(0)
    overrides = {"pad_token_id": 0} | overrides
    eager = head._from_config(tiny_config(**overrides), attn_implementation="eager").eval()
    ours = head._from_config(tiny_config(**overrides), attn_implementation=ATTENTION_NAME).eval()
    ours.load_state_dict(eager.state_dict())
    return eager, ours


def make_batch() -> dict[str, torch.Tensor]:
    """Two texts beyond the window of 16, one of them padded on the right."""
    ids = torch.randint(1, 500, (2, 40), generator=torch.Generator().manual_seed(7))
    mask = torch.ones_like(ids)
    mask[0, 25:] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


@pytest.mark.process
def test_one_import_is_enough(model_dir, tmp_path):
    subprocess.run([PYTHON, "-c", PROGRAM, str(model_dir), str(tmp_path)], cwd=ROOT, check=True, timeout=120)


@pytest.mark.parametrize("head", HEADS)
def test_every_head_has_our_attention(head):
    eager, ours = make_pair(head)
    assert sum(isinstance(module, GPTNeoFastAttention) for module in ours.modules()) == 4
    batch = make_batch()
    is_real = batch["attention_mask"].bool()
    for mine, theirs in zip(ours(**batch).to_tuple(), eager(**batch).to_tuple(), strict=True):
        if not torch.is_tensor(mine):
            continue  # the cache
        if mine.shape[:2] == is_real.shape:
            mine, theirs = mine[is_real], theirs[is_real]
        torch.testing.assert_close(mine, theirs, **TOLERANCE)


def test_training_with_activation_checkpointing():
    pair = make_pair()
    gradients = []
    for model in pair:
        model.train().activation_checkpointing_enable()
        batch = make_batch()
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        model(**batch, labels=labels).loss.backward()
        gradients.append({name: weight.grad for name, weight in model.named_parameters()})
    for name, theirs in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], theirs, atol=2e-5, rtol=1e-3)


def test_attention_is_dropped_in_training_only():
    eager, ours = make_pair(attention_dropout=1.0)  # all of it, so that nothing is random
    batch = make_batch()
    torch.testing.assert_close(ours(**batch).logits[1], eager(**batch).logits[1], **TOLERANCE)
    dropped = ours.train()(**batch).logits
    torch.testing.assert_close(dropped, eager.train()(**batch).logits, **TOLERANCE)
    assert not torch.allclose(dropped[1], ours.eval()(**batch).logits[1], atol=0.1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_large_scores_in_half_precision(dtype):
    """Scores are not divided by the square root of the width; beyond 65,504 they do not fit in fp16."""
    eager, ours = make_pair()
    for model in (eager, ours):
        for block in model.transformer.h:
            block.attn.attention.q_proj.weight.data *= 100
            block.attn.attention.k_proj.weight.data *= 100
        model.to(dtype)
    block, states = eager.transformer.h[0], torch.randn(1, 40, 32, generator=torch.Generator().manual_seed(1)).to(dtype)
    query, key = (
        projection(states).float() for projection in (block.attn.attention.q_proj, block.attn.attention.k_proj)
    )
    assert (query @ key.mT).abs().max() > 65504
    mine, theirs = (model.transformer.h[0].attn(states)[0] for model in (ours, eager))
    torch.testing.assert_close(mine, theirs, atol=0.05, rtol=0.05)


def test_a_built_model_keeps_its_attention():
    """transformers warns, and leaves the model as it is: each attention of GPT-Neo is a class of its own."""
    for model in make_pair():
        before = model.config._attn_implementation
        model.set_attn_implementation("eager" if before == ATTENTION_NAME else ATTENTION_NAME)
        assert model.config._attn_implementation == before
        assert isinstance(model.transformer.h[0].attn.attention, GPTNeoFastAttention) == (before == ATTENTION_NAME)
