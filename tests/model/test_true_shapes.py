"""Training passes of GPT-Neo-125M, 1.3B and 2.7B as on CUDA, with tensors that have no values.

torch's own attention is called, and nothing is computed. The tests check what a GPU would be asked for, and what it
would have to hold.
"""

from dataclasses import replace
from functools import partial

import pytest
import torch
from conftest import card, forecast_of, shape_of, tiny_config
from fake_tensors import CUDA, LiveMemory, fake_cuda, fill_with_fakes
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GPTNeoConfig
from varlen import HALF

from neoflix.data.packing import PackedCollator
from neoflix.model import attention, loss, packed_attention
from neoflix.model.checkpointing import recompute_first_layers
from neoflix.model.load import build_model
from neoflix.model.lora import add_adapters
from neoflix.planning.activations import activation_bytes, loss_bytes
from neoflix.planning.device_memory import device_memory
from neoflix.runtime.console import GIB

NUM_HEADS = {"125M": 12, "1.3B": 16, "2.7B": 20}  # of their config.json
LENGTHS = [300, 40, 1] + [32] * 53  # one text beyond the window of 256
RANK = 8


class VarlenCalls(TorchDispatchMode):
    """Describes the arguments of torch's variable-length attention, forward and backward. It keeps no tensor."""

    def __init__(self):
        super().__init__()
        self.forward, self.backward = [], []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.torch_attn._varlen_attn.default:
            self.forward.append([describe(arg) for arg in args])
        elif function is torch.ops.torch_attn._varlen_attn_backward.default:
            self.backward.append([describe(arg) for arg in args])
        return function(*args, **(kwargs or {}))


def describe(arg):
    if not isinstance(arg, torch.Tensor):
        return arg
    return tuple(arg.shape), arg.dtype, str(arg.device), "contiguous" if arg.is_contiguous() else arg.stride()


