"""Seconds and bytes of a run."""

import time
from contextlib import contextmanager
from pathlib import Path


class Stopwatch:
    """Seconds since the first `start`, but for what ran under `paused`."""

    def __init__(self):
        self._began, self._paused = None, 0.0

    def start(self) -> None:
        self._began = self._began or time.perf_counter()

    @contextmanager
    def paused(self):
        pause_began = time.perf_counter()
        yield
        if self._began is not None:
            self._paused += time.perf_counter() - pause_began

    def seconds(self) -> float:
        return 0.0 if self._began is None else time.perf_counter() - self._began - self._paused


def peak_host_bytes() -> int:
    """Most memory this process has held (VmHWM of Linux: unlike ru_maxrss, nothing of the process that began it)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
