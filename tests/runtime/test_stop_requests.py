"""A process that was asked to end holds DeepSpeed's launcher, whatever else SLURM says to all of them."""

import signal
import subprocess
import time
from collections.abc import Callable

import psutil
import pytest
from conftest import PYTHON, ROOT

RANK = (
    "from neoflix.runtime.stop_requests import catch_stop_requests as c; c(); print('listening', flush=True); input()"
)
LAUNCHER = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {RANK!r}])"


def wait_for(condition: Callable[[], object]):
    deadline = time.monotonic() + 20
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return found


def is_stopped(process: psutil.Process) -> bool:
    return process.status() == psutil.STATUS_STOPPED


@pytest.fixture
def launcher():
    """A process by that name, with one rank, which listens."""
    command = [PYTHON, "-c", LAUNCHER, "deepspeed.launcher.launch"]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as program:
        process = psutil.Process(program.pid)
        assert program.stdout.readline() == b"listening\n"
        yield process
        for each in (*process.children(recursive=True), process):
            each.kill()


@pytest.mark.process
def test_a_held_launcher_stays_held_until_its_process_ends(launcher):
    """SLURM's order is SIGTERM, SIGCONT, at times SIGTERM again; its clock would run, and kill a save after 30 s."""
    (rank,) = launcher.children()
    rank.terminate()
    (shell,) = wait_for(rank.children)
    wait_for(lambda: is_stopped(launcher))
    for number in (signal.SIGCONT, signal.SIGTERM, signal.SIGUSR1):
        rank.send_signal(number)
        shell.send_signal(number)
    launcher.send_signal(signal.SIGCONT)
    wait_for(lambda: is_stopped(launcher))
    rank.kill()
    wait_for(lambda: not launcher.is_running() or not is_stopped(launcher))
