"""The program that started this process: DeepSpeed's launcher, torchrun, or neither."""

import json
import os
import signal
import time
from contextlib import suppress
from pathlib import Path

_PARENT = os.getppid()  # of the start; when it has ended, another process takes its place


def local_processes() -> int:
    """Processes of this run on this machine."""
    names = ("LOCAL_SIZE", "LOCAL_WORLD_SIZE", "WORLD_SIZE")  # of DeepSpeed's launcher, of torchrun, of both
    return int(next((os.environ[name] for name in names if name in os.environ), "1"))


def find_deepspeed() -> int | None:
    """The process of DeepSpeed's launcher, if it is this process's parent."""
    command = _read(os.getppid(), "cmdline")
    return os.getppid() if "deepspeed.launcher.launch" in command else None


def find_torchrun() -> int | None:
    """The process of torchrun, if it is this process's parent, whatever it is called: `accelerate launch` contains it.
    It sets TORCHELASTIC_RUN_ID for the processes that it starts, and is started without it."""
    if "TORCHELASTIC_RUN_ID" not in os.environ or os.getppid() != _PARENT:
        return None
    was_started_too = any(word.startswith("TORCHELASTIC_RUN_ID=") for word in _read(_PARENT, "environ"))
    return None if was_started_too else _PARENT


def is_num_threads_chosen() -> bool:
    """Whether the user set OMP_NUM_THREADS. torchrun sets it to 1 if it is missing in its own environment."""
    if os.environ.get("OMP_NUM_THREADS") != "1" or not (torchrun := find_torchrun()):
        return "OMP_NUM_THREADS" in os.environ
    return any(word.startswith("OMP_NUM_THREADS=") for word in _read(torchrun, "environ"))


def prevent_restart() -> None:
    """Ends torchrun if it would start the processes again (`--max_restarts`). Call it where that would be in vain, or
    against the user's wish."""
    most, used = (int(os.environ.get(f"TORCHELASTIC_{name}", "0")) for name in ("MAX_RESTARTS", "RESTART_COUNT"))
    if used < most and (torchrun := find_torchrun()):
        with suppress(ProcessLookupError):
            os.kill(torchrun, signal.SIGTERM)


def report_error(message: str) -> None:
    """Writes an error where torchrun looks for it, to show it in its own last lines."""
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        error = {"message": message, "extraInfo": {"timestamp": int(time.time())}}
        with suppress(OSError):
            Path(file).write_text(json.dumps({"message": error}))


def _read(process: int, name: str) -> list[str]:
    """The words of a process's file in /proc: its command line, or the environment that it was started with."""
    try:
        return Path(f"/proc/{process}/{name}").read_text(errors="replace").split("\0")
    except OSError:
        return []
