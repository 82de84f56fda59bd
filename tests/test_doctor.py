"""A machine's faults: each has its row in the doctor's table, and stops a run before anything is downloaded. GPUs, the
driver's library, torch's build and memory are other ones than here (fake_machine.py); all else is real."""

import json
import re
from dataclasses import dataclass, field

import pytest
from conftest import PYTHON, run_program
from fake_machine import IN_MIG_MODE, RTX_3090, SECOND_3090, V100

PLAN = (PYTHON, "train.py", "--plan", "--output_dir", "no-run")  # of GPT-Neo-2.7B, the default
SMALL = ("--config", "recipes/gpt-neo-125m.yaml")
V100_32 = V100.replace("16", "32")
PLAIN_ADAM = json.dumps({"optimizer": {"type": "AdamW", "params": {"lr": "auto"}}})
CPU_BUILD = {"torch": "2.13.0+cpu", "cuda": None, "has_gpu": False}
CU126, CU130 = (
    rf"torch==2\.13\.0\+{cu} --index-url https://download\.pytorch\.org/whl/{cu}\b" for cu in ("cu126", "cu130")
)
WSL = {"/proc/sys/kernel/osrelease": "5.15.167.4-microsoft-standard-WSL2\n"}
HAS_DRIVER = {"/proc/driver/nvidia/version": "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.95.05  Tue Sep 23\n"}


@dataclass(frozen=True)
class Case:
    row: str
    status: str
    says: str  # what the row's remedy says, and what stops the run
    gpus: tuple = (RTX_3090,)
    machine: dict = field(default_factory=dict)
    env: dict = field(default_factory=dict)
    run: tuple = ()  # words of a run that the fault stops
    goes_on: bool = False  # no run is stopped, or only torch itself can tell and stops it
    run_says: str = ""  # if it is not what the row says


CASES = {
    "old driver": Case("NVIDIA driver", "problem", f"580.0.*{CU126}", machine={"driver": "570.86.15"}),
    "oldest driver": Case(
        "NVIDIA driver", "problem", "update the driver (?!.*torch==)", machine={"driver": "470.57.02"}
    ),
    "torch for the CPU": Case("NVIDIA driver", "problem", f"without CUDA.*{CU130}", machine=CPU_BUILD),
    "torch for the CPU, old driver": Case(
        "NVIDIA driver", "problem", f"without CUDA.*{CU126}", machine={"driver": "550.54.14"} | CPU_BUILD
    ),
    "old card": Case("GPU 0", "problem", f"compute capability 7.0.*{CU126}", (V100_32,)),
    "torch finds no GPU": Case(
        "GPUs", "problem", "No CUDA GPUs are available", machine={"has_gpu": False}, goes_on=True
    ),
    "no toolkit": Case(
        "CUDA toolkit",
        "ok",
        "",
        env={"CUDA_HOME": "/nowhere"},
        run=(*SMALL, "--deepspeed", PLAIN_ADAM),
        run_says="torch_adam",
    ),
    "no compiler": Case("C++ compiler", "problem", r"apt install g\+\+", env={"PATH": "/nowhere"}),
    "container without the driver's library": Case(
        "GPUs",
        "problem",
        f"NVIDIA's GPU: torch was built without CUDA.*{CU130}",
        (),
        CPU_BUILD | {"files": {"/dev/nvidiactl": "a device"}},
        {"LD_LIBRARY_PATH": ""},
    ),
    "MIG": Case("GPUs", "problem", r"GPU 0 is divided.*MIG-", (IN_MIG_MODE,), {"has_gpu": False}),
    "a part (MIG) that is not there": Case(
        "GPUs", "problem", "No CUDA GPUs", machine={"has_gpu": False}, env={"CUDA_VISIBLE_DEVICES": "MIG-12"}
    ),
    "one of two is busy": Case(
        "GPU 1",
        "warn",
        r"15\.2 GiB are taken by \S+ \(1\) 15\.2 GiB.*CUDA_VISIBLE_DEVICES=0$",
        (RTX_3090, SECOND_3090),
        env={"FAKE_USER": "1 15576"},
        run_says=r"15\.2 GiB of NVIDIA GeForce RTX 3090 \(number 1\).*CUDA_VISIBLE_DEVICES",
    ),
    "no such number": Case("CUDA_VISIBLE_DEVICES", "problem", "=3 .* 0 to 0", env={"CUDA_VISIBLE_DEVICES": "3"}),
    "no such UUID": Case("CUDA_VISIBLE_DEVICES", "problem", "=GPU-z ", env={"CUDA_VISIBLE_DEVICES": "GPU-z"}),
    "one of two numbers": Case(
        "CUDA_VISIBLE_DEVICES", "warn", "1 of 2", env={"CUDA_VISIBLE_DEVICES": "0,7"}, goes_on=True
    ),
    "hidden": Case(
        "CUDA_VISIBLE_DEVICES",
        "warn",
        "unset",
        machine={"files": HAS_DRIVER, "has_gpu": False},
        env={"CUDA_VISIBLE_DEVICES": ""},
        run=SMALL,
        goes_on=True,
    ),
    "full /dev/shm": Case("/dev/shm", "problem", "1 process.*--shm-size", machine={"shm_mib": 1}),
    "WSL2": Case(
        "WSL2", "warn", r"\.wslconfig.*pin_memory", machine={"files": WSL, "host_gib": 24}, run_says=r"\.wslconfig"
    ),
}


