"""What only CUDA runs, with numbers: a reference stands for the kernel. Ours = the CPU's path = transformers' eager."""

import inspect
from functools import partial

import pytest
import torch
from conftest import tiny_config
from fake_tensors import CUDA, fake_cuda
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import cross_entropy
from transformers import GPTNeoForCausalLM
from varlen import HALF, reference_varlen_attn

from neoflix.data.packing import IGNORE_INDEX, PackedCollator
from neoflix.model import packed_attention
from neoflix.model.load import build_model
from neoflix.model.lora import add_adapters

TOLERANCE = {"atol": 2e-5, "rtol": 1e-3}
NUM_LAYERS = 4
NUM_ITEMS = 90  # labels of the whole step, by which a batch's loss is divided


def make_texts(lengths: list[int]) -> list[dict]:
    """Texts as the collator gets them, some with a prompt."""
    generator = torch.Generator().manual_seed(7)
    rows = [torch.randint(0, 500, (length,), generator=generator).tolist() for length in lengths]
    return [{"input_ids": ids, "prompt_length": 1 + index % 3} for index, ids in enumerate(rows)]


def make_pair(lora: bool = False, **overrides):
    """(eager model, the same model with our attention and loss), in training mode."""
    torch.manual_seed(1)
    ours = build_model(tiny_config(**overrides), torch.float32)
    eager = GPTNeoForCausalLM._from_config(tiny_config(**overrides), attn_implementation="eager")
    eager.load_state_dict(ours.state_dict())
    if lora:
        eager, ours = (add_adapters(model, 4, 8, "none") for model in (eager, ours))
        for name, weight in ours.named_parameters():
            if weight.requires_grad:  # the product of new adapters is zero
                weight.data.normal_(std=0.1, generator=torch.Generator().manual_seed(len(name)))
        eager.load_state_dict(ours.state_dict())
    return eager.train(), ours.train()


@pytest.fixture
def as_on_cuda(monkeypatch):
    """as_on_cuda(): attention takes the branch of CUDA from now on. Returns the windows of its calls, which follow."""

    def switch(dtypes=(torch.float32,)) -> list[tuple]:
        windows = []

        def kernel(*args, **options):
            windows.append(options["window_size"])
            return reference_varlen_attn(*args, dtypes=dtypes, **options)

        monkeypatch.setattr(packed_attention, "takes_varlen", lambda query: True)
        monkeypatch.setattr(packed_attention, "varlen_attn", kernel)
        return windows

    return switch


