"""Signs of life of a process: read from /proc, and sent by a helper program while the process itself cannot."""

import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from neoflix.runtime.errors import UserError
from neoflix.runtime.files import ROOT


def read_pulse(process: int) -> tuple[int, int]:
    """(hundredths of a second that a process of this machine has computed, pages it has read from disk or swap).

    Without the threads that serve the store, which others keep busy.
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


def start_vouching() -> None:
    """Starts `vouch` as a program of its own, which ends with this process."""
    quiet = os.environ | {"TORCH_CPP_LOG_LEVEL": "FATAL"}  # the store's end is no news: the run has ended
    words = [sys.executable, "-m", "neoflix.runtime.vouching", str(os.getpid())]
    subprocess.Popen(words, cwd=ROOT, env=quiet)


def vouch(parent: int) -> None:
    """A run on several machines has this program on each of them: it tells the others what `read_pulse` finds here.

    Args:
        parent: the process that started it; it ends with that one, which may be before it has imported torch.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):  # a request to stop reaches all processes
        signal.signal(number, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # it may end while this program waits for the store
    if os.getppid() != parent:
        return
    store = connect(serves=False)
    with suppress(dist.DistError):
        while True:
            for rank in range(int(os.environ["WORLD_SIZE"])):
                sign = json.loads(store.get(f"beat{rank}")) if store.check([f"beat{rank}"]) else {}
                if sign.get("machine") == _this_machine():
                    store.set(f"pulse{rank}", json.dumps(read_pulse(sign["process"])))
            time.sleep(BEAT)


if __name__ == "__main__":
    vouch(int(sys.argv[1]))


BEAT = 1.0  # seconds between two signs of life


PR_SET_PDEATHSIG = 1  # prctl.h


BUSY_TICKS = 5  # hundredths of a second of computing in a beat; a hung process's service threads take less


def connect(serves: bool) -> dist.Store:
    """A connection of its own to the run's store: a call that waits holds up only calls on the same connection.

    Args:
        serves: this process serves the store (rank 0). UserError where the port is taken.
    """
    port = int(os.environ["MASTER_PORT"])
    serves = serves and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"  # torchrun serves it itself
    options = {"timeout": FIRST_CONTACT, "wait_for_workers": False, "multi_tenant": True}
    try:
        store = dist.TCPStore(os.environ["MASTER_ADDR"], port, None, serves, **options)
    except dist.DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        raise UserError(
            f"port {port} is used by another program on {socket.gethostname()}; choose another one: "
            "deepspeed --master_port PORT, or MASTER_PORT=PORT ./launch.sh"
        ) from error
    return dist.PrefixStore("neoflix", store)


def _this_machine() -> str:
    """The same in two processes that can see each other in /proc, whatever their host is called."""
    return Path("/proc/sys/kernel/random/boot_id").read_text() + os.readlink("/proc/self/ns/pid")


FIRST_CONTACT = timedelta(minutes=30)  # for rank 0 to start, as torch.distributed waits
