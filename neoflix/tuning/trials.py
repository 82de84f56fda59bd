"""Starts trials as child processes, and stops them."""

import ctypes
import math
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from neoflix.checkpoints.names import RESULTS_FILE, STATE_FILE
from neoflix.runtime.console import say
from neoflix.runtime.errors import RUN_ME_AGAIN, DivergedError, StoppedEarly, UserError
from neoflix.runtime.files import ROOT, STOP_FILE, read_json

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
OF_LAUNCHERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")
TAIL = 25  # lines of a log


class Stops:
    """Requests to stop: Ctrl-C and the signals that end a program. A second Ctrl-C does not wait for the trial."""

    def __init__(self):
        self.reason, self.num_interrupts = "", 0
        for number in SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup's
                signal.signal(number, self._note)

    def _note(self, number, frame) -> None:
        self.reason = self.reason or signal.Signals(number).name
        self.num_interrupts += number == signal.SIGINT

    def check(self) -> None:
        """StoppedEarly if there is a request."""
        if self.reason:
            raise StoppedEarly(f"Stopped ({self.reason}); the same command continues the search")


def train_to(steps: int, recipe: Path, num_processes: int, stops: Stops) -> float:
    """Trains the trial of a recipe until it has taken `steps` steps, from its checkpoint if there is one. Its folder
    and its log have the recipe's name.

    Returns:
        The held-out loss after these steps, in nats per token; infinite if the run diverged.

    Raises:
        UserError: the trial's own.
        StoppedEarly: the trial was asked to stop, and has saved a checkpoint, or a second Ctrl-C ended it.
        RuntimeError: the trial failed in any other way.
    """
    run, log, code_file = (recipe.with_suffix(suffix) for suffix in ("", ".log", ".code"))
    words = ["--config", str(recipe), "--output_dir", str(run), "--max_steps", str(steps)]
    code_file.unlink(missing_ok=True)
    with log.open("w") as output:
        child = subprocess.Popen(
            [*launcher(num_processes), str(ROOT / "train.py"), *words],
            env=_environment(code_file),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,  # Ctrl-C reaches this process alone, which asks the trial to save and stop
            preexec_fn=_stop_with_parent,
        )
        code = _wait(child, run, stops)
    if code_file.is_file():  # DeepSpeed's launcher does not always return it
        code = int(code_file.read_text() or code)
        code_file.unlink()
    if code == RUN_ME_AGAIN:  # also where somebody else asked the trial
        stops.reason = stops.reason or "on request"
    if code:
        stops.check()
    if code == DivergedError.exit_code:
        return math.inf
    if code:
        _fail(code, log)
    return read_losses(run)[steps]


def launcher(num_processes: int) -> list[str]:
    """What starts train.py: Python, or for several processes DeepSpeed's launcher, as launch.sh calls it."""
    if num_processes == 1:
        return [sys.executable]
    words = [sys.executable, str(Path(sys.executable).with_name("deepspeed")), "--quiet"]
    words += ["--master_port", str(random.SystemRandom().randrange(20_000, 30_000))]
    if not os.environ.get("CUDA_VISIBLE_DEVICES"):  # otherwise the launcher uses those, and one process for each
        words += ["--num_accelerators", str(num_processes)]
    return words


def _environment(code_file: Path) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if name not in OF_LAUNCHERS}
    return inherited | {"NEOFLIX_EXIT_CODE_FILE": str(code_file)}


def _stop_with_parent() -> None:
    """In the child: asks the kernel for SIGTERM when the search is killed, so that no trial goes on unnoticed."""
    set_parent_death_signal = 1  # PR_SET_PDEATHSIG of linux/prctl.h
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGTERM)


def _wait(child: subprocess.Popen, run: Path, stops: Stops) -> int:
    """Waits for a trial. It is asked to stop by its STOP file, which works with every launcher; repeatedly, because a
    run removes the file when it begins to train."""
    is_said = False
    while child.poll() is None:
        if stops.num_interrupts > 1:
            os.killpg(child.pid, signal.SIGKILL)
        elif stops.reason and run.is_dir():
            (run / STOP_FILE).touch()
        if stops.reason and not is_said:
            is_said = True
            say(f"{stops.reason}: waiting until the trial has saved a checkpoint (Ctrl-C again: not waiting)")
        time.sleep(0.1)
    return child.returncode


def _fail(code: int, log: Path) -> None:
    text = log.read_text(errors="replace")
    if code == UserError.exit_code and "error: " in text:
        raise UserError(f"\n{text}".rpartition("\nerror: ")[2].strip())
    tail = "\n".join(text.splitlines()[-TAIL:])
    raise RuntimeError(f"a trial ended with exit code {code}; the end of {log}:\n{tail}")


def read_losses(run: Path) -> dict[int, float]:
    """The held-out losses of a finished run, by the number of steps; none if it is not finished."""
    state = read_json(run / STATE_FILE, {}) if (run / RESULTS_FILE).is_file() else {}
    return {line["step"]: line["eval_loss"] for line in state.get("log_history", []) if "eval_loss" in line}
