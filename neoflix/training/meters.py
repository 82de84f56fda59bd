"""Tokens, seconds and memory of a run."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from neoflix.planning.forecast import Plan
from neoflix.planning.remedies import explain_failure
from neoflix.runtime.errors import UserError


class Stopwatch:
    """Seconds since the first `start`, without those spent under `paused`."""

    def __init__(self):
        self._began, self._paused = None, 0.0

    def start(self) -> None:
        self._began = self._began or time.perf_counter()

    @contextmanager
    def paused(self) -> Iterator[None]:
        pause_began = time.perf_counter()
        yield
        if self._began is not None:
            self._paused += time.perf_counter() - pause_began

    def seconds(self) -> float:
        return 0.0 if self._began is None else time.perf_counter() - self._began - self._paused


class Meters:
    """Measures speed and memory from the first batch of a start on.

    Tokens are those that the model reads, padding left out. The clock stands still under `stopwatch.paused`.

    Args:
        plan: knows the device's peak, which MFU is a share of.
    """

    def __init__(self, accelerator, plan: Plan | None):
        self._accelerator, self._plan = accelerator, plan
        self.stopwatch = Stopwatch()
        self._num_tokens = 0  # of this process; becomes a tensor with padded batches, which needs no sync
        self._last_reading = (0, 0.0)  # tokens, seconds

    def count(self, inputs: dict) -> None:
        """Counts a batch that is about to be trained on."""
        self.stopwatch.start()
        is_packed = "position_ids" in inputs
        self._num_tokens = self._num_tokens + (
            inputs["input_ids"].numel() if is_packed else inputs["attention_mask"].sum()
        )

    def read_interval(self) -> dict[str, float]:
        """Figures since the last call. Collective.

        `tokens_per_second`: of all processes together; `mfu`: model FLOPs utilization, absent where the device's peak
        is unknown; `peak_device_bytes`, absent without a GPU, and `peak_host_bytes`: so far.
        """
        num_tokens, seconds = self._total_tokens(), self.stopwatch.seconds()
        last_tokens, last_seconds = self._last_reading
        self._last_reading = (num_tokens, seconds)
        figures = {"tokens_per_second": (num_tokens - last_tokens) / max(seconds - last_seconds, 1e-9)}
        if self._plan and (mfu := self._plan.utilization(figures["tokens_per_second"])) is not None:
            figures["mfu"] = mfu
        device_bytes, figures["peak_host_bytes"] = self._peak_bytes()
        if device_bytes:
            figures["peak_device_bytes"] = device_bytes
        return figures

    def read_total(self) -> dict[str, float]:
        """Figures of the whole start. Collective.

        `train_tokens_per_second`: of all processes together; `train_peak_device_bytes`: of the fullest device, 0
        without a GPU; `train_peak_host_bytes`: of all processes together.
        """
        device_bytes, host_bytes = self._peak_bytes()
        return {
            "train_tokens_per_second": self._total_tokens() / max(self.stopwatch.seconds(), 1e-9),
            "train_peak_device_bytes": device_bytes,
            "train_peak_host_bytes": host_bytes,
        }

    def _peak_bytes(self) -> tuple[int, int]:
        """(of the fullest device, 0 without a GPU; of the host, all processes together)"""
        device_bytes = torch.cuda.max_memory_allocated()
        mine = torch.tensor([[device_bytes, peak_host_bytes()]], device=self._accelerator.device)
        peaks = self._accelerator.gather(mine)
        return peaks[:, 0].max().item(), peaks[:, 1].sum().item()

    def _total_tokens(self) -> int:
        mine = torch.as_tensor(self._num_tokens, device=self._accelerator.device)
        return int(self._accelerator.reduce(mine, reduction="sum").item())


def peak_host_bytes() -> int:
    """The most memory that this process has held (VmHWM of Linux; ru_maxrss would include the process that started
    it)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


@contextmanager
def explaining_full_memory(plan: Plan | None) -> Iterator[None]:
    """Turns an out-of-memory error into a UserError with the plan, the allocator's figures and what to change."""
    try:
        yield
    except RuntimeError as error:  # torch.OutOfMemoryError is one; there is no class for the host's memory
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        raise UserError(explain_failure(plan, str(error), *_allocated_bytes())) from error


def _allocated_bytes() -> tuple[int, int, int]:
    """Peaks: (allocated by torch on this device, reserved there, held by this process in host memory)"""
    return torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved(), peak_host_bytes()
