"""Tokens, seconds and memory of a run."""

from types import SimpleNamespace

import pytest
import torch

from neoflix.runtime.errors import UserError
from neoflix.training import meters
from neoflix.training.meters import Meters, Stopwatch, explaining_full_memory, peak_host_bytes


@pytest.fixture
def clock(monkeypatch):
    """clock.now is the time that a Stopwatch reads."""
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(meters.time, "perf_counter", lambda: clock.now)
    return clock


@pytest.fixture
def accelerator():
    """One process."""
    return SimpleNamespace(device="cpu", gather=lambda values: values, reduce=lambda value, reduction: value)


def test_a_stopwatch_runs_from_the_first_start_and_stands_still_in_pauses(clock):
    stopwatch = Stopwatch()
    with stopwatch.paused():  # before the start it has no effect
        clock.now += 5
    assert stopwatch.seconds() == 0
    stopwatch.start()
    clock.now += 3
    stopwatch.start()
    with stopwatch.paused():
        clock.now += 50
    clock.now += 1
    assert stopwatch.seconds() == 4


def test_tokens_are_those_that_the_model_reads(clock, accelerator):
    figures = Meters(accelerator, plan=None)
    figures.count({"input_ids": torch.zeros(1, 30), "position_ids": torch.zeros(1, 30)})
    figures.count({"input_ids": torch.zeros(2, 9), "attention_mask": torch.tensor([[1] * 9, [1] + [0] * 8])})
    clock.now += 4
    assert figures.read_interval()["tokens_per_second"] == 10
    figures.count({"input_ids": torch.zeros(1, 20), "position_ids": torch.zeros(1, 20)})
    clock.now += 1
    interval, total = figures.read_interval(), figures.read_total()
    assert interval["tokens_per_second"] == 20
    assert total["train_tokens_per_second"] == 12
    assert total["train_peak_host_bytes"] >= interval["peak_host_bytes"] > 2**20
    assert "mfu" not in interval


def test_mfu_is_the_plans(clock, accelerator):
    figures = Meters(accelerator, SimpleNamespace(utilization=lambda speed: speed / 100))
    figures.count({"input_ids": torch.zeros(1, 30), "position_ids": torch.zeros(1, 30)})
    clock.now += 1
    assert figures.read_interval()["mfu"] == 0.3


def test_host_memory_is_in_bytes():
    before = peak_host_bytes()
    held = torch.ones(2**25)  # 128 MiB
    assert peak_host_bytes() >= max(before, held.nbytes)


@pytest.mark.parametrize(
    ("error", "is_explained"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("shapes differ"), False),
    ],
    ids=["device", "host", "another"],
)
def test_only_full_memory_is_explained(monkeypatch, error, is_explained):
    monkeypatch.setattr(meters, "explain_failure", lambda plan, message, *peaks: f"{plan}, {message}, {len(peaks)}")
    with pytest.raises(UserError if is_explained else RuntimeError) as raised, explaining_full_memory("a plan"):
        raise error
    assert str(raised.value) == (f"a plan, {error}, 3" if is_explained else str(error))
