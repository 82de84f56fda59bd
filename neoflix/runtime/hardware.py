"""The machine that a run starts on: memory, disk, cores, GPUs, driver.

Nothing here imports torch until it is needed, because its import takes longer than `--plan` may. `read_machine` reads
the machine; everything that decides takes the `Machine` it returns, so that a test can pass any machine.
"""

import importlib.util
import os
import re
import resource
import shutil
import subprocess
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from neoflix.runtime.errors import UserError
from neoflix.runtime.gpus import read_gpus, read_gpus_by_nvml

# Oldest driver for each CUDA a torch may be built with (NVIDIA, "CUDA Toolkit Release Notes", table "CUDA Toolkit
# and Minimum Required Driver Version for CUDA Minor Version Compatibility", Linux).
OLDEST_DRIVER = {11: (450, 80), 12: (525, 60), 13: (580, 0)}

USE_THE_CPU = "to use the CPU, empty CUDA_VISIBLE_DEVICES (train.py: --use_cpu true)"


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
    capability: tuple[int, int] = (0, 0)  # CUDA compute capability of the oldest GPU
    driver: tuple[int, ...] = ()
    is_linked: bool = False  # NVLink between the GPUs
    shares_memory: bool = False  # the GPU's memory is the host's
    locked_memory: int | None = None  # `ulimit -l`; None: no limit
    shared_memory: int | None = None  # free in /dev/shm

    @property
    def has_gpu(self) -> bool:
        return self.num_devices > 0


def read_machine(output_dir: str, use_cpu: bool = False) -> Machine:
    """Reads what this machine has free now, as this process sees it."""
    gpus = [] if use_cpu else read_gpus()
    disk = shutil.disk_usage(nearest_folder(output_dir))
    machine = Machine(
        host_memory=read_host_memory(),
        # /proc and the like have no size; nothing is written there
        disk=disk.free + checkpoint_bytes(output_dir) if disk.total else None,
        num_cores=len(os.sched_getaffinity(0)),
        locked_memory=_read_locked_memory(),
        shared_memory=shutil.disk_usage("/dev/shm").free if Path("/dev/shm").is_dir() else None,
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
        capability=min(gpu.capability for gpu in gpus),
        driver=smallest.driver,
        is_linked=len(gpus) > 1 and all(gpu.has_nvlink for gpu in gpus),
        shares_memory=smallest.shares_host_memory,
    )


def has_gpu() -> bool:
    """Whether torch can compute on a GPU.

    Raises:
        UserError: if NVIDIA's driver shows a GPU that torch cannot use; training on the CPU instead would take days.
    """
    import torch

    if torch.cuda.is_available():
        return True
    for gpu in read_gpus_by_nvml() or []:
        check_driver(gpu.name, gpu.driver, torch_cuda())
        raise UserError(f"{gpu.name}: torch cannot use it ({_why_not()}); {USE_THE_CPU}")
    return False


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
    free = [int(re.search(r"MemAvailable:\s+(\d+)", meminfo)[1]) * 1024]
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
    return max(min(free), 0)


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


def output_of(*words: str) -> str:
    """What a program prints; "" if it is missing or fails."""
    try:
        return subprocess.run(words, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


def checkpoint_bytes(output_dir: str) -> int:
    """Bytes of the checkpoints in a run's folder."""
    files = [path for path in Path(output_dir).glob("checkpoint-*/**/*") if path.is_file()]
    return sum(path.stat().st_size for path in files)


def _read_locked_memory() -> int | None:
    limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return None if limit == resource.RLIM_INFINITY else limit


def torch_version() -> tuple[int, ...]:
    return _torch_fact("__version__")


def _torch_fact(name: str) -> tuple[int, ...]:
    """The first two numbers of a line of torch's version.py, which imports nothing; () if there are none."""
    spec = importlib.util.find_spec("torch")
    text = Path(spec.origin).with_name("version.py").read_text() if spec else ""
    match = re.search(rf"^{name}\b.*=\s*'(\d+)\.(\d+)", text, re.MULTILINE)
    return tuple(int(part) for part in match.groups()) if match else ()


def torch_cuda() -> tuple[int, ...]:
    """The version of CUDA that torch was built with; () if it was built without."""
    return _torch_fact("cuda")


def check_driver(name: str, driver: tuple[int, ...], built: tuple[int, ...]) -> None:
    """Checks that torch was built with CUDA, and not with a newer one than the driver supports.

    Args:
        name: the GPU's.
        driver: its version; () if it is not known.
        built: the version of CUDA that torch was built with.
    """
    if not built:
        raise UserError(f"{name}: torch was built without CUDA; install one with CUDA (pytorch.org); {USE_THE_CPU}")
    oldest = OLDEST_DRIVER.get(built[0], ())
    if driver and driver < oldest:
        raise UserError(
            f"driver {dotted(driver)} is older than {dotted(oldest)}, the oldest for torch's CUDA {dotted(built)}; "
            f"update the driver or install a torch built for an older CUDA; {USE_THE_CPU}"
        )


def dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))
