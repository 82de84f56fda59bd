"""`python -m neoflix.doctor`: what this machine has and lacks for training, in one table.

Torch is tried in a process of its own, so that the table appears where importing it fails.
"""

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from neoflix.arguments.command_line import SWITCH, Parser
from neoflix.planning.preflight import check_shared_memory, find_compiler, find_headers, has_libaio, nvcc, toolkit_cuda
from neoflix.runtime.console import GIB, printable
from neoflix.runtime.driver import (
    OLDEST_DRIVER,
    check_capability,
    check_driver,
    dotted,
    hides_gpus,
    install_command,
    read_driver,
    torch_cuda,
    torch_version,
)
from neoflix.runtime.early import run_without_torch
from neoflix.runtime.errors import UserError
from neoflix.runtime.gpus import (
    Gpu,
    check_visible_devices,
    divided_gpus,
    read_gpus,
    read_gpus_by_nvml,
    read_users,
)
from neoflix.runtime.hardware import (
    Machine,
    build_folder,
    find_container,
    read_cgroup_memory,
    read_machine,
    refuse_unusable_gpus,
)

OK, WARN, PROBLEM = "ok", "warn", "problem"
BUSY = 0.1  # share of a GPU's memory that other programs may hold: a desktop takes less
SMALL_DISK = 10 * GIB  # a run of GPT-Neo-125M keeps up to three checkpoints of 1.9 GiB


@dataclass(frozen=True)
class Row:
    name: str
    value: str
    status: str = OK
    remedy: str = ""  # one sentence


def check(name: str, test: Callable[[], str | None], value: str = "missing", status: str = PROBLEM) -> Row:
    """A row with what `test` returns, or else `value`. A UserError that it raises gives status and remedy."""
    try:
        return Row(name, test() or value)
    except UserError as error:
        return Row(name, value, status, str(error))


def examine() -> list[Row]:
    """The table's rows."""
    torch, can_import, torch_has_gpu = _torch()
    gpus = read_gpus_by_nvml()
    if gpus is None:  # only torch can tell
        gpus = read_gpus() if can_import else []
    driver = _driver(gpus)
    return [
        Row("Python", f"{platform.python_version()} ({sys.executable})"),
        torch,
        driver,
        *([] if driver.remedy or not can_import else [_gpus(gpus, torch_has_gpu)]),
        *(_gpu(gpu, gpus) for gpu in gpus),
        _visible_devices(gpus),
        *_links(gpus),
        *_compiler_rows(bool(gpus)),
        *_machine_rows(len(gpus)),
    ]


# ---- programs --------------------------------------------------------------------------------------------------------


def _torch() -> tuple[Row, bool, bool]:
    """(torch's row, whether it can be imported, whether it has a GPU)"""
    setup = "./launch.sh --setup-only installs what requirements.txt names"
    if not torch_version():
        return Row("torch", "not installed", PROBLEM, setup), False, False
    value = f"{dotted(torch_version())}, built {f'for CUDA {dotted(torch_cuda())}' if torch_cuda() else 'without CUDA'}"
    code = "import torch, sys; sys.exit(0 if torch.cuda.is_available() else 10)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if done.returncode in (0, 10):
        return Row("torch", value), True, done.returncode == 0
    error = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    command = install_command(read_driver())
    remedy = f"it cannot be imported ({error}); install it again: {command} --force-reinstall"
    return Row("torch", value, PROBLEM, remedy), False, False