def learn_packed(model, texts: list[dict]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """-> (logits [T, V], gradients) of the texts in one row."""
    model.zero_grad()
    output = model(**PackedCollator()(texts), num_items_in_batch=torch.tensor(NUM_ITEMS))
    logits = output.logits[0].detach().clone()  # the backward pass overwrites them
    output.loss.backward()
    return logits, {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.requires_grad}


def learn_alone(model, texts: list[dict]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The same, by one forward pass for each text and torch's cross entropy."""
    model.zero_grad()
    logits, loss = [], 0.0
    for text in texts:
        ids = torch.tensor(text["input_ids"])
        logits.append(model(ids.unsqueeze(0)).logits[0])
        labels = ids.clone()
        labels[: text["prompt_length"]] = IGNORE_INDEX
        targets = labels[1:]
        loss = loss + cross_entropy(logits[-1][:-1], targets, ignore_index=IGNORE_INDEX, reduction="sum")
    (loss / NUM_ITEMS).backward()
    gradients = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.requires_grad}
    return torch.cat(logits).detach(), gradients


def assert_same(one: tuple, other: tuple) -> None:
    torch.testing.assert_close(one[0], other[0], atol=2e-4, rtol=1e-3)
    assert one[1].keys() == other[1].keys()
    for name in one[1]:
        torch.testing.assert_close(one[1][name], other[1][name], msg=lambda m, name=name: f"{name}: {m}", **TOLERANCE)


# The window is 16. Texts below, at and beyond it, one of one token, one alone.
@pytest.mark.parametrize("lengths", [[5, 40, 1, 17, 16, 30], [33], [1, 1, 3], [100, 2, 15]], ids=str)
@pytest.mark.parametrize("recomputes", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("lora", [False, True], ids=["", "lora"])
def test_values_and_gradients(lengths, recomputes, lora, as_on_cuda):
    texts, (eager, ours) = make_texts(lengths), make_pair(lora)
    on_the_cpu, alone = learn_packed(ours, texts), learn_alone(eager, texts)
    windows = as_on_cuda()
    if recomputes:
        ours.activation_checkpointing_enable({"use_reentrant": False})
    on_cuda = learn_packed(ours, texts)
    assert set(windows[:NUM_LAYERS]) == {(-1, 0), (15, 0)}
    assert len(windows) == NUM_LAYERS * (1 + recomputes)
    assert_same(on_cuda, on_the_cpu)
    assert_same(on_cuda, alone)


@pytest.mark.parametrize("dtype", HALF)
def test_half_precision(dtype, as_on_cuda):
    """In the kernel's own dtypes: close to fp32, as close as the CPU's path."""
    texts = make_texts([5, 40, 1, 17])
    eager, ours = make_pair(initializer_range=0.05)
    exact, exact_gradients = learn_alone(eager, texts)
    ours = ours.to(dtype)
    on_the_cpu, _ = learn_packed(ours, texts)
    as_on_cuda(HALF)
    on_cuda, gradients = learn_packed(ours, texts)
    assert on_cuda.dtype == dtype
    error = (on_cuda - exact).abs().max()
    assert error < 2 * (on_the_cpu - exact).abs().max()
    assert error < 0.02 * exact.abs().max()
    for name, gradient in gradients.items():
        assert gradient.dtype == dtype
        assert (gradient - exact_gradients[name]).norm() < 0.05 * exact_gradients[name].norm() + 1e-4


@pytest.mark.parametrize("lora", [False, True])
def test_attention_with_dropout_is_not_the_kernels(lora, as_on_cuda):
    """It has none. Evaluation of the same model takes it again."""
    _, ours = make_pair(lora, attention_dropout=0.5)
    windows = as_on_cuda()
    texts = make_texts([5, 40])
    torch.manual_seed(0)
    first, _ = learn_packed(ours, texts)
    second, _ = learn_packed(ours, texts)
    assert not windows
    assert not torch.equal(first, second)
    ours.eval()(**PackedCollator()(texts))
    assert len(windows) == NUM_LAYERS


@pytest.mark.parametrize(
    ("capability", "dtype", "width", "takes"),
    [
        ((8, 0), torch.bfloat16, 64, True),
        ((8, 0), torch.float16, 128, True),
        ((12, 0), torch.bfloat16, 256, True),
        ((9, 0), torch.bfloat16, 8, True),
        ((8, 0), torch.float32, 64, False),
        ((7, 5), torch.float16, 64, False),
        ((8, 0), torch.bfloat16, 4, False),
        ((8, 0), torch.bfloat16, 20, False),
        ((8, 0), torch.bfloat16, 264, False),
    ],
)
def test_which_attention_the_kernel_takes(capability, dtype, width, takes):
    with fake_cuda(capability):
        assert packed_attention.takes_varlen(torch.empty(3, 2, width, dtype=dtype, device=CUDA)) is takes
        assert not packed_attention.takes_varlen(torch.empty(3, 2, width, dtype=dtype))


def test_the_cuda_path_never_waits_for_the_device(monkeypatch):
    """On the meta device no value can be read: a wait for one would raise. The real kernel's schema is checked."""
    monkeypatch.setattr(packed_attention, "takes_varlen", lambda query: True)
    model = build_model(tiny_config(), torch.float32).to("meta")
    batch = PackedCollator()(make_texts([5, 40, 1]))
    batch = {name: value.to("meta") if torch.is_tensor(value) else value for name, value in batch.items()}
    model(**batch, num_items_in_batch=torch.tensor(43, device="meta")).loss.backward()
    assert all(weight.grad.shape == weight.shape for weight in model.parameters())


# ---- the reference itself --------------------------------------------------------------------------------------------


def test_the_reference_takes_torchs_arguments():
    """A torch with another argument, or another default, is to be looked at."""
    ours = inspect.signature(reference_varlen_attn).parameters
    for name, theirs in inspect.signature(varlen_attn).parameters.items():
        assert (ours[name].kind, ours[name].default) == (theirs.kind, theirs.default), name


def call(num_tokens=9, width=16, dtype=torch.bfloat16, bounds=(0, 5, 9), **changes):
    x = torch.randn(num_tokens, 2, width, generator=torch.Generator().manual_seed(0)).to(dtype)
    bounds = torch.tensor(bounds, dtype=torch.int32)
    options = {"query": x, "key": x, "value": x, "cu_seq_q": bounds, "cu_seq_k": bounds, "max_q": 5, "max_k": 5}
    return reference_varlen_attn(**(options | changes))


REFUSED = {
    "fp32": {"dtype": torch.float32},
    "two dtypes": {"value": torch.ones(9, 2, 16, dtype=torch.float16)},
    "heads of 12": {"width": 12},
    "heads of 264": {"width": 264},
    "strided": {"key": torch.ones(9, 2, 32, dtype=torch.bfloat16)[:, :, ::2]},
    "two devices": {"key": torch.ones(9, 2, 16, dtype=torch.bfloat16, device="meta")},
    "long bounds": {"cu_seq_q": torch.tensor([0, 5, 9])},
    "strided bounds": {"cu_seq_k": torch.tensor([[0, 1], [5, 6], [9, 9]], dtype=torch.int32)[:, 0]},
    "late start": {"bounds": (1, 5, 9)},
    "early end": {"bounds": (0, 5, 8)},
    "no end": {"bounds": (0, 5)},
    "an empty text": {"bounds": (0, 5, 5, 9)},
    "too short a maximum": {"max_q": 4},
    "a list": {"window_size": [-1, 0]},
    "paged": {"block_table": torch.zeros(2, 1, dtype=torch.int32)},
}


@pytest.mark.parametrize("changes", REFUSED.values(), ids=REFUSED)
def test_the_reference_refuses_what_the_kernel_cannot_take(changes):
    assert call().shape == (9, 2, 16)
    with pytest.raises(AssertionError):
        call(**changes)


@pytest.mark.parametrize("window", [(-1, -1), (-1, 0), (2, 0), (0, 0), (1, 1)])
@pytest.mark.parametrize("scale", [None, 1.0])
def test_the_reference_is_torchs_own_attention(window, scale):
    """Against `scaled_dot_product_attention` with a mask that is written out."""
    attend = partial(call, dtype=torch.float32, dtypes=(torch.float32,), scale=scale, window_size=window)
    x = torch.randn(9, 2, 16, generator=torch.Generator().manual_seed(0))
    left, right = (100 if side == -1 else side for side in window)
    is_seen = [[q // 5 == k // 5 and q - left <= k <= q + right for k in range(9)] for q in range(9)]
    query = x.transpose(0, 1)
    options = {"attn_mask": torch.tensor(is_seen), "scale": scale}
    expected = torch.nn.functional.scaled_dot_product_attention(query, query, query, **options)
    torch.testing.assert_close(attend(), expected.transpose(0, 1))


@pytest.mark.gpu
@pytest.mark.parametrize("window", [(-1, 0), (15, 0)])
@pytest.mark.parametrize("dtype", HALF)
def test_the_reference_is_the_kernel(dtype, window):
    lengths = [5, 40, 1, 17, 16, 30]
    bounds = torch.tensor([0, *lengths]).cumsum(0).int().cuda()
    results = []
    for attend in (varlen_attn, reference_varlen_attn):
        generator = torch.Generator().manual_seed(0)
        texts = [torch.randn(sum(lengths), 2, 64, generator=generator).to("cuda", dtype) for _ in range(4)]
        query, key, value = (x.requires_grad_() for x in texts[:3])
        output = attend(query, key, value, bounds, bounds, 40, 40, scale=1.0, window_size=window)
        output.backward(texts[3])
        results.append((output, query.grad, key.grad, value.grad))
    for theirs, mine in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, atol=0.05, rtol=0.05)


@pytest.mark.gpu
def test_heads_that_the_kernel_refuses_on_a_gpu():
    _, ours = make_pair(num_heads=8, initializer_range=0.05)  # of 4 dimensions
    texts = make_texts([5, 40, 1, 17])
    expected, _ = learn_packed(ours, texts)
    batch = {name: x.cuda() if torch.is_tensor(x) else x for name, x in PackedCollator()(texts).items()}
    output = ours.to("cuda", torch.bfloat16)(**batch)
    torch.testing.assert_close(output.logits[0].float().cpu(), expected, atol=0.1, rtol=0.1)
    output.loss.backward()
