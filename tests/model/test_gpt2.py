"""A GPT-Neo as a GPT-2 in memory; tests/test_export.py does the same with files and an engine."""

import pytest
import torch
from conftest import tiny_config
from transformers import GPT2LMHeadModel, GPTNeoForCausalLM

from neoflix.model.gpt2 import context_limit, gpt2_config, rewrite


@pytest.mark.parametrize(
    ("overrides", "limit"),
    [({}, 16), ({"window_size": 500}, 256), ({"attention_types": [[["global"], 4]]}, 256)],
)
def test_positions_end_at_the_window_of_local_layers(overrides, limit):
    config = tiny_config(**overrides)
    assert context_limit(config) == limit
    converted = gpt2_config(config, 500, torch.float32)
    assert (converted.n_positions, converted.n_ctx, converted.exported_from["exact_up_to_tokens"]) == (limit,) * 3


@torch.no_grad()
def test_logits_are_the_same_up_to_the_window():
    torch.manual_seed(0)
    model = GPTNeoForCausalLM(tiny_config()).eval()
    config = gpt2_config(model.config, 490, torch.float32)
    converted = GPT2LMHeadModel(config).eval()
    missing, unexpected = converted.load_state_dict(
        dict(rewrite(model.state_dict(), model.config, config)), strict=False
    )
    assert (missing, unexpected) == (["lm_head.weight"], []), "the head is tied"
    ids = torch.randint(490, (3, 16))
    torch.testing.assert_close(converted(ids).logits, model(ids).logits[..., :490], atol=1e-4, rtol=1e-4)
