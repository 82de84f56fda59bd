"""The machine that a run starts on: memory, disk, cores, GPUs, driver.

Nothing here imports torch until it is needed, because its import takes longer than `--plan` may. `read_machine` reads
the machine; everything that decides takes the `Machine` it returns, so that a test can pass any machine.
"""

import os
import re
import resource
import shutil
import sys
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from neoflix.runtime.driver import USE_THE_CPU, check_driver, read_driver, torch_cuda
from neoflix.runtime.errors import UserError
from neoflix.runtime.gpus import check_visible_devices, divided_gpus, read_gpus, read_gpus_by_nvml


@dataclass(frozen=True)
class Machine:
    """What a node has. Memory and disk are free bytes; `None` if they are not known."""

    host_memory: int  # available to this job: the kernel's MemAvailable, or less if a cgroup limits it
    disk: int | None  # free for the run's folder, including what its own checkpoints take already
    num_cores: int
    num_devices: int = 0  # GPUs; 0: the run trains on the CPU, in host memory
    device_name: str = "CPU"
    device_memory: int = 0  # of the smallest GPU, all of it
    device_taken: int = 0  # of that, held by other processes
    device_index: int | None = None  # its number in the order of the bus; None if not known
    capability: tuple[int, int] = (0, 0)  # CUDA compute capability of the oldest GPU
    driver: tuple[int, ...] = ()
    is_linked: bool = False  # NVLink between the GPUs
    shares_memory: bool = False  # the GPU's memory is the host's
    locked_memory: int | None = None  # `ulimit -l`; None: no limit
    shared_memory: int | None = None  # free in /dev/shm
    is_wsl: bool = False  # Windows' subsystem for Linux, a virtual machine with a part of the memory

    @property
    def has_gpu(self) -> bool:
        return self.num_devices > 0


def read_machine(output_dir: str, use_cpu: bool = False) -> Machine:
    """Reads what this machine has free now, as this process sees it.

    Raises:
        UserError: as `has_gpu`.
    """
    gpus = [] if use_cpu else read_gpus()
    if not gpus and not use_cpu:
        refuse_unusable_gpus()
    disk = shutil.disk_usage(nearest_folder(output_dir))
    machine = Machine(
        host_memory=read_host_memory(),
        # /proc and the like have no size; nothing is written there
        disk=disk.free + checkpoint_bytes(output_dir) if disk.total else None,
        num_cores=len(os.sched_getaffinity(0)),
        locked_memory=_read_locked_memory(),
        shared_memory=shutil.disk_usage("/dev/shm").free if Path("/dev/shm").is_dir() else None,
        is_wsl="microsoft" in Path("/proc/sys/kernel/osrelease").read_text().lower(),
    )
    if not gpus:
        return machine
    smallest = min(gpus, key=lambda gpu: gpu.free)
    return replace(
        machine,
        num_devices=len(gpus),
        device_name=smallest.name,
        device_memory=smallest.memory,
        device_taken=smallest.memory - smallest.free,
        device_index=smallest.index,
        capability=min(gpu.capability for gpu in gpus),
        driver=smallest.driver,
        is_linked=len(gpus) > 1 and all(gpu.has_nvlink for gpu in gpus),
        shares_memory=smallest.shares_host_memory,
    )


def has_gpu() -> bool:
    """Whether torch can compute on a GPU.

    Raises:
        UserError: if NVIDIA's driver shows a GPU that torch cannot use, or CUDA_VISIBLE_DEVICES names none of those
            that are there; training on the CPU instead would take days.
    """
    import torch

    if torch.cuda.is_available():
        return True
    refuse_unusable_gpus()
    return False


def refuse_unusable_gpus() -> None:
    """Raises UserError, where torch has no GPU, if the machine has one. Torch is imported only if it has."""
    check_visible_devices()
    gpus = read_gpus_by_nvml()
    if gpus == []:
        return
    name, driver = (gpus[0].name, gpus[0].driver) if gpus else ("NVIDIA's GPU", read_driver())
    check_driver(name, driver, torch_cuda())
    if divided := divided_gpus():
        raise UserError(
            f"GPU {', '.join(map(str, divided))} is divided into parts (MIG), and CUDA_VISIBLE_DEVICES names none that "
            f"torch can use: set it to a part's UUID, which `nvidia-smi -L` lists (MIG-...); {USE_THE_CPU}"
        )
    raise UserError(f"{name}: torch cannot use it ({_why_not()}); {USE_THE_CPU}")


def _why_not() -> str:
    import torch

    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return " ".join(str(error).split())[:200]
    return "torch.cuda.is_available() is false"


def nearest_folder(path: str) -> Path:
    """`path`, or the nearest folder above it that exists."""
    nearest = Path(path).absolute()
    while not nearest.is_dir():
        nearest = nearest.parent
    return nearest


def read_host_memory(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes that this process may still use: MemAvailable, or what its cgroup (version 1 or 2) and those above it
    leave. Cached pages of files count as free, because the kernel drops them first."""
    meminfo = (proc / "meminfo").read_text()
    available = int(re.search(r"MemAvailable:\s+(\d+)", meminfo)[1]) * 1024
    return max(min([available, *read_cgroup_memory(proc, cgroups)]), 0)


def read_cgroup_memory(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> list[int]:
    """The bytes that each cgroup of this process leaves, of those that set a limit."""
    free = []
    with suppress(OSError):
        for line in (proc / "self" / "cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and "memory" not in controllers.split(","):
                continue
            root, names = (
                (cgroups / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"))
                if controllers
                else (cgroups, ("memory.max", "memory.current", "inactive_file"))
            )
            folder = root / path.strip("/")
            for place in [folder, *folder.parents]:
                if root not in [place, *place.parents]:
                    break
                free += _read_cgroup(place, *names)
    return free


def _read_cgroup(folder: Path, limit_name: str, usage_name: str, cached_name: str) -> list[int]:
    """[the bytes that a cgroup leaves], or [] if it sets no limit."""
    try:
        limit = (folder / limit_name).read_text().strip()
        usage = int((folder / usage_name).read_text())
    except (OSError, ValueError):
        return []
    if limit == "max":
        return []
    with suppress(OSError):
        if match := re.search(rf"^{cached_name} (\d+)", (folder / "memory.stat").read_text(), re.MULTILINE):
            usage -= int(match[1])
    return [int(limit) - usage]


def checkpoint_bytes(output_dir: str) -> int:
    """Bytes of the checkpoints in a run's folder."""
    files = [path for path in Path(output_dir).glob("checkpoint-*/**/*") if path.is_file()]
    return sum(path.stat().st_size for path in files)


def _read_locked_memory() -> int | None:
    limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return None if limit == resource.RLIM_INFINITY else limit


def build_folder() -> Path | None:
    """The folder where torch keeps compiled operators; None: torch's own, in the home folder.

    In a virtual environment they belong to it: in a home folder that several environments share, each would find the
    other's and compile them again, a minute at each start.
    """
    if folder := os.environ.get("TORCH_EXTENSIONS_DIR"):
        return Path(folder)
    return Path(sys.prefix, "torch_extensions") if sys.prefix != sys.base_prefix else None


def find_container() -> str:
    """The kind of container that this process runs in; "" if none is known."""
    if {"APPTAINER_CONTAINER", "SINGULARITY_CONTAINER"} & os.environ.keys():
        return "apptainer"
    if "KUBERNETES_SERVICE_HOST" in os.environ:
        return "kubernetes"
    files = {"docker": "/.dockerenv", "podman": "/run/.containerenv"}
    return next((kind for kind, file in files.items() if Path(file).exists()), "")
