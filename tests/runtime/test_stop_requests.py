"""A process that was asked to end suspends its launcher, whatever else SLURM sends to all of them."""

import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress

import psutil
import pytest
from conftest import PYTHON, ROOT

RANK = """
import sys, time
import torch.distributed as dist
from neoflix.runtime.launcher import find_torchrun
from neoflix.runtime.stop_requests import catch_stop_requests, find_stop_request
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
catch_stop_requests()
print("listening", flush=True)
sys.stdin.read()
while not find_stop_request("."):
    time.sleep(0.1)
print(find_stop_request("."), find_torchrun())
"""
LAUNCHER = f"""
import os, subprocess, sys
if sys.argv[1] == "torchrun":
    os.environ["TORCHELASTIC_RUN_ID"] = "x"
subprocess.run([sys.executable, "-c", {RANK!r}])
"""


def wait_for(condition: Callable[[], object]):
    deadline = time.monotonic() + 20
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return found


def is_stopped(process: psutil.Process) -> bool:
    return process.status() == psutil.STATUS_STOPPED


@pytest.fixture(params=["deepspeed.launcher.launch", "torchrun"])
def launcher(request):
    """A process that is recognized as this launcher, with one rank, which listens."""
    command = [PYTHON, "-c", LAUNCHER, request.param]
    with psutil.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as program:
        assert program.stdout.readline() == b"listening\n"
        ranks = program.children()
        yield program
        for each in (*ranks, program):
            with suppress(psutil.NoSuchProcess):
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


@pytest.mark.process
def test_the_end_of_a_launcher_is_a_request_to_stop(launcher):
    """The process that takes its place as the parent is not taken for torchrun."""
    launcher.kill()
    launcher.stdin.close()
    assert launcher.stdout.readline().endswith(b" is gone None\n")
