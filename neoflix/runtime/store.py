"""The key-value store of a run with several processes, which rank 0 serves at MASTER_PORT."""

import os
import socket
from datetime import timedelta

import torch.distributed as dist

from neoflix.runtime.errors import UserError

FIRST_CONTACT = timedelta(minutes=30)  # for rank 0 to start; torch.distributed waits as long


def connect(serves: bool) -> dist.Store:
    """A new connection to the run's store. A call that waits blocks only the calls on its own connection.

    Args:
        serves: whether this process serves the store (rank 0).

    Raises:
        UserError: if another program uses the port.
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