def _compiler_rows(has_gpu: bool) -> list[Row]:
    """What DeepSpeed compiles with. On a CPU our set-ups compile nothing."""
    status = PROBLEM if has_gpu else WARN
    ninja = shutil.which("ninja", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
    remedy = "install what requirements.txt names: ./launch.sh --setup-only"
    return [
        check("C++ compiler", find_compiler, status=status),
        check("Python headers", find_headers, status=status),
        Row("ninja", ninja) if ninja else Row("ninja", "missing", status, remedy),
        Row("DeepSpeed's CPU Adam", _cpu_adam()),
        _toolkit(),
        Row("libaio", "found" if has_libaio() else "missing; only offload to NVMe needs it"),
    ]


def _cpu_adam() -> str:
    """Where it is: built with DeepSpeed, or compiled by an earlier run."""
    deepspeed, folder = importlib.util.find_spec("deepspeed"), build_folder()
    found = [*Path(deepspeed.origin).parent.glob("ops/adam/cpu_adam_op*.so")] if deepspeed else []
    found += folder.glob("cpu_adam/cpu_adam.so") if folder else []
    return str(found[0]) if found else "not compiled yet; the first run that offloads does it, once"


def _toolkit() -> Row:
    found, built = toolkit_cuda(), torch_cuda()
    if not found:
        return Row("CUDA toolkit", "none; only DeepSpeed's own GPU Adam and offload to NVMe need it")
    value = f"{dotted(found)} ({nvcc()})"
    if built and found[0] != built[0]:
        remedy = (
            f"only DeepSpeed's own GPU Adam and offload to NVMe need the one for CUDA {dotted(built)}: set CUDA_HOME"
        )
        return Row("CUDA toolkit", value, WARN, remedy)
    return Row("CUDA toolkit", value)


# ---- GPUs ------------------------------------------------------------------------------------------------------------


def _driver(gpus: list[Gpu]) -> Row:
    driver = read_driver() or (gpus[0].driver if gpus else ())
    if not driver:
        return Row("NVIDIA driver", "version not known" if gpus else "none")
    supported = [major for major, oldest in OLDEST_DRIVER.items() if driver >= oldest]
    value = f"{dotted(driver)}, for CUDA {max(supported, default='10')} and older"
    if hides_gpus(os.environ.get("CUDA_VISIBLE_DEVICES")):
        return Row("NVIDIA driver", value)
    name = gpus[0].name if gpus else "NVIDIA's GPU"
    return check("NVIDIA driver", lambda: check_driver(name, driver, torch_cuda()), value)


def _gpus(gpus: list[Gpu], torch_has_gpu: bool) -> Row:
    if torch_has_gpu:
        return Row("GPUs", f"{len(gpus)}")
    return check("GPUs", refuse_unusable_gpus, "torch finds none: runs use the CPU")


def _gpu(gpu: Gpu, gpus: list[Gpu]) -> Row:
    """A GPU with its memory, and who holds it."""
    number = gpus.index(gpu) if gpu.index is None else gpu.index
    value = f"{_describe(gpu)}, compute capability {dotted(gpu.capability)}"
    row = check(f"GPU {number}", lambda: check_capability(gpu.name, gpu.capability, torch_cuda()), value)
    if row.status != OK or not _is_busy(gpu):
        return row
    idle = ",".join(str(each.index) for each in gpus if not _is_busy(each) and each.index is not None)
    instead = f"use CUDA_VISIBLE_DEVICES={idle}" if idle else "take a smaller recipe (train.py --plan)"
    users = read_users(gpu.index) if gpu.index is not None else []
    users = users or ["processes that are not seen from here"]
    taken = f"{(gpu.memory - gpu.free) / GIB:.1f} GiB are taken by {', '.join(users)}"
    return replace(row, status=WARN, remedy=f"{taken}; end them, or {instead}")


def _describe(gpu: Gpu) -> str:
    return f"{gpu.name}, {gpu.memory / GIB:.1f} GiB, {gpu.free / GIB:.1f} free"


def _is_busy(gpu: Gpu) -> bool:
    return gpu.free < (1 - BUSY) * gpu.memory


def _visible_devices(gpus: list[Gpu]) -> Row:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return Row("CUDA_VISIBLE_DEVICES", "not set: every GPU")
    if hides_gpus(visible):
        has_driver = bool(read_driver())
        remedy = "unset it to use the GPU" if has_driver else ""
        return Row("CUDA_VISIBLE_DEVICES", f"{visible!r}: no GPU", WARN if has_driver else OK, remedy)
    row = check("CUDA_VISIBLE_DEVICES", check_visible_devices, visible)
    named = len(visible.split(","))
    if row.status == OK and 0 < len(gpus) < named:
        return replace(row, status=WARN, remedy=f"CUDA shows {len(gpus)} of {named}: it stops at a wrong or MIG name")
    return row


def _links(gpus: list[Gpu]) -> list[Row]:
    """NVLink and MIG, where they can be."""
    rows = []
    if len(gpus) > 1:
        is_linked = all(gpu.has_nvlink for gpu in gpus)
        rows.append(Row("NVLink", "yes" if is_linked else "no: GPUs exchange gradients over PCIe"))
    if divided := divided_gpus():
        numbers = ", ".join(map(str, divided))
        rows.append(Row("MIG", f"GPU {numbers} is divided; a run uses one part (CUDA_VISIBLE_DEVICES=MIG-...)"))
    return rows


# ---- memory and disk -------------------------------------------------------------------------------------------------


def _machine_rows(num_gpus: int) -> list[Row]:
    machine = replace(read_machine("results", use_cpu=True), num_devices=num_gpus)
    limits = read_cgroup_memory()
    source = ", by the limit of a container or job (cgroup)" if limits and min(limits) <= machine.host_memory else ""
    shared = "none" if machine.shared_memory is None else f"{machine.shared_memory / GIB:.2f} GiB free"
    locked = "no limit" if machine.locked_memory is None else f"{machine.locked_memory / 2**20:.0f} MiB"
    return [
        Row("host memory", f"{machine.host_memory / GIB:.1f} GiB free{source}"),
        check("/dev/shm", lambda: check_shared_memory(machine, max(num_gpus, 1)), shared),
        Row("ulimit -l", f"{locked}; matters with DS_PIN_MEMORY_BACKEND=native only"),
        _disk(machine),
        _wsl(machine),
        Row("container", find_container() or "no"),
    ]


def _disk(machine: Machine) -> Row:
    if machine.disk is None:
        return Row("disk", "size not known")
    value = f"{machine.disk / GIB:.1f} GiB free in {Path('results').absolute()}"
    if machine.disk < SMALL_DISK:
        return Row("disk", value, WARN, "free some, or name a folder on another disk: --output_dir")
    return Row("disk", value)


def _wsl(machine: Machine) -> Row:
    if not machine.is_wsl:
        return Row("WSL2", "no")
    remedy = (
        "Linux has a part of Windows' memory (raise `memory=` in %UserProfile%\\.wslconfig), and CUDA pins less of it "
        'than on Linux alone: if a run fails at its start, "pin_memory": false in the DeepSpeed file'
    )
    return Row("WSL2", "yes", WARN, remedy)


# ---- the program -----------------------------------------------------------------------------------------------------


def table(rows: list[Row]) -> str:
    """The rows as text; a row's remedy is a line below it."""
    lines = []
    for row in rows:
        lines.append(f"{row.status:8}{row.name:22}{row.value}".rstrip())
        lines += [f"{'':8}-> {row.remedy}"] if row.remedy else []
    return printable("\n".join(lines))


def gpu_lines() -> list[str]:
    """A line for each GPU that a run uses: its number ("-" if not known), name and memory.

    Raises:
        UserError: the machine has GPUs, and torch cannot use them.
    """
    gpus = read_gpus()
    if not gpus:
        refuse_unusable_gpus()
    for gpu in gpus:
        check_driver(gpu.name, gpu.driver, torch_cuda())
        check_capability(gpu.name, gpu.capability, torch_cuda())
    return [f"{'-' if gpu.index is None else gpu.index} {_describe(gpu)}" for gpu in gpus]


def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="python -m neoflix.doctor", description="Show what this machine has and lacks for training.")
    parser.add_argument("--gpus", **SWITCH, default=False, help="only the GPUs that a run uses, one in each line")
    if parser.parse_args(argv).gpus:
        print("\n".join(gpu_lines()))
        return
    rows = examine()
    print(table(rows))
    if any(row.status == PROBLEM for row in rows):
        sys.exit(UserError.exit_code)


if __name__ == "__main__":
    run_without_torch(main)
