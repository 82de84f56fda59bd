"""A process that fails, dies or hangs ends the whole run, within seconds and with one sentence.

Without this the others wait in a collective for one that never comes: half an hour by default, each of them, on
machines paid by the hour.

From its start to its end, a thread in every process writes a sign of life every second, and reads those of others. They
lie in a key-value store that rank 0 serves at MASTER_PORT, together with the process group's own: no other port has to
be open. A sign of life needs Python's lock (the GIL), which DeepSpeed's CPU Adam holds for a whole step. A process that
gives none counts as alive for as long as it computes or reads swapped pages: its own machine can see that.
"""

import atexit
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch.distributed as dist

from neoflix.runtime.console import is_main_process, shout
from neoflix.runtime.errors import RUN_ME_AGAIN, UserError
from neoflix.runtime.vouching import BEAT, BUSY_TICKS, FIRST_CONTACT, _this_machine, connect, read_pulse, start_vouching

PATIENCE = 25  # beats without a sign of life: then it has hung, or its machine is gone


GRACE = 3.0  # seconds in which a main thread that has failed as well may end its process by itself


LINGER = 10.0  # seconds at most that rank 0 keeps the store for the others at its end


LATE_START = 60.0  # the same for those that have not yet given a first sign of life


class Failure(NamedTuple):
    """Another process's failure. `sentence`: what this process is to print about it; most often nothing."""

    code: int
    rank: int
    sentence: str


class Watchdog:
    """Watches over the processes of a run from the moment it is made. UserError, in rank 0, where its port is taken."""

    def __init__(self):
        self._rank, self._num_processes = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self._store = connect(serves=True) if self._rank == 0 else None
        self._heard: dict[int, dict] = {}  # the last sign of each
        self._pulses: dict[int, tuple[int, int]] = {}
        self._silent: dict[int, int] = {}  # beats without a sign of life
        self._count = 0
        self._end: dict | None = None  # how this process ended
        self._beating = threading.Lock()
        self._connected, self._left, self._found = threading.Event(), threading.Event(), threading.Event()
        self.failure: Failure | None = None
        self.activity: Callable[[], str] = lambda: "starting"
        threading.Thread(target=self._run, daemon=True).start()

    def wait_for_failure(self) -> Failure | None:
        """The failure of another process that explains an exception in this one, as far as there is one: a collective
        fails when another process ends."""
        self._found.wait(GRACE + 2 * BEAT)
        return self.failure

    def may_say(self, sentence: str) -> bool:
        """Whether this process is the one to print what several of them may have to say. Rank 0 has the first turn."""
        if not self._connected.wait(FIRST_CONTACT.total_seconds()):
            return True
        key = f"said/{sentence}"
        with suppress(dist.DistError):
            deadline = time.monotonic() + GRACE
            while self._rank != 0 and not self._store.check([key]) and time.monotonic() < deadline:
                time.sleep(0.1)
            return int(self._store.compare_set(key, "", str(self._rank))) == self._rank
        return True

    def describe_itself(self) -> str:
        return f"rank {self._rank} (process {os.getpid()} on {socket.gethostname()})"

    def leave(self, code: int, cause: int | None = None) -> None:
        """The last sign of life. Rank 0 then waits until the others have given theirs: the store ends with it.

        Args:
            cause: the rank whose failure ends this process.
        """
        self._end = {"code": code, "cause": cause}
        self._left.set()
        with suppress(dist.DistError):
            if self._connected.wait(LINGER):
                self._beat()
            began = time.monotonic()
            while self._rank == 0 and self._is_awaited(time.monotonic() - began):
                time.sleep(0.1)

    def _is_awaited(self, seconds: float) -> bool:
        """Whether a process may still look for rank 0's last sign, so many seconds after it was given."""
        signs = [self._hear(rank) for rank in range(1, self._num_processes)]
        if None in signs and seconds < LATE_START:
            return True
        return seconds < LINGER and any(sign and sign["end"] is None and not _is_gone(sign) for sign in signs)

    def _run(self) -> None:
        try:
            self._store = self._store or connect(serves=False)
        except dist.DistError:
            return  # rank 0 has never started; so says the process group
        self._connected.set()
        if self._rank_on_machine() == 0 and self._processes_on_machine() < self._num_processes:
            start_vouching()
        while not self._left.is_set() and self.failure is None:
            try:
                self._beat()
                self.failure = self._find_failure()
            except dist.DistError:  # rank 0 keeps the store; its connections end a moment before it does
                if self._left.wait(0.2) or self._heard.get(0, {}).get("end"):
                    return
                gone = 0 in self._heard and _is_gone(self._heard[0])
                how = "was killed or crashed" if gone else "cannot be reached any more"
                self.failure = self._describe(0, how)
            self._left.wait(0 if self.failure else BEAT)
        if self.failure is None:
            return
        self._found.set()
        if not self._left.wait(GRACE):
            end_for(self.failure)

    @staticmethod
    def _rank_on_machine() -> int:
        return int(os.environ.get("LOCAL_RANK", "0"))

    def _processes_on_machine(self) -> int:
        """By DeepSpeed's launcher, or torchrun."""
        return int(os.environ.get("LOCAL_SIZE") or os.environ.get("LOCAL_WORLD_SIZE") or self._num_processes)

    def _beat(self) -> None:
        with self._beating:  # the last one is the main thread's
            self._count += 1
            sign = {"count": self._count, "doing": self.activity(), "end": self._end}
            sign |= {"machine": _this_machine(), "host": socket.gethostname(), "process": os.getpid()}
            self._store.set(f"beat{self._rank}", json.dumps(sign))

    def _hear(self, rank: int) -> dict | None:
        """The last sign of life of another process; None before the first."""
        return json.loads(self._store.get(f"beat{rank}")) if self._store.check([f"beat{rank}"]) else None

    def _find_failure(self) -> Failure | None:
        for rank in self._whom_to_ask():
            sign = self._hear(rank)
            if sign is None:
                continue
            if sign["end"] is None and _is_gone(sign):
                sign = self._hear(rank)  # its last word, by now
                if sign["end"] is None:
                    self._heard[rank] = sign
                    return self._describe(rank, "was killed or crashed")
            is_alive, self._heard[rank] = self._shows_life(rank, sign), sign
            if end := sign["end"]:
                cause = rank if end["cause"] is None else end["cause"]
                if end["code"] not in (0, RUN_ME_AGAIN) and cause != self._rank:
                    return Failure(end["code"], cause, "")  # it has said so itself
                continue
            self._silent[rank] = 0 if is_alive else self._silent.get(rank, 0) + 1
            if self._silent[rank] >= PATIENCE:
                _kill(sign)
                return self._describe(rank, f"has given no sign of life for {PATIENCE * BEAT:.0f} s")
        return None

    def _shows_life(self, rank: int, sign: dict) -> bool:
        ticks_before, faults_before = self._pulses.get(rank, (0, 0))
        ticks, faults = self._pulses[rank] = self._pulse(rank, sign)
        is_computing = ticks >= ticks_before + BUSY_TICKS or faults > faults_before
        return is_computing or sign["count"] != self._heard.get(rank, {}).get("count")

    def _pulse(self, rank: int, sign: dict) -> tuple[int, int]:
        if sign["machine"] == _this_machine():
            return read_pulse(sign["process"])
        pulse = f"pulse{rank}"
        return tuple(json.loads(self._store.get(pulse))) if self._store.check([pulse]) else (0, 0)

    def _whom_to_ask(self) -> list[int]:
        """Rank 0 looks at all, each other at rank 0 and at those of its own machine."""
        others = [rank for rank in range(self._num_processes) if rank != self._rank]
        here = _this_machine()
        if self._rank == 0:
            return others
        return [rank for rank in others if rank == 0 or self._heard.get(rank, {}).get("machine", here) == here]

    def _describe(self, rank: int, how: str) -> Failure:
        """With the sentence in one process that is left: once is enough."""
        if self._rank != (1 if rank == 0 else 0):
            return Failure(1, rank, "")
        sign = self._heard.get(rank, {"process": "?", "host": os.environ["MASTER_ADDR"], "doing": "nothing"})
        who = f"rank {rank} (process {sign['process']} on {sign['host']})"
        return Failure(1, rank, f"error: {who} {how}; it last said: {sign['doing']}")


