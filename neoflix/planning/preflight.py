"""Checks of the machine for what would otherwise end a run after it has begun."""

import importlib.util
import os
import re
import runpy
import shutil
import sysconfig
import tempfile
from pathlib import Path

from neoflix.arguments.deepspeed_file import COMPACT_ADAMW, is_compact, updates_in_backward
from neoflix.runtime.driver import check_capability, check_driver, dotted, output_of, torch_cuda
from neoflix.runtime.errors import UserError
from neoflix.runtime.hardware import Machine


def nvcc() -> str:
    """The compiler of the CUDA toolkit, where torch looks for it; it may not exist."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    return str(Path(home, "bin", "nvcc")) if home else shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"


def toolkit_cuda() -> tuple[int, ...]:
    """Version of the CUDA toolkit that DeepSpeed compiles with, or () if there is none."""
    match = re.search(r"release (\d+)\.(\d+)", output_of(nvcc(), "--version"))
    return tuple(int(part) for part in match.groups()) if match else ()


def prebuilt_operators(accelerator: str) -> set[str]:
    """Names of the operators that DeepSpeed was installed with (`DS_BUILD_AIO=1 pip install`, as in the Dockerfile) for
    an accelerator, "cuda" or "cpu". It compiles the others on first use. The file is the one that DeepSpeed decides by;
    importing DeepSpeed takes seconds."""
    package = importlib.util.find_spec("deepspeed")
    file = package and Path(package.origin).with_name("git_version_info_installed.py")
    installed = runpy.run_path(str(file)) if file and file.is_file() else {}
    if installed.get("accelerator_name") != accelerator:
        return set()
    return {name for name, is_installed in installed["installed_ops"].items() if is_installed}


def check_compact(machine: Machine, ds_config: dict, flags) -> None:
    """Raises UserError if the optimizer is `CompactAdamW` and cannot train this run: one that is not in bf16 or, with
    updates in the backward pass, has several batches in a step or several processes."""
    if updates_in_backward(ds_config):
        if flags.gradient_accumulation_steps > 1:
            raise UserError(
                f"--gradient_accumulation_steps {flags.gradient_accumulation_steps}: {flags.deepspeed} updates weights "
                "in the backward pass, so a step has one batch; use 1, or ds_configs/one_card.json"
            )
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise UserError(
                f"--deepspeed {flags.deepspeed}: updates weights in the backward pass, which works in one process; use "
                "--num_accelerators 1, or ds_configs/one_card.json"
            )
    has_bf16 = machine.has_gpu and machine.capability >= (8, 0)
    if not is_compact(ds_config) or flags.bf16 or (has_bf16 and not flags.fp16 and flags.bf16 is None):
        return
    name = f"{machine.device_name} (compute capability {dotted(machine.capability)})"
    way_out = "add --bf16 true" if has_bf16 or not machine.has_gpu else f"{name} has no bf16; use ds_config.json"
    raise UserError(f"--deepspeed: {COMPACT_ADAMW} trains weights in bf16; {way_out}")


def check_machine(machine: Machine, ds_config: dict, pinned_bytes: int, bf16: bool | None, num_processes: int) -> None:
    """Raises UserError for the first thing that would end the run after it has begun.

    Args:
        pinned_bytes: host memory that the processes of this node pin, by the plan.
        bf16: the flag; None if the device decides.
        num_processes: on this node.
    """
    check_compiler(ds_config, machine.has_gpu)
    zero = ds_config.get("zero_optimization", {})
    if machine.has_gpu:
        check_gpu(machine, ds_config, bf16, torch_cuda(), toolkit_cuda())
    check_locked_memory(machine, pinned_bytes)
    check_shared_memory(machine, num_processes)
    for part in parts_on_nvme(zero):
        check_nvme(zero[part].get("nvme_path"), part)


def parts_on_nvme(zero: dict) -> list[str]:
    """What a DeepSpeed file's `zero_optimization` offloads to NVMe."""
    return [part for part in ("offload_optimizer", "offload_param") if zero.get(part, {}).get("device") == "nvme"]


CPU_ADAM = "DeepSpeed compiles its CPU Adam"
TRITON = f"Triton compiles the kernel of {COMPACT_ADAMW}"


def check_compiler(config: dict, has_gpu: bool = False) -> None:
    """Raises UserError if the optimizer cannot be compiled, which happens on first use."""
    offload = config.get("zero_optimization", {}).get("offload_optimizer", {})
    if offload.get("device") in ("cpu", "nvme"):
        find_compiler()
        find_headers()
    if is_compact(config) and has_gpu:
        find_compiler(TRITON)
        find_headers(TRITON)


def find_compiler(what: str = CPU_ADAM) -> str:
    """The path of the compiler: of C++ for DeepSpeed, of C for Triton.

    Raises:
        UserError: there is none.
    """
    variable, *names = ("CC", "cc", "gcc", "clang") if what == TRITON else ("CXX", "c++", "g++")
    found = next(filter(None, map(shutil.which, filter(None, [os.environ.get(variable), *names]))), None)
    if found is None:
        raise UserError(
            f"{what} on first use and found no {'C' if what == TRITON else 'C++'} compiler: install one "
            "(Debian, Ubuntu: apt install g++; Fedora: dnf install gcc-c++)"
        )
    return found


