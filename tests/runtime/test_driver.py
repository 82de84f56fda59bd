"""NVIDIA's driver, and the builds of torch that it can run."""

import subprocess
import sys

import pytest
from conftest import PYTHON, ROOT

from neoflix.runtime import driver
from neoflix.runtime.driver import check_capability, check_driver, hides_gpus, install_command, read_driver


@pytest.mark.parametrize(
    ("line", "version"),
    [
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.86.15  Fri Jan 24 12:00:00 UTC 2025\n", (570, 86, 15)),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build  (x)\n", (580, 95, 5)),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for aarch64  580.0  Release Build\n", (580, 0)),
    ],
)
def test_the_kernel_names_the_driver(line, version, tmp_path, monkeypatch):
    (tmp_path / "version").write_text(f"{line}GCC version:  gcc version 13.3.0\n")
    monkeypatch.setattr(driver, "DRIVER_FILE", tmp_path / "version")
    assert read_driver() == version


@pytest.mark.process
@pytest.mark.parametrize(("script", "version"), [("echo 566.24\necho 566.24", (566, 24)), ("exit 9", ())])
def test_otherwise_nvidia_smi_does(script, version, tmp_path, monkeypatch):
    """Under WSL2 the kernel has no such file."""
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setattr(driver, "DRIVER_FILE", tmp_path / "version")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert read_driver() == version


@pytest.mark.process
def test_without_a_driver_nothing_is_known(tmp_path, monkeypatch):
    monkeypatch.setattr(driver, "DRIVER_FILE", tmp_path / "version")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert read_driver() == ()


@pytest.mark.parametrize(
    ("version", "build"),
    [((580, 65), "cu130"), ((579, 99), "cu126"), ((525, 60), "cu126"), ((525, 59), None), ((), "cu130")],
)
def test_the_newest_build_that_a_driver_runs(version, build):
    """torch's release is the one in requirements.txt."""
    command = install_command(version)
    release = next(line for line in (ROOT / "requirements.txt").read_text().splitlines() if line.startswith("torch=="))
    expected = f"{sys.executable} -m pip install {release}+{build} --index-url https://download.pytorch.org/whl/{build}"
    assert command == (expected if build else "")


def test_a_driver_older_than_torch_is_refused():
    check_driver("a card", (580, 0), (13, 0))
    check_driver("a card", (525, 60), (12, 6))
    check_driver("a card", (), (13, 0))
    with pytest.raises(ValueError, match=r"driver 579\.9 is older than 580\.0.*13\.0.*cu126"):
        check_driver("a card", (579, 9), (13, 0))
    with pytest.raises(ValueError, match=r"525.*update the driver"):
        check_driver("a card", (470, 57), (12, 6))


def test_a_card_older_than_torch_is_refused():
    check_capability("RTX 2080", (7, 5), (13, 0))
    check_capability("V100", (7, 0), (12, 6))
    with pytest.raises(ValueError, match=r"V100 has compute capability 7\.0.*7\.5.*cu126"):
        check_capability("V100", (7, 0), (13, 0))


@pytest.mark.parametrize("visible", ["", " ", "-1", "NoDevFiles", "none"])
def test_what_hides_gpus(visible):
    assert hides_gpus(visible)


@pytest.mark.parametrize("visible", [None, "0", " 1", "+0", "7", "GPU-1", "MIG-1"])
def test_what_names_gpus(visible):
    assert not hides_gpus(visible)


@pytest.mark.process
def test_it_needs_pythons_own_modules_only():
    """launch.sh asks before it installs anything."""
    code = "import sys, neoflix.runtime.driver; print([name for name in sys.modules if name in sys.argv])"
    names = ["torch", "pynvml", "tqdm", "yaml", "xxhash"]
    done = subprocess.run([PYTHON, "-S", "-c", code, *names], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
