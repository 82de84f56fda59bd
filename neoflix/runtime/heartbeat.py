"""Signs of life: what a process writes to the run's store every second, and what its machine can see of it meanwhile.

A process whose threads are blocked, by Python's lock or by swapping, writes nothing. Its machine still sees whether it
computes: other processes of the machine read that from /proc, and a helper program sends it to the other machines.
"""

import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import torch.distributed as dist

from neoflix.runtime.files import ROOT
from neoflix.runtime.store import connect

BEAT = 1.0  # seconds between two signs of life

BUSY_TICKS = 5  # hundredths of a second of computing per beat; the service threads of a hung process take less

PR_SET_PDEATHSIG = 1  # prctl.h


def describe_process() -> dict:
    """Where this process runs, as other processes find it in its signs of life."""
    return {"machine": this_machine(), "host": socket.gethostname(), "process": os.getpid()}


def this_machine() -> str:
    """The same in two processes that see each other in /proc, whatever name their host has."""
    return Path("/proc/sys/kernel/random/boot_id").read_text() + os.readlink("/proc/self/ns/pid")


def read_pulse(process: int) -> tuple[int, int]:
    """(hundredths of a second that a process of this machine has computed, pages it has read from disk or swap)

    Without the threads that serve the store, which other processes keep busy.
    """
    ticks = faults = 0
    for thread in Path(f"/proc/{process}/task").glob("*/stat"):
        with suppress(OSError):  # it has ended
            head, _, fields = thread.read_text().rpartition(")")
            if "(pt_tcpstore" not in head:
                fields = fields.split()  # proc(5), from "state" on
                faults += int(fields[9])
                ticks += int(fields[11]) + int(fields[12])
    return ticks, faults


def is_gone(sign: dict) -> bool:
    """Whether the process of a sign of life is on this machine and dead."""
    if sign["machine"] != this_machine():
        return False
    try:
        return Path(f"/proc/{sign['process']}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True


def kill_hung(sign: dict) -> None:
    """Kills a hung process if it is on this machine: DeepSpeed's launcher would wait 30 s for it to end by itself."""
    if sign["machine"] == this_machine():
        with suppress(ProcessLookupError):
            os.kill(sign["process"], signal.SIGKILL)


def start_pulse_reporter() -> None:
    """Starts `report_pulses` as a program of its own, which ends with this process."""
    quiet = os.environ | {"TORCH_CPP_LOG_LEVEL": "FATAL"}  # no message at the end of the run, when the store ends
    words = [sys.executable, "-m", "neoflix.runtime.heartbeat", str(os.getpid())]
    subprocess.Popen(words, cwd=ROOT, env=quiet)


def report_pulses(parent: int) -> None:
    """Writes what `read_pulse` finds for the processes of this machine to the store, for the other machines.

    Args:
        parent: the process that started this program, which ends with it; it may already have ended.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):  # a request to stop reaches all processes
        signal.signal(number, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # the parent may end while this waits for the store
    if os.getppid() != parent:
        return
    store = connect(serves=False)
    with suppress(dist.DistError):
        while True:
            for rank in range(int(os.environ["WORLD_SIZE"])):
                sign = json.loads(store.get(f"beat{rank}")) if store.check([f"beat{rank}"]) else {}
                if sign.get("machine") == this_machine():
                    store.set(f"pulse{rank}", json.dumps(read_pulse(sign["process"])))
            time.sleep(BEAT)


if __name__ == "__main__":
    report_pulses(int(sys.argv[1]))
