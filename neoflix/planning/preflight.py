"""Checks of the machine that would otherwise fail an hour into a run."""

import os
import re
import shutil
import tempfile
from pathlib import Path

from neoflix.runtime.errors import UserError
from neoflix.runtime.hardware import (
    Machine,
    _dotted,
    _run,
    check_driver,
    torch_cuda,
)


def toolkit_cuda() -> tuple[int, ...]:
    """The CUDA toolkit that DeepSpeed would compile with, () where there is none."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = str(Path(home, "bin", "nvcc")) if home else shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    match = re.search(r"release (\d+)\.(\d+)", _run(nvcc, "--version"))
    return tuple(int(part) for part in match.groups()) if match else ()


def check_machine(machine: Machine, ds_config: dict, pinned_bytes: int, bf16: bool | None, num_processes: int) -> None:
    """UserError for the first thing that would end the run after it has begun: in one sentence, with the way out.

    Args:
        pinned_bytes: host memory that the processes of this node lock, by the plan.
        bf16: what was asked for; None: the run takes what the device has.
    """
    zero = ds_config.get("zero_optimization", {})
    if machine.has_gpu:
        check_gpu(machine, ds_config, bf16, torch_cuda(), toolkit_cuda())
    check_locked_memory(machine, pinned_bytes)
    if num_processes > 1:
        check_shared_memory(machine, num_processes)
    for part in ("offload_optimizer", "offload_param"):
        if zero.get(part, {}).get("device") == "nvme":
            check_nvme(zero[part].get("nvme_path"), part)


def check_gpu(machine: Machine, ds_config: dict, bf16: bool | None, built: tuple, toolkit: tuple) -> None:
    """UserError for a GPU that this torch or this precision cannot use, or an optimizer that cannot be compiled.

    Args:
        built, toolkit: CUDA of torch and of the toolkit, (major, minor); () where there is none.
    """
    check_driver(machine.device_name, machine.driver, built)
    if bf16 and machine.capability < (8, 0):
        raise UserError(
            f"--bf16 true: {machine.device_name} (compute capability {_dotted(machine.capability)}) has no bf16, it "
            "came with 8.0 (Ampere); leave --bf16 out, and the run takes fp16"
        )
    optimizer = ds_config.get("optimizer", {})
    is_offloaded = "offload_optimizer" in ds_config.get("zero_optimization", {})
    compiles = optimizer.get("type", "").lower() in ("adam", "adamw") and not is_offloaded
    if compiles and not optimizer.get("params", {}).get("torch_adam"):
        if not toolkit:
            raise UserError(
                "DeepSpeed compiles its GPU Adam and found no CUDA toolkit (nvcc): install the one for CUDA "
                f'{_dotted(built)}, or say "torch_adam": true in the optimizer\'s params of the DeepSpeed file'
            )
        if toolkit[0] != built[0]:
            raise UserError(
                f"DeepSpeed compiles its GPU Adam with CUDA {_dotted(toolkit)}, and torch was built for "
                f'{_dotted(built)}: install that toolkit (CUDA_HOME names its folder), or say "torch_adam": true in '
                "the optimizer's params of the DeepSpeed file"
            )


def check_locked_memory(machine: Machine, pinned_bytes: int) -> None:
    """`ulimit -l` bounds what DeepSpeed's own pinning (DS_PIN_MEMORY_BACKEND=native: mlock) and libaio may lock; CUDA
    locks by its driver, which no limit of the shell's holds back."""
    uses_mlock = os.environ.get("DS_PIN_MEMORY_BACKEND") == "native"
    if uses_mlock and machine.locked_memory is not None and machine.locked_memory < pinned_bytes:
        raise UserError(
            f"DS_PIN_MEMORY_BACKEND=native locks {pinned_bytes / 2**30:.1f} GiB, and `ulimit -l` allows "
            f"{machine.locked_memory / 2**30:.1f} GiB: raise it (`ulimit -l unlimited`), leave the variable out, or "
            'say "pin_memory": false in the DeepSpeed file'
        )


def check_shared_memory(machine: Machine, num_processes: int) -> None:
    """NCCL connects the processes of a node through /dev/shm: about 33 MB for each (a container's default of 64 MB
    is not enough for three; NCCL documentation, "Troubleshooting: shared memory")."""
    needed = num_processes * 33 * 2**20 if machine.has_gpu else 0
    if machine.shared_memory is not None and machine.shared_memory < needed:
        raise UserError(
            f"/dev/shm: {machine.shared_memory / 2**20:.0f} MiB are free, {num_processes} processes connect through "
            f"{needed / 2**20:.0f} MiB; in a container start it with --shm-size=1g"
        )


def check_nvme(path: str | None, part: str) -> None:
    """UserError where DeepSpeed could not swap to `nvme_path`: not there, not writable, or no libaio."""
    if not path or not Path(path).is_dir():
        raise UserError(f"{part}: nvme_path {path}: no such folder; make one on a local NVMe disk and name it")
    try:
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        raise UserError(f"{part}: nvme_path {path}: cannot be written ({error.strerror})") from error
    header = [Path(folder, "libaio.h").is_file() for folder in ("/usr/include", "/usr/local/include")]
    if not any(header):
        raise UserError(
            f"{part} to NVMe: DeepSpeed compiles against libaio, which is not here: install it (Debian, Ubuntu: apt "
            "install libaio-dev; Fedora: dnf install libaio-devel)"
        )
