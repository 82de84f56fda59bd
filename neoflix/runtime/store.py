"""The key-value store of a run with several processes, which rank 0 serves at MASTER_PORT."""

import os
import socket
import time
import uuid
from datetime import timedelta

import torch.distributed as dist

from neoflix.runtime.errors import UserError

FIRST_CONTACT = timedelta(minutes=30)  # for rank 0 to start; torch.distributed waits as long

_served: list[dist.Store] = []  # kept for as long as this process lives


def connect(serves: bool) -> dist.Store:
    """A new connection to the run's store. A call that waits blocks only the calls on its own connection.

    Args:
        serves: whether this process serves the store (rank 0).

    Raises:
        UserError: if another program uses the port.
    """
    port = int(os.environ["MASTER_PORT"])
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


def leave_torchruns_store() -> None:
    """Replaces the store that torchrun's own process serves by one of rank 0, on the same machine. Collective.

    torchrun's store outlives a restart. It still has the addresses of the processes that are gone, and torch 2.13
    connects to those. It also answers nobody while torchrun is suspended (`stop_requests.py`).
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return
    host, rank = os.environ["MASTER_ADDR"], int(os.environ["RANK"])
    torchruns = dist.TCPStore(host, int(os.environ["MASTER_PORT"]), None, False, FIRST_CONTACT)
    torchruns = dist.PrefixStore("neoflix", torchruns)
    if rank == 0:
        port = _serve_others(host, torchruns)
    else:
        token = uuid.uuid4().hex
        torchruns.set(f"token{rank}", token)
        port = int(torchruns.get(f"port for {token}"))
        dist.TCPStore(host, port, None, False, FIRST_CONTACT).set(f"met{rank}", "")
    os.environ |= {"MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "False"}


def _serve_others(host: str, torchruns: dist.Store) -> int:
    """Serves a store at a free port, waits until all other processes have found it, and returns the port.

    It is written under the token of each process, because of a token of before a restart nobody reads it.
    """
    own = dist.TCPStore(host, 0, None, True, wait_for_workers=False, multi_tenant=True)
    _served.append(own)
    missing, deadline = set(range(1, int(os.environ["WORLD_SIZE"]))), time.monotonic() + FIRST_CONTACT.total_seconds()
    while missing and time.monotonic() < deadline:
        for rank in missing:
            if torchruns.check([f"token{rank}"]):
                torchruns.set(f"port for {torchruns.get(f'token{rank}').decode()}", str(own.port))
        missing = {rank for rank in missing if not own.check([f"met{rank}"])}
        time.sleep(0.05)
    return own.port
