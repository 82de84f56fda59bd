"""Packed texts give the logits and gradients of texts that are read one by one, in every architecture of PACKED."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from varlen import reference_varlen_attn

from neoflix.data.packing import PackedCollator
from neoflix.model import packed_attention
from neoflix.model.attention import ATTENTION_NAME
from neoflix.model.loss import causal_lm_loss
from neoflix.model.shape import PACKED

WINDOW = 8  # of models with a sliding window: shorter than the longest texts
LENGTHS = (5, 40, 1, 17, 16, 33)
SIZES = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "sliding_window": WINDOW,
}
OTHER_NAMES = {
    "gpt2": {
        "n_embd": 32,
        "n_layer": 4,
        "n_head": 4,
        "n_positions": 64,
        "attn_pdrop": 0,
        "embd_pdrop": 0,
        "resid_pdrop": 0,
    },
    "gpt_neo": {"num_layers": 4, "num_heads": 4, "attention_types": [[["global", "local"], 2]], "window_size": WINDOW},
    "qwen2": {"use_sliding_window": True, "max_window_layers": 2},
    "qwen3": {"use_sliding_window": True, "max_window_layers": 2},
    "smollm3": {"use_sliding_window": True, "no_rope_layer_interval": 2, "max_window_layers": 2},
}


def make_models(kind: str):
    """(eager, ours), with the same weights, in fp32."""
    options = dict(SIZES) if kind not in ("gpt2", "gpt_neo") else {"vocab_size": 128, "hidden_size": 32}
    config = AutoConfig.for_model(kind, **options | OTHER_NAMES.get(kind, {}))
    torch.manual_seed(0)
    eager = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    ours = AutoModelForCausalLM.from_config(config, attn_implementation=ATTENTION_NAME)
    ours.load_state_dict(eager.state_dict())
    ours.loss_function = causal_lm_loss
    return eager.train(), ours.train()


def make_texts() -> list[dict]:
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(1, 128, (length,), generator=generator).tolist() for length in LENGTHS]
    return [{"input_ids": text, "prompt_length": 1 + len(text) // 4} for text in ids]


def learn_one_by_one(model, texts: list[dict]):
    """-> (logits [T, V], gradients), with transformers' own loss."""
    logits = []
    for text in texts:
        ids = torch.tensor([text["input_ids"]])
        labels = ids.masked_fill(torch.arange(ids.shape[1]) < text["prompt_length"], -100)
        output = model(input_ids=ids, labels=labels, num_items_in_batch=torch.tensor(50))
        logits.append(output.logits[0].detach())
        output.loss.backward()
    return torch.cat(logits), {name: weight.grad for name, weight in model.named_parameters()}


def learn_packed(model, texts: list[dict]):
    output = model(**PackedCollator()(texts), num_items_in_batch=torch.tensor(50))
    logits = output.logits[0].detach().clone()  # the backward pass overwrites them
    output.loss.backward()
    return logits, {name: weight.grad for name, weight in model.named_parameters()}


@pytest.mark.parametrize("on_cuda", [False, True], ids=["cpu", "cuda"])
@pytest.mark.parametrize("kind", sorted(PACKED))
def test_packed_texts_are_texts_read_one_by_one(kind, on_cuda, monkeypatch):
    if on_cuda:  # its branch, with torch's kernel replaced by a reference for the CPU
        monkeypatch.setattr(packed_attention, "takes_varlen", lambda query: True)
        kernel = lambda *args, **options: reference_varlen_attn(*args, dtypes=(torch.float32,), **options)  # noqa: E731
        monkeypatch.setattr(packed_attention, "varlen_attn", kernel)
    eager, ours = make_models(kind)
    expected_logits, expected = learn_one_by_one(eager, make_texts())
    logits, gradients = learn_packed(ours, make_texts())
    torch.testing.assert_close(logits, expected_logits, atol=1e-5, rtol=1e-4)
    for name, gradient in expected.items():
        torch.testing.assert_close(
            gradients[name], gradient, atol=1e-5, rtol=1e-3, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_torchs_kernel_takes_fewer_heads_of_keys(monkeypatch):
    """Llama's keys and values have fewer heads than its queries. The real kernel's schema, on the meta device, where a
    wait for a value would raise."""
    monkeypatch.setattr(packed_attention, "takes_varlen", lambda query: True)
    _, model = make_models("llama")
    model.to("meta")
    batch = PackedCollator()(make_texts())
    batch = {name: value.to("meta") if torch.is_tensor(value) else value for name, value in batch.items()}
    model(**batch, num_items_in_batch=torch.tensor(50, device="meta")).loss.backward()
    assert all(weight.grad.shape == weight.shape for weight in model.parameters())
