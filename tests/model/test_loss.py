"""Ours = torch's cross entropy, in value, gradient and precision, with less memory."""

import pytest
import torch
from torch.nn.functional import cross_entropy, linear
from torch.utils._python_dispatch import TorchDispatchMode

from neoflix.data.packing import IGNORE_INDEX
from neoflix.model import loss
from neoflix.model.loss import causal_lm_loss

NUM_TOKENS, WIDTH, VOCAB_SIZE = 37, 16, 101


@pytest.fixture(params=[1, 5 * VOCAB_SIZE, 2**20], ids=["a row at a time", "5 rows", "all at once"])
def chunk(request, monkeypatch):
    monkeypatch.setattr(loss, "CPU_CHUNK", request.param)


def problem(dtype=torch.float32):
    """(hidden states [1, N, D], head [V, D], labels [1, N]), some labels ignored, the first and the last too"""
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(1, NUM_TOKENS, WIDTH, generator=generator).to(dtype).requires_grad_()
    head = torch.randn(VOCAB_SIZE, WIDTH, generator=generator).to(dtype).requires_grad_()
    labels = torch.randint(0, VOCAB_SIZE, (1, NUM_TOKENS), generator=generator)
    labels[0, ::7] = IGNORE_INDEX
    labels[0, -1] = IGNORE_INDEX
    return hidden, head, labels


def reference(logits, labels, num_items=None):
    targets = labels[0, 1:]
    total = cross_entropy(logits[0, :-1].float(), targets, ignore_index=IGNORE_INDEX, reduction="sum")
    return total / (num_items or (targets != IGNORE_INDEX).sum())


def solve(loss_function, dtype, scale=1.0, **options):
    """-> loss, gradient of the hidden states, gradient of the head"""
    hidden, head, labels = problem(dtype)
    value = loss_function(linear(hidden, head), labels, **options)
    (value * scale).backward()
    return value, hidden.grad, head.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_value_and_gradients_are_torchs(chunk, dtype):
    for mine, theirs in zip(solve(causal_lm_loss, dtype), solve(reference, dtype), strict=True):
        assert mine.dtype == theirs.dtype
        tolerance = {} if mine.dtype == torch.float32 else {"atol": 2e-4, "rtol": torch.finfo(dtype).eps}
        torch.testing.assert_close(mine, theirs, **tolerance)


def test_division_by_the_labels_of_the_whole_step():
    mine = solve(causal_lm_loss, torch.float32, num_items_in_batch=torch.tensor(90))
    for ours, theirs in zip(mine, solve(reference, torch.float32, num_items=90), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_fp16_gradients_survive_under_a_loss_scale():
    """Spread over 65,536 tokens, a gradient is below fp16's smallest number until DeepSpeed's scale lifts it."""
    options = {"scale": 2.0**16, "dtype": torch.float16}
    _, _, mine = solve(causal_lm_loss, num_items_in_batch=2**16, **options)
    _, _, theirs = solve(reference, num_items=2**16, **options)
    assert theirs.abs().max() > 1
    torch.testing.assert_close(mine, theirs, atol=2e-3, rtol=2e-3)


def test_nothing_to_learn_is_no_gradient():
    hidden, head, labels = problem()
    causal_lm_loss(linear(hidden, head), labels.fill_(IGNORE_INDEX), num_items_in_batch=5).backward()
    assert not head.grad.any()
    assert not hidden.grad.any()


class LargeTensors(TorchDispatchMode):
    """Collects each new storage of a [tokens, vocabulary] tensor's size."""

    def __init__(self):
        super().__init__()
        self.seen = {}  # the tensors themselves: a storage that is freed could come back under another's address

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        for tensor in output if isinstance(output, tuple | list) else [output]:
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().nbytes() >= (
                (NUM_TOKENS - 1) * VOCAB_SIZE * tensor.element_size()
            ):
                self.seen.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return output

    def dtypes(self) -> list[torch.dtype]:
        return [tensor.dtype for tensor in self.seen.values()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_logits_are_the_only_large_tensor(dtype, monkeypatch):
    monkeypatch.setattr(loss, "CPU_CHUNK", 5 * VOCAB_SIZE)
    with LargeTensors() as ours:
        solve(causal_lm_loss, dtype)
    with LargeTensors() as theirs:
        solve(reference, dtype)
    assert ours.dtypes() == [dtype]
    assert theirs.dtypes().count(torch.float32) >= 3


def test_spent_logits_are_not_used_twice():
    hidden, head, labels = problem()
    value = causal_lm_loss(linear(hidden, head), labels)
    value.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_cuda(dtype):
    hidden, head, labels = problem(dtype)
    results = []
    for function in (causal_lm_loss, reference):
        h, w = (x.detach().cuda().requires_grad_() for x in (hidden, head))
        value = function(linear(h, w), labels.cuda())
        value.backward()
        results.append((value, h.grad, w.grad))
    for mine, theirs in zip(*results, strict=True):
        tolerance = {"atol": 2e-4, "rtol": 1e-4 if dtype == torch.float32 else 1e-2}
        torch.testing.assert_close(mine, theirs, **tolerance)
