"""Which GPUs a process sees. NVML is a small library with the same functions; of torch, which has no CUDA here, the
functions that tell are replaced."""

import json
import os
import re
import shutil
import subprocess
from types import SimpleNamespace

import pytest
import torch
from conftest import PYTHON, ROOT
from fake_machine import IN_MIG_MODE, RTX_3090, SECOND_3090, V100, describe_gpus

from neoflix.runtime.gpus import read_gpus, visible_devices
from neoflix.runtime.hardware import has_gpu, read_machine

GIB = 2**30
UNIFIED = "NVIDIA GB10|GPU-dd55|-|0|121|-1|0"

SHOW = """
import json, sys
from neoflix.runtime.gpus import read_gpus_by_nvml
gpus = read_gpus_by_nvml()
assert "torch" not in sys.modules
print(json.dumps(gpus and [vars(gpu) for gpu in gpus]))
"""


@pytest.fixture
def with_gpus(nvml):
    """with_gpus([gpus], code, **environment) -> what `code` prints where the driver's library has these GPUs."""

    def run(gpus: list[str], code: str = SHOW, expect: int = 0, **environment: str) -> str:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("CUDA_")}
        done = subprocess.run(
            [PYTHON, "-c", code],
            cwd=ROOT,
            env=inherited | describe_gpus(nvml, *gpus) | environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == expect, done.stderr
        return done.stdout + (done.stderr if expect else "")

    return run


@pytest.mark.process
def test_nvml_describes_each_gpu(with_gpus):
    first, second = json.loads(with_gpus([RTX_3090, V100]))
    assert (first["name"], first["memory"], first["free"]) == ("NVIDIA GeForce RTX 3090", 24 * GIB, 24176 * 2**20)
    assert (first["capability"], first["driver"], first["has_nvlink"]) == ([8, 6], [580, 95, 5], False)
    assert (second["capability"], second["has_nvlink"]) == ([7, 0], True)


@pytest.mark.parametrize(
    ("visible", "free_mib"),
    [
        ("0", [24176]),
        ("1,0", [9000, 24176]),
        (" 1 , 0", [9000, 24176]),
        ("0,,1", [24176]),
        ("0,7,1", [24176]),
        ("0,0", []),
        ("", []),
        ("-1", []),
        ("1,-1,0", [9000]),
        ("NoDevFiles", []),
        ("GPU-ab22", [9000]),
        ("GPU-ab,GPU-aa", [9000, 24176]),
        ("GPU-a", []),  # which of the two?
        ("GPU-zz", []),
    ],
)
@pytest.mark.process
def test_visible_devices_are_those_that_cuda_shows(visible, free_mib, with_gpus):
    gpus = json.loads(with_gpus([RTX_3090, SECOND_3090], CUDA_VISIBLE_DEVICES=visible))
    assert [gpu["free"] for gpu in gpus] == [mib * 2**20 for mib in free_mib]


@pytest.mark.parametrize("visible", ["0", "1,0", "0,,1", "0,7,1", "0,0", "-1", "1,-1,0", "x", "+1", "1x,0", "GPU-a,1"])
def test_visible_devices_as_torch_reads_them(visible, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    theirs = torch.cuda._parse_visible_devices()
    if theirs and isinstance(theirs[0], str):
        theirs = torch.cuda._transform_uuid_to_ordinals(theirs, ["GPU-aa", "GPU-bb"])
    first_missing = next((i for i, number in enumerate(theirs) if number > 1), None)
    assert visible_devices(visible, ["GPU-aa", "GPU-bb"]) == theirs[:first_missing]


@pytest.mark.parametrize(
    ("gpus", "environment"),
    [
        ([IN_MIG_MODE], {}),
        ([IN_MIG_MODE], {"CUDA_VISIBLE_DEVICES": "MIG-1234"}),
        ([UNIFIED], {}),
        ([RTX_3090, V100], {"CUDA_VISIBLE_DEVICES": "0"}),  # CUDA's first is the faster one
    ],
)
@pytest.mark.process
def test_what_only_torch_can_tell(gpus, environment, with_gpus):
    assert json.loads(with_gpus(gpus, **environment)) is None
    asked = "import sys; from neoflix.runtime.gpus import read_gpus; print(read_gpus(), 'torch' in sys.modules)"
    assert with_gpus(gpus, asked, **environment).split() == ["[]", "True"]


@pytest.mark.process
def test_mixed_cards_by_bus_or_by_name(with_gpus):
    by_bus = {"CUDA_VISIBLE_DEVICES": "1", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    for environment in (by_bus, {"CUDA_VISIBLE_DEVICES": "GPU-bb"}):
        (gpu,) = json.loads(with_gpus([RTX_3090, V100], **environment))
        assert gpu["name"] == "Tesla V100-SXM2-16GB"


@pytest.mark.process
def test_without_a_driver_there_is_no_gpu(with_gpus):
    """No library (as here), or one without its driver."""
    code = "import os; os.environ.pop('FAKE_GPUS'); " + SHOW.replace("\nimport json, sys", "import json, sys")
    assert json.loads(with_gpus([], code)) == []
    assert json.loads(with_gpus([], LD_LIBRARY_PATH="")) == []


@pytest.mark.process
def test_a_machine_has_its_smallest_gpu(with_gpus, tmp_path):
    code = (
        "import json; from neoflix.runtime.hardware import read_machine; "
        f"print(json.dumps([vars(read_machine({str(tmp_path)!r}, use_cpu)) for use_cpu in (False, True)]))"
    )
    machine, cpu = json.loads(with_gpus([RTX_3090, SECOND_3090], code))
    assert (machine["num_devices"], machine["device_memory"]) == (2, 24 * GIB)
    assert machine["device_taken"] == (24576 - 9000) * 2**20
    assert not machine["is_linked"]
    assert cpu["num_devices"] == 0
    linked, _ = json.loads(with_gpus([V100, V100.replace("bb33", "bb44")], code))
    assert linked["is_linked"]


@pytest.mark.process
def test_plan_sees_gpus_without_torch_or_nvidia_smi(with_gpus):
    code = (
        "import sys; from neoflix.planning.plan_run import plan_run\n"
        "from neoflix.arguments.reader import read_train_flags\n"
        "plan_run(read_train_flags(['--plan', '--output_dir', 'no-run', '--plan_host_memory', '64GiB']))\n"
        "print('torch' in sys.modules)"
    )
    said = with_gpus(
        [RTX_3090], code, PATH="/nowhere", CXX=shutil.which("c++")
    )  # DeepSpeed's optimizer wants a compiler
    assert "device memory (NVIDIA GeForce RTX 3090)" in said
    assert said.endswith("False\n")


@pytest.mark.parametrize("driver", ["570.10.01", "580.95.05"])
@pytest.mark.process
def test_a_gpu_that_torch_cannot_use_is_refused(driver, with_gpus):
    """Here it is because torch was built without CUDA."""
    code = "from neoflix.arguments.parse import read_all_flags as read; read(['--dataset', 'sample', '--eval_only'])"
    code = f"from neoflix.runtime.processes import run_and_exit\ndef main():\n    {code}\nrun_and_exit(main)"
    said = with_gpus([RTX_3090], code, expect=2, FAKE_DRIVER=driver)
    assert re.search("error: NVIDIA GeForce RTX 3090: .*without CUDA", said)
    assert "--use_cpu true" in said
    used = "from neoflix.runtime.hardware import has_gpu; print(has_gpu())"
    assert with_gpus([RTX_3090], used, CUDA_VISIBLE_DEVICES="").strip() == "False"


# ---- torch -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def cuda(monkeypatch):
    """cuda(2, is_integrated=True) has torch see so many GPUs."""

    def see(count: int, **more) -> None:
        device = {"name": "NVIDIA A100-SXM4-40GB MIG 1g.5gb", "total_memory": 4 * GIB, "major": 8, "minor": 0}
        device |= {"uuid": "1234", "is_integrated": False} | more
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(**device))
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (3 * GIB, 4 * GIB))

    monkeypatch.delenv("LOCAL_RANK", raising=False)
    return see


def test_torch_is_asked_where_it_is_loaded(cuda, tmp_path, monkeypatch):
    """NVML isn't here: torch says what is free, but of this process's own device only."""
    cuda(2)
    assert has_gpu()
    first, second = read_gpus()
    assert (first.name, first.memory, first.capability) == ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", 4 * GIB, (8, 0))
    assert (first.free, second.free) == (3 * GIB, 4 * GIB)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert [gpu.free for gpu in read_gpus()] == [4 * GIB, 3 * GIB]
    machine = read_machine(str(tmp_path))
    assert (machine.num_devices, machine.device_memory - machine.device_taken) == (2, 3 * GIB)


def test_memory_shared_with_the_host(cuda, tmp_path):
    cuda(1, is_integrated=True)
    machine = read_machine(str(tmp_path))
    assert machine.shares_memory
    assert machine.device_taken == 0