@pytest.fixture
def environment(machine_of, monkeypatch):
    """environment(case) -> the environment variables of a program on the case's machine."""
    for name in ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "CUDA_HOME", "CUDA_PATH", "CXX"):
        monkeypatch.delenv(name, raising=False)
    return lambda case: machine_of(*case.gpus, **case.machine) | case.env


def rows_of(table: str) -> dict[str, tuple[str, str, str]]:
    """{row's name: (status, value, remedy)}"""
    found = re.findall(r"^(ok|warn|problem) +(\S+(?: \S+)*)  +(.*)(?:\n +-> (.*))?", table, re.MULTILINE)
    return {name: (status, value, remedy) for status, name, value, remedy in found}


@pytest.mark.process
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_each_fault_has_its_row(case, environment):
    table = run_program(
        PYTHON, "-m", "neoflix.doctor", env=environment(case), expect=2 if case.status == "problem" else 0
    )
    rows = rows_of(table)
    status, _, remedy = rows[case.row]
    assert status == case.status
    assert re.search(case.says, remedy)
    others = {name: row for name, row in rows.items() if name != case.row}
    assert "problem" not in {status for status, *_ in others.values()}, "a fault is said once"
    assert "Traceback" not in table


@pytest.mark.process
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_each_fault_stops_a_run_before_it_loads_anything(case, environment):
    said = run_program(*PLAN, *case.run, env=environment(case), expect=0 if case.goes_on else 2)
    if not case.goes_on:
        assert said.startswith("error: ")
        assert re.search(case.run_says or case.says, said)
        assert "Traceback" not in said


@pytest.mark.process
def test_a_sound_machine(environment):
    """Two linked cards, seen by UUID, in a container with a limit, with a toolkit of another version."""
    cards = (V100.replace("|70|", "|80|"), V100.replace("|70|", "|80|").replace("bb33", "bb44"))
    case = Case("", "", "", cards, env={"CUDA_VISIBLE_DEVICES": "GPU-bb44,GPU-bb33"})
    rows = rows_of(run_program(PYTHON, "-m", "neoflix.doctor", env=environment(case)))
    assert {row[0] for row in rows.values()} <= {"ok"}
    assert rows["torch"][1] == "2.13, built for CUDA 13.0"
    assert rows["NVIDIA driver"][1] == "580.95.5, for CUDA 13 and older"
    assert list(rows).index("GPU 1") < list(rows).index("GPU 0"), "as CUDA_VISIBLE_DEVICES has them"
    assert rows["GPU 1"][1] == "Tesla V100-SXM2-16GB, 16.0 GiB, 16.0 free, compute capability 8.0"
    assert rows["NVLink"][1] == "yes"
    assert rows["host memory"][1] == "64.0 GiB free"
    assert rows["/dev/shm"][1] == "8.00 GiB free"
    assert re.match(r"50\d\.\d GiB free", rows["disk"][1]), "and the checkpoints in results, if there are any"
    for name in ("C++ compiler", "Python headers", "ninja", "DeepSpeed's CPU Adam", "libaio", "ulimit -l", "container"):
        assert rows[name][1]


@pytest.mark.process
def test_a_toolkit_of_another_version(environment, tmp_path):
    nvcc = tmp_path / "cuda" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text("#!/bin/sh\necho Cuda compilation tools, release 12.4, V12.4.131\n")
    nvcc.chmod(0o755)
    env = environment(Case("", "", "", env={"CUDA_HOME": str(tmp_path / "cuda")}))
    status, value, remedy = rows_of(run_program(PYTHON, "-m", "neoflix.doctor", env=env))["CUDA toolkit"]
    assert (status, value) == ("warn", f"12.4 ({nvcc})")
    assert "CUDA 13.0" in remedy
    run_program(*PLAN, env=env)  # our own files need none
    assert "with CUDA 12.4" in run_program(*PLAN, *SMALL, "--deepspeed", PLAIN_ADAM, env=env, expect=2)


@pytest.mark.process
def test_a_torch_that_cannot_be_imported(environment, tmp_path):
    env = environment(Case("", "", ""))
    (tmp_path / "machine" / "torch" / "__init__.py").write_text("raise OSError('libcudart.so.13: not found')\n")
    table = run_program(PYTHON, "-m", "neoflix.doctor", env=env, expect=2)
    status, _, remedy = rows_of(table)["torch"]
    assert status == "problem"
    assert re.search(f"libcudart.so.13: not found.*{CU130}", remedy)
    assert "RTX 3090" in table


@pytest.mark.process
def test_gpus_alone(environment):
    env = environment(Case("", "", "", (RTX_3090, SECOND_3090), env={"CUDA_VISIBLE_DEVICES": "1,0"}))
    said = run_program(PYTHON, "-m", "neoflix.doctor", "--gpus", env=env)
    assert said.splitlines() == [
        "1 NVIDIA GeForce RTX 3090, 24.0 GiB, 8.8 free",
        "0 NVIDIA GeForce RTX 3090, 24.0 GiB, 23.6 free",
    ]
    env = environment(CASES["old driver"])
    assert re.match(f"error: .*{CU126}", run_program(PYTHON, "-m", "neoflix.doctor", "--gpus", env=env, expect=2))
