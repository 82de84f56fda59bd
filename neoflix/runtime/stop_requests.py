"""Requests to stop a run: a signal, the end of its launcher, a file named STOP.

They are noticed here. All processes act on them together, at the end of a step (`callbacks.StopOnRequest`).
"""

import os
import signal
import subprocess
import threading
import time
from pathlib import Path

import torch.distributed as dist

from neoflix.runtime.files import STOP_FILE
from neoflix.runtime.launcher import find_deepspeed, find_torchrun

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


_requests: list[str] = []  # why this process was asked to stop


_suspended = threading.Event()  # whether the launcher is suspended


def find_stop_request(run: str) -> str | None:
    """The reason why the run should stop, or None."""
    if _requests:
        return _requests[0]
    return f"{STOP_FILE} in {run}" if Path(run, STOP_FILE).exists() else None


def forget_stop_file(run: str) -> None:
    """Removes the STOP file, so that the same command resumes the run."""
    Path(run, STOP_FILE).unlink(missing_ok=True)


def catch_stop_requests() -> None:
    """Makes SIGTERM, SIGUSR1 and the end of the launcher (DeepSpeed's or torchrun) requests to stop.

    A thread receives the signals through a pipe. The main thread would not notice them while it waits for other
    processes, and a launcher kills 30 s after its SIGTERM.
    """
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
    for number in SIGNALS:
        signal.signal(number, lambda *_: None)
    threading.Thread(target=_listen, args=(read_end,), daemon=True).start()
    if launcher := find_deepspeed():
        threading.Thread(target=_watch, args=(launcher, "DeepSpeed's launcher"), daemon=True).start()
    elif launcher := find_torchrun():
        threading.Thread(target=_watch, args=(launcher, "torchrun"), daemon=True).start()


def _listen(read_end: int) -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # inherited by the shell of `_suspend`, which must outlive them
    while number := os.read(read_end, 1):
        if number[0] not in SIGNALS:
            continue
        name = signal.Signals(number[0]).name
        if not _suspended.is_set() and (launcher := _find_impatient(name)):
            _suspend(launcher)
        _requests.append(name)


def _find_impatient(signal_name: str) -> int | None:
    """The launcher, if it forwards this signal and kills the processes that still run 30 s later (DeepSpeed's
    terminate_process_tree, torchrun's --shutdown_timeout), while saving a 2.7B checkpoint takes minutes.

    torchrun is left alone until the processes are connected: it serves the store where they look for rank 0's.
    """
    if signal_name == "SIGTERM" and (launcher := find_deepspeed()):
        return launcher
    forwarded = os.environ.get("TORCHELASTIC_SIGNALS_TO_HANDLE", "SIGTERM").split(",")
    return find_torchrun() if signal_name in forwarded and dist.is_initialized() else None


def _suspend(launcher: int) -> None:
    """Suspends the launcher for as long as this process lives. A shell wakes it when a pipe closes, which happens when
    this process ends, for whatever reason."""
    read_end, write_end = os.pipe()
    wake = f"read _; kill -CONT {launcher}"
    subprocess.Popen(["/bin/sh", "-c", wake], stdin=read_end, start_new_session=True)
    os.close(read_end)
    os.set_inheritable(write_end, False)
    os.kill(launcher, signal.SIGSTOP)
    _suspended.set()


def _parent_of(process: int) -> int | None:
    try:
        return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return None


def _watch(launcher: int, name: str) -> None:
    """Requests a stop when the launcher is gone, because its processes would go on unnoticed. The same holds for the
    `deepspeed` command, the parent of DeepSpeed's launcher, which does not forward the SIGTERM that kills it. torchrun
    has no such parent: a shell that starts it may end."""
    command = _parent_of(launcher)
    while os.getppid() == launcher and (name == "torchrun" or _parent_of(launcher) == command):
        if _suspended.is_set():  # after SIGTERM, SLURM sends SIGCONT to all
            os.kill(launcher, signal.SIGSTOP)
        time.sleep(1)
    _requests.append(f"{name} is gone")
