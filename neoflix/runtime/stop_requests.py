"""Requests to stop a run: a signal, a launcher that is gone, a file named STOP. A leaf: imports nothing of ours.

They are noticed here and acted on at the end of a step (callbacks.StopOnRequest), by all processes together.
"""

import os
import signal
import subprocess
import threading
import time
from pathlib import Path

STOP_FILE = "STOP"  # in the run's folder


SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


_requests: list[str] = []  # why this process was asked to stop


_held = threading.Event()  # DeepSpeed's launcher is


def find_stop_request(run: str) -> str | None:
    """Why the run should stop, or None."""
    if _requests:
        return _requests[0]
    return f"{STOP_FILE} in {run}" if Path(run, STOP_FILE).exists() else None


def forget_stop_file(run: str) -> None:
    """A STOP file holds once: the same command goes on afterwards."""
    Path(run, STOP_FILE).unlink(missing_ok=True)


def catch_stop_requests() -> None:
    """From here on SIGTERM and SIGUSR1 are requests, and so is the end of DeepSpeed's launcher.

    A thread hears the signals, by a pipe: the main thread hears nothing while it waits for other processes, and a
    launcher that said SIGTERM kills after 30 s.
    """
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
    for number in SIGNALS:
        signal.signal(number, lambda *_: None)
    threading.Thread(target=_listen, args=(read_end,), daemon=True).start()
    if launcher := _find_launcher():
        threading.Thread(target=_watch, args=(launcher,), daemon=True).start()


def _listen(read_end: int) -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # in _hold's shell too, which has to outlive them
    while number := os.read(read_end, 1):
        if number[0] not in SIGNALS:
            continue
        if number[0] == signal.SIGTERM and not _requests and (launcher := _find_launcher()):
            _hold(launcher)
        _requests.append(signal.Signals(number[0]).name)


def _find_launcher() -> int | None:
    """DeepSpeed's launcher on this machine, where it is this process's parent."""
    try:
        command = Path(f"/proc/{os.getppid()}/cmdline").read_bytes()
    except OSError:
        return None
    return os.getppid() if b"deepspeed.launcher.launch" in command else None


def _hold(launcher: int) -> None:
    """Stops the launcher's clock for as long as this process lives.

    DeepSpeed's launcher hands SIGTERM on and kills what still runs 30 s later (launch.py, terminate_process_tree);
    saving a 2.7B checkpoint takes minutes. Who wakes the launcher is a shell that waits for the end of a pipe,
    which this process's end is, whatever ends it.
    """
    read_end, write_end = os.pipe()
    wake = f"read _; kill -CONT {launcher}"
    subprocess.Popen(["/bin/sh", "-c", wake], stdin=read_end, start_new_session=True)
    os.close(read_end)
    os.set_inheritable(write_end, False)
    os.kill(launcher, signal.SIGSTOP)
    _held.set()


def _parent_of(process: int) -> int | None:
    try:
        return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return None


def _watch(launcher: int) -> None:
    """A launcher that was killed leaves its processes running unseen; they save and end instead. Its own parent,
    the `deepspeed` command, is killed by a SIGTERM that it does not hand on: the same."""
    command = _parent_of(launcher)
    while os.getppid() == launcher and _parent_of(launcher) == command:
        if _held.is_set():  # SLURM says SIGCONT after SIGTERM, to all
            os.kill(launcher, signal.SIGSTOP)
        time.sleep(1)
    _requests.append("DeepSpeed's launcher is gone")
