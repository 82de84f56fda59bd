"""What every process does to its surroundings before it does anything else."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import PYTHON, ROOT

from neoflix.runtime.environment import prepare_environment


def outcome(code: str, **environment: str) -> int:
    """What `code` prints in a fresh process, as a number."""
    inherited = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    done = subprocess.run(
        [PYTHON, "-c", code], cwd=ROOT, env=inherited | environment, check=True, capture_output=True, timeout=120
    )
    return int(done.stdout)


def test_programs_of_this_python_come_first(monkeypatch):
    """A call of .venv/bin/deepspeed without activation finds .venv's ninja, not the system's or none."""
    monkeypatch.setenv("PATH", "/usr/bin")
    prepare_environment()
    assert shutil.which("ninja") == str(Path(PYTHON).with_name("ninja"))
    prepare_environment()
    assert os.environ["PATH"].count(str(Path(PYTHON).parent)) == 1


@pytest.mark.parametrize(
    ("name", "num_processes"), [("LOCAL_SIZE", 1), ("LOCAL_SIZE", 2), ("LOCAL_SIZE", 1000), ("LOCAL_WORLD_SIZE", 2)]
)
@pytest.mark.process
def test_processes_share_the_cores(name, num_processes):
    """By the variable too, where there are several: accelerate goes by it, over torch's head."""
    code = (
        "import os, torch; from neoflix.runtime.environment import prepare_environment as p; p(); "
        "threads, told = torch.get_num_threads(), os.environ.get('OMP_NUM_THREADS'); "
        f"print(threads if told == str(threads) or {num_processes} == 1 else -1)"
    )
    expected = max(1, len(os.sched_getaffinity(0)) // num_processes)
    assert outcome(code, **{name: str(num_processes)}) == expected
    assert outcome(code, **{name: str(num_processes)}, OMP_NUM_THREADS="1") == 1, "what the user says holds"


@pytest.mark.process
def test_the_only_process_of_torchrun_serves_its_own_store():
    code = (
        "import torch.distributed as dist; from neoflix.runtime.environment import prepare_environment as p; p(); "
        "dist.init_process_group('gloo'); print(dist.get_world_size())"
    )
    torchruns = {"RANK": "0", "LOCAL_RANK": "0", "MASTER_PORT": "1", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    assert outcome(code, WORLD_SIZE="1", MASTER_ADDR="localhost", **torchruns) == 1


@pytest.mark.process
def test_freed_memory_is_kept_for_the_next_step():
    """The kernel fills each page with zeros at its first touch: in every step, or only in the first ones. (Tensors of
    up to 32 MB glibc keeps by itself; these logits have 40. A late step may still need one piece more: the calmest
    of the last six counts.)"""
    code = """
import resource, torch
if {keep}:
    from neoflix.runtime.environment import prepare_environment
    prepare_environment()
head = torch.nn.Linear(64, 50_304)
faults = []
for step in range(12):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    head.zero_grad()
    torch.nn.functional.cross_entropy(head(torch.randn(200, 64)), torch.arange(200)).backward()
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(min(faults[6:]))
"""
    no_gpu = {"CUDA_VISIBLE_DEVICES": ""}  # beside one torch keeps the memory itself, and this is not done
    assert outcome(code.format(keep=False), **no_gpu) > 10_000
    assert outcome(code.format(keep=True), **no_gpu) < 1_000