def find_headers(what: str = CPU_ADAM) -> str:
    """The folder with Python's headers.

    Raises:
        UserError: there is none.
    """
    folder = sysconfig.get_path("include")
    if not Path(folder, "Python.h").is_file():
        raise UserError(
            f"{what} on first use and found no Python headers: install them "
            "(Debian, Ubuntu: apt install python3-dev; Fedora: dnf install python3-devel)"
        )
    return folder


def check_gpu(machine: Machine, ds_config: dict, bf16: bool | None, built: tuple, toolkit: tuple) -> None:
    """Raises UserError if torch or bf16 cannot use the GPU, or if DeepSpeed cannot compile what the file needs.

    Args:
        built, toolkit: CUDA version of torch and of the toolkit, (major, minor); () if there is none.
    """
    check_driver(machine.device_name, machine.driver, built)
    check_capability(machine.device_name, machine.capability, built)
    if bf16 and machine.capability < (8, 0):
        raise UserError(
            f"--bf16 true: {machine.device_name} (compute capability {dotted(machine.capability)}) has no "
            "bf16, which needs 8.0 (Ampere); leave --bf16 out to use fp16"
        )
    zero = ds_config.get("zero_optimization", {})
    for part in parts_on_nvme(zero):
        if not toolkit and "async_io" not in prebuilt_operators("cuda"):
            raise UserError(
                f"{part} to NVMe: DeepSpeed compiles its NVMe operator with the CUDA toolkit and found none: install "
                "it (CUDA_HOME names its folder), or offload to host memory (ds_configs/zero3_offload.json)"
            )
    optimizer = ds_config.get("optimizer", {})
    is_offloaded = "offload_optimizer" in zero
    compiles = optimizer.get("type", "").lower() in ("adam", "adamw") and not is_offloaded
    if compiles and not optimizer.get("params", {}).get("torch_adam"):
        if not toolkit:
            raise UserError(
                "DeepSpeed compiles its GPU Adam and found no CUDA toolkit (nvcc): install the one for CUDA "
                f'{dotted(built)}, or set "torch_adam": true in the optimizer\'s params of the DeepSpeed file'
            )
        if toolkit[0] != built[0]:
            raise UserError(
                f"DeepSpeed compiles its GPU Adam with CUDA {dotted(toolkit)}, and torch was built for "
                f'{dotted(built)}: install that toolkit (CUDA_HOME names its folder), or set "torch_adam": true in '
                "the optimizer's params of the DeepSpeed file"
            )


def check_locked_memory(machine: Machine, pinned_bytes: int) -> None:
    """Raises UserError if `ulimit -l` is too low for DeepSpeed's own pinning (DS_PIN_MEMORY_BACKEND=native: mlock).
    CUDA pins memory through its driver, which the limit does not apply to."""
    uses_mlock = os.environ.get("DS_PIN_MEMORY_BACKEND") == "native"
    if uses_mlock and machine.locked_memory is not None and machine.locked_memory < pinned_bytes:
        raise UserError(
            f"DS_PIN_MEMORY_BACKEND=native locks {pinned_bytes / 2**30:.1f} GiB, and `ulimit -l` allows "
            f"{machine.locked_memory / 2**30:.1f} GiB: raise it (`ulimit -l unlimited`), unset the variable, or "
            'set "pin_memory": false in the DeepSpeed file'
        )


def check_shared_memory(machine: Machine, num_processes: int) -> None:
    """Raises UserError if /dev/shm is too small for a run on GPUs.

    NCCL needs about 33 MB for each process of a node, if there are several (a container's default of 64 MB is not
    enough for three; NCCL documentation, "Troubleshooting: shared memory"). The process that prepares batches passes
    them on there: 50 KB each, for 2,100 tokens in three columns, and a few in advance.
    """
    if not machine.has_gpu or machine.shared_memory is None:
        return
    needed = num_processes * 33 * 2**20 if num_processes > 1 else 4 * 2**20
    if machine.shared_memory < needed:
        raise UserError(
            f"/dev/shm: {machine.shared_memory / 2**20:.0f} MiB are free, and {num_processes} process(es) need "
            f"{needed / 2**20:.0f} MiB; remove old files there, or start a container with --shm-size=1g"
        )


def check_nvme(path: str | None, part: str) -> None:
    """Raises UserError if DeepSpeed cannot swap to `nvme_path`: no such folder, not writable, or no libaio."""
    if not path or not Path(path).is_dir():
        raise UserError(f"{part}: nvme_path {path}: no such folder; use one on a local NVMe disk")
    try:
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        raise UserError(f"{part}: nvme_path {path}: cannot be written ({error.strerror})") from error
    if not has_libaio():
        raise UserError(
            f"{part} to NVMe: DeepSpeed needs libaio, which is not installed: install it (Debian, Ubuntu: apt "
            "install libaio-dev; Fedora: dnf install libaio-devel)"
        )


def has_libaio() -> bool:
    return any(Path(folder, "libaio.h").is_file() for folder in ("/usr/include", "/usr/local/include"))