def expected_calls(size: str, dtype: torch.dtype, device: str = "cpu") -> tuple[list[list], list[list]]:
    """What each layer is to ask of the kernel, forward (the first ten arguments) and backward."""
    shape, num_heads, num_tokens = shape_of(size), NUM_HEADS[size], sum(LENGTHS)
    heads = ((num_tokens, num_heads, shape.width // num_heads), dtype, device, "contiguous")
    bounds = ((len(LENGTHS) + 1,), torch.int32, device, "contiguous")
    log_sum_exp = ((num_heads, num_tokens), torch.float32, device, "contiguous")
    rng_state = ((2,), torch.uint64, device, "contiguous")
    forward, backward = [], []
    for layer in range(shape.num_layers):
        is_global = layer % 2 == 0
        window = [-1, 0] if is_global else [255, 0]
        # torch names the first window causal; the second one is so by its right side
        options = [max(LENGTHS), max(LENGTHS), is_global]
        forward.append([heads] * 3 + [bounds] * 2 + [*options, 1.0, window])
        backward.append([heads] * 5 + [log_sum_exp, bounds, bounds, *options, rng_state, 1.0, window])
    return forward, backward[::-1]


def make_model(size: str, dtype: torch.dtype, lora: bool = False, device: str = "cpu"):
    """A model of true shape with fake weights, within `FakeTensorMode`."""
    shape = shape_of(size)
    config = GPTNeoConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.width,
        num_layers=shape.num_layers,
        num_heads=NUM_HEADS[size],
        attention_types=[[["global", "local"], shape.num_layers // 2]],
        max_position_embeddings=shape.window,
    )
    with torch.device("meta"):
        model = build_model(config, dtype)
        model = add_adapters(model, RANK, 2 * RANK, "none") if lora else model
    return fill_with_fakes(model, dtype, device)


@pytest.fixture(scope="module")
def batch() -> dict:
    """Real tensors, of which fake ones are made where they are used; a fake tensor cannot be a `TextLayout`."""
    return PackedCollator()([{"input_ids": [5] * length, "prompt_length": 1} for length in LENGTHS])


CASES = [  # dtype, LoRA, activation checkpointing
    ("125M", torch.bfloat16, False, False),
    ("125M", torch.float16, True, False),
    ("125M", torch.bfloat16, False, True),
    # too long for `make check`
    pytest.param("1.3B", torch.float16, True, False, marks=pytest.mark.process),
    pytest.param("2.7B", torch.bfloat16, False, False, marks=pytest.mark.process),
]


@pytest.mark.parametrize(("size", "dtype", "lora", "recomputes"), CASES)
def test_a_step(size, dtype, lora, recomputes, batch, monkeypatch):
    monkeypatch.setattr(packed_attention, "takes_varlen", lambda query: query.dtype in HALF)
    monkeypatch.setattr(loss, "CPU_CHUNK", loss.CUDA_CHUNK)
    shape, num_tokens, gradients = shape_of(size), sum(LENGTHS), {}

    def take(name, weight):  # as offload does: no gradient waits for the others
        gradients[name] = (weight.grad.shape, weight.grad.dtype)
        weight.grad = None

    with FakeTensorMode(allow_non_fake_inputs=True):
        model = make_model(size, dtype, lora).train()
        if recomputes:
            model.activation_checkpointing_enable({"use_reentrant": False})
        weights = dict(model.named_parameters())
        trained = {name: weight for name, weight in weights.items() if weight.requires_grad}
        for name, weight in trained.items():
            weight.register_post_accumulate_grad_hook(partial(take, name))
        with LiveMemory(*weights.values()) as memory, VarlenCalls() as calls:
            model(**batch).loss.backward()
    forward, backward = expected_calls(size, dtype)
    asked = [call[:10] for call in calls.forward]
    assert asked == (forward + forward[::-1] if recomputes else forward)
    assert calls.backward == backward
    assert gradients == {name: (weight.shape, dtype) for name, weight in trained.items()}
    assert memory.live == 0, "something outlives the step"
    settings = forecast_of(size, card(80)).settings
    settings = replace(settings, lora_rank=RANK if lora else 0, recomputed_layers=recomputes * shape.num_layers)
    planned = activation_bytes(shape, settings, num_tokens) + loss_bytes(shape, settings, num_tokens)
    if recomputes:  # the plan adds the layer that is recomputed, which comes when the loss has gone
        planned -= num_tokens * 2 * 28 * shape.width
    assert memory.peak / GIB == pytest.approx(planned / GIB, rel=0.01)


@pytest.mark.parametrize("layers", [0, 1, 6, 12])
@pytest.mark.parametrize("name", ["one_card", "one_small_card"])
def test_gradients_grow_as_activations_vanish(name, layers, batch, monkeypatch):
    """Without offload all gradients stay, unless they are freed at once. The peak is that of the plan's fullest phase,
    not the sum of all parts."""
    monkeypatch.setattr(packed_attention, "takes_varlen", lambda query: query.dtype in HALF)
    monkeypatch.setattr(loss, "CPU_CHUNK", loss.CUDA_CHUNK)
    shape, num_tokens = shape_of("125M"), sum(LENGTHS)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = make_model("125M", torch.bfloat16, lora=False).train()
        model.activation_checkpointing_enable({"use_reentrant": False})
        recompute_first_layers(model, layers)
        for weight in model.parameters() if name == "one_small_card" else ():
            weight.register_post_accumulate_grad_hook(lambda weight: setattr(weight, "grad", None))
        with LiveMemory(*model.parameters()) as memory:
            model(**batch).loss.backward()
    settings = forecast_of("125M", card(80), deepspeed=f"ds_configs/{name}.json").settings
    settings = replace(settings, recomputed_layers=layers, batch_tokens=num_tokens)
    phases = device_memory(shape, settings)
    states = sum(phases["sample"].values())
    planned = max(sum(phases[name].values()) - states for name in phases if name == "forward" or "backward" in name)
    assert memory.peak / GIB == pytest.approx(planned / GIB, rel=0.05)
    activations, loss_peak = activation_bytes(shape, settings, num_tokens), loss_bytes(shape, settings, num_tokens)
    assert memory.peak < 2 * shape.num_parameters + activations + loss_peak


@pytest.mark.parametrize("dtype", HALF)
def test_adapters_have_the_dtype_of_the_weights(dtype):
    """`fill_with_fakes` gives it to them; so does the real thing."""
    model = add_adapters(build_model(tiny_config(), dtype), RANK, 2 * RANK, "none")
    assert {weight.dtype for weight in model.parameters()} == {dtype}


@pytest.mark.parametrize("size", ["125M", pytest.param("2.7B", marks=pytest.mark.process)])
def test_an_evaluation_on_a_fake_gpu(size, batch, monkeypatch):
    """Nothing is set here but the device: CUDA's branches are taken as on a GPU, and nothing stays on the host."""
    chunks = []
    cut = loss._chunks
    monkeypatch.setattr(loss, "_chunks", lambda logits_NV: chunks.append(cut(logits_NV)) or chunks[-1])
    monkeypatch.setattr(attention, "TextLayout", FakeTensor)  # a fake tensor cannot have another type
    num_tokens = sum(LENGTHS)
    with fake_cuda() as mode, torch.no_grad():
        model = make_model(size, torch.bfloat16, device=CUDA).eval()
        on_gpu = {
            name: mode.from_tensor(value.as_subclass(torch.Tensor)).to(CUDA) if torch.is_tensor(value) else value
            for name, value in batch.items()
        }
        with VarlenCalls() as calls:
            output = model(**on_gpu)
    assert [call[:10] for call in calls.forward] == expected_calls(size, torch.bfloat16, CUDA)[0]
    assert output.logits.device == output.loss.device == torch.device(CUDA)
    assert (output.loss.shape, output.loss.dtype) == ((), torch.float32)
    assert [len(range(*rows.indices(num_tokens))) for rows in chunks[0]] == [1334, num_tokens - 1334]
