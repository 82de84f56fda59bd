"""A process that fails, dies or hangs ends the whole run, within seconds and with one message.

Without this, the other processes wait in a collective for one that never comes: half an hour by default, on machines
that are paid by the hour.

From its start to its end, a thread in every process writes a sign of life every second, and reads those of others. They
are in the key-value store that rank 0 serves at MASTER_PORT, together with the process group's own, so that no other
port has to be open. A sign of life needs Python's lock (the GIL), which DeepSpeed's CPU Adam holds for a whole step. A
process without signs of life counts as alive for as long as it computes or reads swapped pages (`heartbeat.py`).
"""

import atexit
import json
import os
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
from neoflix.runtime.heartbeat import (
    BEAT,
    BUSY_TICKS,
    describe_process,
    is_gone,
    kill_hung,
    read_pulse,
    start_pulse_reporter,
    this_machine,
)
from neoflix.runtime.launcher import local_processes, prevent_restart
from neoflix.runtime.store import FIRST_CONTACT, connect, leave_torchruns_store

PATIENCE = 25  # beats without a sign of life, after which a process has hung or its machine is gone

GRACE = 3.0  # seconds for a main thread that has failed too to end its process by itself

LINGER = 10.0  # at its end, rank 0 keeps the store for the others for at most this many seconds

LATE_START = 60.0  # the same for processes without a first sign of life


class Failure(NamedTuple):
    """Another process's failure, and what this process prints about it; usually nothing."""

    code: int
    rank: int
    message: str


