import os
import socket
import subprocess

import pytest
import torch.distributed as dist
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


@pytest.mark.process
def test_processes_that_torchrun_starts_again_meet_in_a_new_store(run_two):
    """torchrun's own store still has what the processes of before have left there."""
    torchruns = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    where = {"MASTER_PORT": str(torchruns.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    for answer in ("7", "8"):
        codes, said = run_two(f"connect_processes()\nprint(gather(run_on_main_process(lambda: {answer})))", **where)
        assert set(codes) == {0}
        assert [log.splitlines()[-1] for log in said] == [f"[{answer}, {answer}]"] * 2