_watchdog: Watchdog | None = None  # this process's


def start_watchdog() -> None:
    """Where a run has several processes. UserError where the launcher's variables are not a launcher's and, in rank 0,
    where its port is taken."""
    global _watchdog
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT"):
        if not (value := os.environ.get(name, "0")).isdecimal():
            raise UserError(f"the environment variable {name} is {value!r}: must be a whole number; unset it")
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return
    if missing := [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
        raise UserError(
            f"the environment variable WORLD_SIZE is {os.environ['WORLD_SIZE']}, but {' and '.join(missing)} not set; "
            "start several processes with deepspeed train.py, or unset WORLD_SIZE"
        )
    _watchdog = Watchdog()


def get_watchdog() -> Watchdog | None:
    """This process's; None where it is the only one."""
    return _watchdog


def announce_activity(activity: Callable[[], str]) -> None:
    """What this process is doing, in a few words, should it be found dead. Called every second, from another thread."""
    if _watchdog:
        _watchdog.activity = activity


def end_for(failure: Failure) -> None:
    """Ends this process because another one failed."""
    shout(failure.sentence)
    if os.environ.get("NEOFLIX_LOG_DIR") and not failure.sentence:
        print(f"This process ends because rank {failure.rank} failed", file=sys.stderr)
    end_process(failure.code, failure.rank)


def end_process(code: int, cause: int | None = None) -> None:
    """Ends this process at once, from any thread.

    Where processes were connected, C++'s own tidying up at exit is left out: now and then a thread of gloo or
    DeepSpeed is still running by then, and a finished run would end as "terminate called", exit code -6.

    Args:
        cause: the rank whose failure ends it.
    """
    leave_exit_code(code)
    if _watchdog:
        _watchdog.leave(code, cause)
    if code in (0, RUN_ME_AGAIN):  # else a thread of Python's may wait for a process that is gone
        atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def leave_exit_code(code: int) -> None:
    """Writes the run's exit code where launch.sh looks for it: DeepSpeed's launcher does not always hand it on."""
    if is_main_process() and (path := os.environ.get("NEOFLIX_EXIT_CODE_FILE")):
        Path(path).write_text(f"{code}\n")


def _is_gone(sign: dict) -> bool:
    """Whether a process of this machine is dead, by its last sign of life."""
    if sign["machine"] != _this_machine():
        return False
    try:
        return Path(f"/proc/{sign['process']}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True


def _kill(sign: dict) -> None:
    """A process of this machine that has hung: DeepSpeed's launcher would wait 30 s for it to end by itself."""
    if sign["machine"] == _this_machine():
        with suppress(ProcessLookupError):
            os.kill(sign["process"], signal.SIGKILL)