class Watchdog:
    """Watches over the processes of a run from the moment it is made.

    Raises:
        UserError: in rank 0, if another program uses the port.
    """

    def __init__(self):
        self._rank, self._num_processes = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self._store = connect(serves=True) if self._rank == 0 else None
        self._last_signs: dict[int, dict] = {}  # by rank
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
        """The failure of another process that explains an exception in this one, or None: a collective fails when
        another process ends."""
        self._found.wait(GRACE + 2 * BEAT)
        return self.failure

    def may_print(self, message: str) -> bool:
        """Whether this process is the one to print a message that several may have. Rank 0 comes first."""
        if not self._connected.wait(FIRST_CONTACT.total_seconds()):
            return True
        key = f"said/{message}"
        with suppress(dist.DistError):
            deadline = time.monotonic() + GRACE
            while self._rank != 0 and not self._store.check([key]) and time.monotonic() < deadline:
                time.sleep(0.1)
            return int(self._store.compare_set(key, "", str(self._rank))) == self._rank
        return True

    def describe_itself(self) -> str:
        return f"rank {self._rank} (process {os.getpid()} on {socket.gethostname()})"

    def leave(self, code: int, cause: int | None = None) -> None:
        """Gives the last sign of life. Rank 0 then waits for those of the others, because the store ends with it.

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
        signs = [self._read_sign(rank) for rank in range(1, self._num_processes)]
        if None in signs and seconds < LATE_START:
            return True
        return seconds < LINGER and any(sign and sign["end"] is None and not is_gone(sign) for sign in signs)

    def _run(self) -> None:
        try:
            self._store = self._store or connect(serves=False)
        except dist.DistError:
            return  # rank 0 has never started; the process group reports that
        self._connected.set()
        if self._rank_on_machine() == 0 and local_processes() < self._num_processes:
            start_pulse_reporter()
        while not self._left.is_set() and self.failure is None:
            try:
                self._beat()
                self.failure = self._find_failure()
            except dist.DistError:  # rank 0 serves the store; its connections end a moment before it does
                if self._left.wait(0.2) or self._last_signs.get(0, {}).get("end"):
                    return
                gone = 0 in self._last_signs and is_gone(self._last_signs[0])
                self.failure = self._describe(0, "was killed or crashed" if gone else "cannot be reached any more")
            self._left.wait(0 if self.failure else BEAT)
        if self.failure is None:
            return
        self._found.set()
        if not self._left.wait(GRACE):
            end_for(self.failure)

    @staticmethod
    def _rank_on_machine() -> int:
        return int(os.environ.get("LOCAL_RANK", "0"))

    def _beat(self) -> None:
        with self._beating:  # the last sign comes from the main thread
            self._count += 1
            sign = {"count": self._count, "doing": self.activity(), "end": self._end} | describe_process()
            self._store.set(f"beat{self._rank}", json.dumps(sign))

    def _read_sign(self, rank: int) -> dict | None:
        """The last sign of life of another process; None before the first."""
        return json.loads(self._store.get(f"beat{rank}")) if self._store.check([f"beat{rank}"]) else None

    def _find_failure(self) -> Failure | None:
        for rank in self._ranks_to_watch():
            sign = self._read_sign(rank)
            if sign is None:
                continue
            if sign["end"] is None and is_gone(sign):
                sign = self._read_sign(rank)  # it may have given its last one since
                if sign["end"] is None:
                    self._last_signs[rank] = sign
                    return self._describe(rank, "was killed or crashed")
            is_alive, self._last_signs[rank] = self._shows_life(rank, sign), sign
            if end := sign["end"]:
                cause = rank if end["cause"] is None else end["cause"]
                if end["code"] not in (0, RUN_ME_AGAIN) and cause != self._rank:
                    return Failure(end["code"], cause, "")  # it has printed its error itself
                continue
            self._silent[rank] = 0 if is_alive else self._silent.get(rank, 0) + 1
            if self._silent[rank] >= PATIENCE:
                kill_hung(sign)
                return self._describe(rank, f"has given no sign of life for {PATIENCE * BEAT:.0f} s")
        return None

    def _shows_life(self, rank: int, sign: dict) -> bool:
        ticks_before, faults_before = self._pulses.get(rank, (0, 0))
        ticks, faults = self._pulses[rank] = self._find_pulse(rank, sign)
        is_computing = ticks >= ticks_before + BUSY_TICKS or faults > faults_before
        return is_computing or sign["count"] != self._last_signs.get(rank, {}).get("count")

    def _find_pulse(self, rank: int, sign: dict) -> tuple[int, int]:
        if sign["machine"] == this_machine():
            return read_pulse(sign["process"])
        pulse = f"pulse{rank}"
        return tuple(json.loads(self._store.get(pulse))) if self._store.check([pulse]) else (0, 0)

    def _ranks_to_watch(self) -> list[int]:
        """Rank 0 watches all; the others watch rank 0 and those of their own machine."""
        others = [rank for rank in range(self._num_processes) if rank != self._rank]
        here = this_machine()
        if self._rank == 0:
            return others
        return [rank for rank in others if rank == 0 or self._last_signs.get(rank, {}).get("machine", here) == here]

    def _describe(self, rank: int, how: str) -> Failure:
        """A failure, with a message in only one of the processes that are left."""
        if self._rank != (1 if rank == 0 else 0):
            return Failure(1, rank, "")
        sign = self._last_signs.get(rank, {"process": "?", "host": os.environ["MASTER_ADDR"], "doing": "nothing"})
        who = f"rank {rank} (process {sign['process']} on {sign['host']})"
        return Failure(1, rank, f"error: {who} {how}; last reported: {sign['doing']}")


_watchdog: Watchdog | None = None  # this process's


def start_watchdog() -> None:
    """Starts this process's watchdog, if the run has several processes.

    Raises:
        UserError: for environment variables that no launcher sets so and, in rank 0, if another program uses the port.
    """
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
    leave_torchruns_store()
    _watchdog = Watchdog()


def get_watchdog() -> Watchdog | None:
    """This process's watchdog; None if it is the only process."""
    return _watchdog


def announce_activity(activity: Callable[[], str]) -> None:
    """Sets the function that describes in a few words what this process is doing, for the message about its failure.
    It is called every second, from another thread."""
    if _watchdog:
        _watchdog.activity = activity


def end_for(failure: Failure) -> None:
    """Ends this process because another one failed."""
    shout(failure.message)
    if os.environ.get("NEOFLIX_LOG_DIR") and not failure.message:
        print(f"This process ends because rank {failure.rank} failed", file=sys.stderr)
    if failure.code == UserError.exit_code:
        prevent_restart()
    end_process(failure.code, failure.rank)


def end_process(code: int, cause: int | None = None) -> None:
    """Ends this process at once, from any thread.

    C++'s own cleanup at exit is skipped. Now and then a thread of gloo or DeepSpeed is still running at that point, and
    a finished run would end with "terminate called" and exit code -6.

    Args:
        cause: the rank whose failure ends this process.
    """
    leave_exit_code(code)
    if _watchdog:
        _watchdog.leave(code, cause)
    if code in (0, RUN_ME_AGAIN):  # otherwise a Python thread may wait for a process that is gone
        atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def leave_exit_code(code: int) -> None:
    """Writes the run's exit code where launch.sh looks for it: DeepSpeed's launcher does not always return it."""
    if is_main_process() and (path := os.environ.get("NEOFLIX_EXIT_CODE_FILE")):
        Path(path).write_text(f"{code}\n")
