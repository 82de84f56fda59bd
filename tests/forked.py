"""Python programs without the seconds that their imports take.

A server (multiprocessing's) imports torch, transformers and DeepSpeed once. Each program is a fork of it: a process
with an environment, output, exit code and signals of its own. Not for tests of DeepSpeed's launcher, of what happens
at import, or of the memory that a process takes.
"""

import atexit
import multiprocessing.forkserver
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import torch
from conftest import PYTHON, ROOT, environment_without_launcher, free_port


class Program:
    """`python script words`, forked; its methods are those of subprocess.Popen."""

    def __init__(self, words: list[str], env: dict[str, str], log: Path):
        _start_server()
        self._process = multiprocessing.get_context("forkserver").Process(target=_become, args=(words, env, log))
        self._process.start()
        self.pid = self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("a forked program", timeout)
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        with suppress(ProcessLookupError):
            if self.poll() is None:
                os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _start_server() -> None:
    os.environ["PYTHONPATH"] = f"{ROOT}{os.pathsep}{ROOT / 'tests'}"  # Python 3.11 hands it no path to preload from
    try:
        multiprocessing.set_forkserver_preload(["preloaded", "forked"])
        multiprocessing.forkserver.ensure_running()
    finally:
        del os.environ["PYTHONPATH"]


def _become(words: list[str], env: dict[str, str], log: Path) -> None:
    """In the forked process: becomes the program."""
    assert "preloaded" in sys.modules, "preloaded.py did not load: import it to see why"
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(file, stream)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(ROOT)
    sys.argv = words
    try:
        runpy.run_path(words[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()


def start(*words, env: dict[str, str], log: Path) -> Program | subprocess.Popen:
    """Starts a script in a process of its own, in the project's folder; stdout and stderr are added to `log`."""
    words = [str(word) for word in words]
    log.touch()
    if not torch.cuda.is_available():
        return Program(words, env, log)
    with log.open("a") as output:  # CUDA does not survive a fork
        return subprocess.Popen([PYTHON, *words], env=env, cwd=ROOT, stdout=output, stderr=output)


def start_ranks(num_processes: int, *words, env: dict[str, str], logs: list[Path]) -> list:
    """Starts a script in processes that are told of each other as DeepSpeed's launcher tells them."""
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    world = {"WORLD_SIZE": str(num_processes), "LOCAL_SIZE": str(num_processes), **where}
    programs = []
    for rank, log in enumerate(logs):
        ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        arguments = (words[0], f"--local_rank={rank}", *words[1:])
        programs.append(start(*arguments, env=world | ranks | env, log=log))
    return programs


def launch(num_processes: int, *words, expect: int = 0, env: dict | None = None, timeout: float = 300) -> str:
    """Runs a script as `deepspeed --num_accelerators N script words` does, or with 0 as `python script words` does.

    Returns stdout and stderr of all processes together; checks the exit code. One that fails ends the others.
    """
    env = environment_without_launcher() | (env or {})
    with tempfile.NamedTemporaryFile() as file:
        log = Path(file.name)
        if num_processes:
            programs = start_ranks(num_processes, *words, env=env, logs=[log] * num_processes)
        else:
            programs = [start(*words, env=env, log=log)]
        try:
            outcome = _wait_for_all(programs, timeout)
        finally:
            for program in programs:
                program.kill()
                program.wait()
        output = log.read_text(errors="replace")
    assert outcome == f"exit code {expect}", f"{outcome}, expected exit code {expect}:\n{output}"
    return output


def _wait_for_all(programs: list, timeout: float) -> str:
    deadline = time.monotonic() + timeout
    while any(program.poll() is None for program in programs):
        if time.monotonic() > deadline:
            return f"still running after {timeout} s"
        failed = [program.poll() for program in programs if program.poll()]
        if failed:
            for program in programs:
                program.terminate()
            for program in programs:
                program.wait(30)
            return f"exit code {failed[0]}"
        time.sleep(0.02)
    return next((f"exit code {program.poll()}" for program in programs if program.poll()), "exit code 0")
