"""What a process finds out about torchrun. A small program that sets the same variables for its child stands for it."""

import signal
import subprocess

import pytest
from conftest import PYTHON, ROOT, environment_without_launcher
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from neoflix.runtime.errors import UserError
from neoflix.runtime.launcher import local_processes
from neoflix.runtime.processes import exit_code_of

TORCHRUN = """
import os, subprocess, sys
os.environ |= {"TORCHELASTIC_RUN_ID": "x", "TORCHELASTIC_MAX_RESTARTS": "2"}
os.environ.setdefault("OMP_NUM_THREADS", "1")
begin = "import os, subprocess, sys; from neoflix.runtime.launcher import *; "
subprocess.run([sys.executable, "-c", begin + sys.argv[1]])
"""


def torchrun(code: str, **env: str) -> subprocess.CompletedProcess:
    inherited = {name: value for name, value in environment_without_launcher().items() if name != "OMP_NUM_THREADS"}
    words = [PYTHON, "-c", TORCHRUN, code]
    return subprocess.run(words, env=inherited | env, cwd=ROOT, stdout=subprocess.PIPE, text=True, timeout=60)


@pytest.mark.process
def test_torchrun_is_found_if_it_is_the_parent():
    ask = "print(find_torchrun() == os.getppid(), find_deepspeed())"
    child_of_child = f"from neoflix.runtime.launcher import *; {ask}"
    code = f"{ask}; sys.stdout.flush(); subprocess.run([sys.executable, '-c', {'import os; ' + child_of_child!r}])"
    assert torchrun(code).stdout == "True None\nFalse None\n"


@pytest.mark.parametrize(("env", "expected"), [({}, False), ({"OMP_NUM_THREADS": "1"}, True)], ids=["unset", "set"])
@pytest.mark.process
def test_the_one_thread_of_torchrun_is_nobodys_choice(env, expected):
    assert torchrun("print(is_num_threads_chosen())", **env).stdout == f"{expected}\n"


@pytest.mark.parametrize(("used", "code"), [("0", -signal.SIGTERM), ("2", 0)])
@pytest.mark.process
def test_torchrun_is_ended_where_it_would_restart(used, code):
    assert torchrun("prevent_restart()", TORCHELASTIC_RESTART_COUNT=used).returncode == code


def test_torchrun_reads_the_sentence_of_a_user_error(monkeypatch, tmp_path, capsys):
    def fail():
        raise UserError("no such file")

    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    assert exit_code_of(fail) == 2
    assert ProcessFailure(0, 1, 2, str(tmp_path / "error.json")).message["message"] == "no such file"


@pytest.mark.parametrize("name", ["LOCAL_SIZE", "LOCAL_WORLD_SIZE", "WORLD_SIZE"])
def test_processes_of_this_machine(name, monkeypatch):
    for variable in ("LOCAL_SIZE", "LOCAL_WORLD_SIZE", "WORLD_SIZE"):
        monkeypatch.delenv(variable, raising=False)
    assert local_processes() == 1
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv(name, "4")
    assert local_processes() == 4
