"""Models made ready for sampling: packed layers, and eval mode for a while."""

import torch
from conftest import tiny_config
from transformers import GPTNeoForCausalLM

from neoflix.model.load import load_pretrained
from neoflix.sampling.inference import PackedLinear, eval_mode, optimize_for_inference


def test_packed_layers_are_the_same_layers(model_dir):
    model, packed = (load_pretrained(str(model_dir), torch.float32).eval() for _ in range(2))
    optimize_for_inference(packed, 20)
    assert any(isinstance(module, PackedLinear) for module in packed.modules())
    ids = torch.randint(0, 500, (3, 40))
    with torch.inference_mode():
        torch.testing.assert_close(packed(ids).logits, model(ids).logits, atol=1e-4, rtol=1e-4)


def test_one_text_at_a_time_needs_no_packed_layers(model_dir):
    model = optimize_for_inference(load_pretrained(str(model_dir), torch.float32).eval(), 1)
    assert not any(isinstance(module, PackedLinear) for module in model.modules())


def test_eval_mode_ends_with_each_module_in_its_own_mode():
    model = GPTNeoForCausalLM(tiny_config()).train()
    model.transformer.drop.eval()
    before = {name: module.training for name, module in model.named_modules()}
    with eval_mode(model):
        assert not any(module.training for module in model.modules())
    assert {name: module.training for name, module in model.named_modules()} == before
