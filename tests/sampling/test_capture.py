"""A step of the decoder can be captured as a CUDA graph: it neither waits for the device nor copies from the host.

Run on a fake GPU: tensors have a device and no values, so that a read of one raises.
"""

import pytest
import torch
from conftest import OTHERS, tiny_config
from fake_tensors import CUDA, fake_cuda, fill_with_fakes
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM

from neoflix.model.load import build_model
from neoflix.sampling.decoder import Decoder, DecoderSettings, Text
from neoflix.sampling.draw import Draw
from neoflix.sampling.inference import optimize_for_inference

FILL = torch.ops.aten.fill_.Tensor  # its number is read on the host, and goes into the kernel's arguments
NUMBER = torch.ops.aten.lift_fresh.default  # a Python number that is about to be used


class OnTheDevice(TorchDispatchMode):
    """Refuses operators with a tensor on the host: copying it to the device waits for the device."""

    def __init__(self):
        super().__init__()
        self.num_calls = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        if function.namespace == "prim":  # `.device`
            return output
        devices = {leaf.device.type for leaf in tree_leaves((args, kwargs, output)) if isinstance(leaf, torch.Tensor)}
        assert devices <= {"cuda"} or function in (FILL, NUMBER), f"{function} on {devices}"
        self.num_calls += 1
        return output


def make_decoder(name: str, **settings) -> Decoder:
    """A decoder on the fake GPU with two prompts in its slots, as it is when its first step is captured."""
    with torch.device("meta"):
        if name == "gpt-neo":
            model = build_model(tiny_config(), torch.bfloat16)
        else:
            model = AutoModelForCausalLM.from_config(OTHERS[name], dtype=torch.bfloat16)
    model = optimize_for_inference(fill_with_fakes(model, torch.bfloat16, CUDA).eval(), 4)
    settings = {"draw": Draw(1.0, 0, 0.95)} | settings
    decoder = Decoder(model, DecoderSettings(num_slots=4, num_places=64, seed=1, eos_token_id=0, **settings))
    assert decoder.has_graphs
    decoder._fill([(1, Text(0, [5, 6, 7], 9)), (3, Text(1, [8], 9))])
    return decoder


DRAWS = {
    "greedy": Draw(1.0, 1, 1.0),
    "temperature": Draw(0.7, 0, 1.0),
    "top_k": Draw(1.0, 40, 1.0),
    "top_p": Draw(1.0, 0, 0.95),
    "top_p of few": Draw(1.0, 0, 0.95, num_candidates=2),
    "top_k and top_p": Draw(1.3, 40, 0.9),
}


PENALISED = {"repetition_penalty": 1.4, "never_drawn": (7, 9)}


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
@pytest.mark.parametrize("settings", [{}, PENALISED], ids=["", "penalty"])
def test_a_step_stays_on_the_device(draw, settings):
    with fake_cuda(), torch.no_grad():
        decoder = make_decoder("gpt-neo", draw=draw, **settings)
        with OnTheDevice() as watched:
            decoder._advance(32)
        assert decoder.drawn_B.device == torch.device(CUDA)
    assert watched.num_calls > 100


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt-neox"])
def test_a_step_of_another_architecture(name):
    with fake_cuda(), torch.no_grad():
        decoder = make_decoder(name, repetition_penalty=1.4)
        with OnTheDevice():
            decoder._advance(32)


def test_a_draw_that_asks_the_device_is_seen():
    """The step without graphs, which may wait: it shows that this file would notice."""
    with fake_cuda(), torch.no_grad():
        decoder = make_decoder("gpt-neo")
        decoder.asks = True
        with pytest.raises(Exception, match="_local_scalar_dense"), OnTheDevice():
            decoder._advance(32)


def test_a_number_that_is_copied_is_seen():
    with fake_cuda(), torch.no_grad():
        seen_BV = torch.zeros(2, 9, dtype=torch.bool, device=CUDA)
        tokens_B = torch.zeros(2, dtype=torch.long, device=CUDA)
        with pytest.raises(AssertionError, match="cpu"), OnTheDevice():
            seen_BV[tokens_B, tokens_B] = True
