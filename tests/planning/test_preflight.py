"""What a machine must have: each missing part is refused before the run starts."""

import sys
import sysconfig
from dataclasses import replace

import pytest
from conftest import GIB, card

from neoflix.arguments.deepspeed_file import read_ds_config
from neoflix.planning.preflight import (
    check_compiler,
    check_gpu,
    check_locked_memory,
    check_nvme,
    check_shared_memory,
    prebuilt_operators,
)

ON_NVME = {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme", "nvme_path": "/tmp"}}}
PLAIN_ADAM = {"optimizer": {"type": "AdamW", "params": {"lr": "auto"}}}


@pytest.mark.parametrize(
    ("check", "message"),
    [
        (lambda: check_gpu(card(24, driver=(535, 54)), {}, None, (), ()), "built without CUDA"),
        (lambda: check_gpu(card(24, driver=(535, 54)), {}, None, (13, 0), ()), "driver 535.54 is older than 580.0"),
        (lambda: check_gpu(card(24, driver=(580, 65), capability=(7, 5)), {}, True, (13, 0), ()), "has no bf16"),
        (lambda: check_gpu(card(24, driver=(580, 65)), PLAIN_ADAM, None, (13, 0), ()), "no CUDA toolkit"),
        (lambda: check_gpu(card(24, driver=(580, 65)), PLAIN_ADAM, None, (13, 0), (12, 4)), "with CUDA 12.4"),
        (lambda: check_shared_memory(replace(card(24), shared_memory=64 * 2**20), 8), "--shm-size"),
        (lambda: check_nvme("/no/such/folder", "offload_optimizer"), "/no/such/folder"),
        (lambda: check_gpu(card(24, driver=(580, 65)), ON_NVME, None, (13, 0), ()), "offload_param to NVMe.*CUDA_HOME"),
    ],
)
def test_what_would_fail_later_is_refused(check, message):
    with pytest.raises(ValueError, match=message):
        check()


def test_what_will_do_is_let_through(tmp_path, monkeypatch):
    check_gpu(card(24, driver=(580, 65)), PLAIN_ADAM, True, (13, 0), (13, 1))
    check_gpu(card(24, driver=()), PLAIN_ADAM, True, (13, 0), (13, 1))  # torch used the GPU, and NVML isn't there
    check_gpu(card(24, driver=(535, 54)), read_ds_config("ds_configs/no_offload.json"), None, (12, 8), ())
    check_gpu(card(24, driver=(580, 65)), ON_NVME, None, (13, 0), (13, 0))
    check_shared_memory(replace(card(24), shared_memory=64 * 2**20), 1)
    pinned = replace(card(24), locked_memory=8 * 2**20)
    check_locked_memory(pinned, GIB)
    monkeypatch.setenv("DS_PIN_MEMORY_BACKEND", "native")
    with pytest.raises(ValueError, match="ulimit -l"):
        check_locked_memory(pinned, GIB)


def test_a_prebuilt_operator_needs_no_toolkit(tmp_path, monkeypatch):
    """An installed DeepSpeed like that of the Dockerfile."""
    package = tmp_path / "deepspeed"
    package.mkdir()
    (package / "__init__.py").touch()
    said = "installed_ops={'async_io': 1, 'cpu_adam': False}\naccelerator_name='cuda'\n"
    (package / "git_version_info_installed.py").write_text(said)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "deepspeed", raising=False)
    assert prebuilt_operators("cuda") == {"async_io"}
    assert prebuilt_operators("cpu") == set()
    check_gpu(card(24, driver=(580, 65)), ON_NVME, None, (13, 0), ())


def test_missing_compiler_names_the_package(monkeypatch, tmp_path):
    offload = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}
    check_compiler(offload)
    monkeypatch.setenv("PATH", str(tmp_path))
    check_compiler({"zero_optimization": {"stage": 2}})
    with pytest.raises(ValueError, match=r"apt install g\+\+"):
        check_compiler(offload)


def test_missing_headers_name_the_package(monkeypatch, tmp_path):
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(ValueError, match="apt install python3-dev"):
        check_compiler({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}})
