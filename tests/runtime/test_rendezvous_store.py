import os
import socket
import subprocess

import pytest
from conftest import PYTHON, ROOT


@pytest.mark.process
def test_the_port_is_taken():
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        programs = subprocess.run(
            [PYTHON, "-c", "from neoflix.runtime.processes import run_and_exit; run_and_exit(print)"],
            env={**os.environ, "RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
    assert programs.returncode == 2
    assert programs.stderr.startswith(f"error: port {port} is used by another program on ")
    assert len(programs.stderr.splitlines()) == 1
