"""A dead process ends the whole run, soon and with a sentence.

Without this the others wait in a collective for one that never comes: half an hour by default, for each of them,
on machines paid by the hour.
"""

import json
import os
import signal
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from neoflix.distributed import DeadProcessError, end_process, gather, num_processes, shout
from neoflix.errors import UserError

BEAT = 1.0  # seconds between two signs of life
PATIENCE = 25  # beats without a sign of life: then it has hung, or its machine is gone
GRACE = 3.0  # seconds in which a main thread that has failed as well may end its process by itself


class Watchdog:
    """While it is entered, a thread in every process tells the others that it lives, and what it does.

    Ended, with one sentence and exit code 1, is a run in which a process is gone (noticed within seconds on the same
    machine), has been silent for `PATIENCE` beats, or has failed (in its own words).

    Args:
        activity: what this process is doing, in a few words; called from the thread.
    """

    def __init__(self, activity: Callable[[], str]):
        self._activity = activity
        self._left = threading.Event()
        self._found = threading.Event()
        self._verdict: str | None = None
        self._has_failed = False

    def __enter__(self) -> "Watchdog":
        if num_processes() == 1:
            return self
        self._rank = dist.get_rank()
        self._store = self._open_store()
        self._peers = gather((_this_machine(), socket.gethostname(), os.getpid()))
        # The last sign of each, and how often it was the same.
        self._heard = dict.fromkeys(range(len(self._peers)), ({"doing": "nothing", "has_failed": False}, 0))
        self._beat(0)
        gather(None)  # every first sign of life is there
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind, error, trace) -> None:
        if num_processes() == 1:
            return
        if kind is None:
            gather(None)  # rank 0 keeps the store until all have come so far
        elif not issubclass(kind, UserError | KeyboardInterrupt):
            # Most often the consequence of another process's end: that is worth a sentence, this is not.
            if self._found.wait(GRACE + 2 * BEAT):
                self._left.set()
                raise DeadProcessError(self._verdict) from error
            self._has_failed = True
            with suppress(dist.DistError):
                self._beat(-1)
            # By itself: DeepSpeed's launcher kills the others as soon as this process ends.
            words = f"{kind.__name__}: {error}".splitlines()[0]
            shout(self._sentence(self._rank, f"failed ({words})", self._activity()))
        self._left.set()

    def _open_store(self) -> dist.TCPStore:
        """A store of its own: the process group's own waits, and would keep a sign of life waiting."""
        host, timeout = os.environ["MASTER_ADDR"], timedelta(seconds=30)
        store = dist.TCPStore(host, 0, None, True, timeout, wait_for_workers=False) if self._rank == 0 else None
        port = gather(store.port if store else None)[0]
        return store or dist.TCPStore(host, port, None, False, timeout)

    def _beat(self, count: int) -> None:
        sign = {"count": count, "doing": self._activity(), "has_failed": self._has_failed}
        self._store.set(f"beat{self._rank}", json.dumps(sign))

    def _run(self) -> None:
        count = 0
        while not self._left.wait(BEAT):
            count += 1
            try:
                self._beat(count)
                self._verdict = self._find_dead()
            except dist.DistError:  # rank 0 keeps the store; its connections end a moment before it does
                self._left.wait(0.2)
                how = "was killed or crashed" if self._is_gone(0) else "cannot be reached any more"
                self._verdict = self._describe(0, how)
            if self._verdict is not None:
                self._found.set()
                break
        if not self._left.wait(GRACE):
            shout(self._verdict)
            end_process(1)

    def _find_dead(self) -> str | None:
        gone = [rank for rank in self._whom_to_ask() if self._is_gone(rank)]
        for rank in gone or self._whom_to_ask():
            if rank not in gone or rank != 0:  # rank 0 keeps the store
                before, beats = self._heard[rank]
                now = json.loads(self._store.get(f"beat{rank}"))
                self._heard[rank] = (now, beats + 1 if now == before else 0)
            if self._heard[rank][0]["has_failed"]:
                return ""  # it has said so itself
            if rank in gone:
                return self._describe(rank, "was killed or crashed")
            if self._heard[rank][1] >= PATIENCE:
                self._kill(rank)
                return self._describe(rank, f"has given no sign of life for {PATIENCE * BEAT:.0f} s")
        return None

    def _is_gone(self, rank: int) -> bool:
        machine, _, process = self._peers[rank]
        return machine == _this_machine() and not _is_alive(process)

    def _kill(self, rank: int) -> None:
        """A process of this machine that has hung: DeepSpeed's launcher would wait 30 s for it to end by itself."""
        machine, _, process = self._peers[rank]
        if machine == _this_machine():
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)

    def _whom_to_ask(self) -> list[int]:
        """Rank 0 looks at all, each other at rank 0 and at those of its own machine."""
        mine = _this_machine()
        ranks = range(len(self._peers))
        near = [rank for rank in ranks if self._rank == 0 or rank == 0 or self._peers[rank][0] == mine]
        return [rank for rank in near if rank != self._rank]

    def _describe(self, rank: int, how: str) -> str:
        """The sentence, or in all processes but one that is left an empty one: once is enough."""
        if self._rank != (1 if rank == 0 else 0):
            return ""
        return self._sentence(rank, how, self._heard[rank][0]["doing"])

    def _sentence(self, rank: int, how: str, doing: str) -> str:
        _, host, process = self._peers[rank]
        return f"error: rank {rank} (process {process} on {host}) {how}; it last said: {doing}"


def _this_machine() -> str:
    """The same in two processes that can see each other in /proc, whatever their host is called."""
    return Path("/proc/sys/kernel/random/boot_id").read_text() + os.readlink("/proc/self/ns/pid")


def _is_alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False
