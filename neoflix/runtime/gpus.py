"""The GPUs that this process can use; nothing else looks for them.

If torch is loaded, it decides: it alone knows what it can use. Otherwise (`train.py --plan` must answer before torch is
imported) NVML decides, the library of NVIDIA's driver. Torch is imported only for what NVML cannot tell: a driver
without NVML (containers with the capability "compute" only), MIG, memory shared with the host, and several kinds of
cards chosen by number (CUDA numbers them by speed, NVML by bus).
"""

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pynvml

from neoflix.runtime.driver import hides_gpus
from neoflix.runtime.errors import UserError

# Makes torch 2.13 and later pin host memory in exact sizes. By default it rounds each buffer up to a power of two (40
# GiB instead of 25 for the offloaded optimizer of GPT-Neo-2.7B). Buffers up to 8 MB are still rounded and reused. The
# two limits must be equal: a freed buffer that was cached but not rounded is reused for larger requests of the same
# power of two and overflows (70 MiB for 120: ZeRO-3 with offload segfaults).
PINNED_MEMORY = "pinned_max_round_threshold_mb:8,pinned_max_cached_size_mb:8"


DRIVER_FILES = ("/dev/nvidiactl", "/usr/lib/wsl/lib/libcuda.so.1")  # Linux; Windows' subsystem for Linux


@dataclass(frozen=True)
class Gpu:
    name: str
    memory: int  # bytes in total
    free: int  # bytes that no process holds
    capability: tuple[int, int]  # CUDA compute capability
    driver: tuple[int, ...] = ()  # its version; () if not known
    has_nvlink: bool = False
    shares_host_memory: bool = False
    index: int | None = None  # its number in the order of the bus; None if not known


def read_gpus() -> list[Gpu]:
    """The GPUs that this process sees (CUDA_VISIBLE_DEVICES)."""
    gpus = None if "torch" in sys.modules else read_gpus_by_nvml()
    return _read_gpus_by_torch() if gpus is None else gpus


def read_gpus_by_nvml() -> list[Gpu] | None:
    """The GPUs that NVIDIA's driver shows, whether torch can use them or not; None if NVML cannot tell."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if hides_gpus(visible):
        return []
    try:
        with _nvml() as handles:
            chosen = _choose(handles, visible)
            return None if chosen is None else [_read_gpu(handles[i], i) for i in chosen]
    except (pynvml.NVMLError_LibraryNotFound, pynvml.NVMLError_DriverNotLoaded):
        return None if any(Path(file).exists() for file in DRIVER_FILES) else []
    except pynvml.NVMLError:
        return None


def check_visible_devices() -> None:
    """Raises UserError if CUDA_VISIBLE_DEVICES names no GPU of this machine, although there are some."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if hides_gpus(visible):
        return
    with suppress(pynvml.NVMLError), _nvml() as handles:
        if handles and _choose(handles, visible) == []:
            raise UserError(
                f"CUDA_VISIBLE_DEVICES={visible} names none of this machine's GPUs, which have the numbers 0 to "
                f"{len(handles) - 1} and the UUIDs that `nvidia-smi -L` lists; empty it to use the CPU"
            )


def divided_gpus() -> list[int]:
    """Numbers of the GPUs in MIG mode, in the order of the bus."""
    with suppress(pynvml.NVMLError), _nvml() as handles:
        return [i for i, handle in enumerate(handles) if _is_divided(handle)]
    return []


def read_users(index: int) -> list[str]:
    """The processes that compute or draw on a GPU, as "python (1234)", with the memory that each holds if the driver
    tells. In a container the processes of others are not seen, or have no names."""
    users = {}
    with suppress(pynvml.NVMLError), _nvml() as handles:
        for read in (pynvml.nvmlDeviceGetComputeRunningProcesses, pynvml.nvmlDeviceGetGraphicsRunningProcesses):
            with suppress(pynvml.NVMLError, pynvml.NVMLLibraryMismatchError):  # an older driver does not have both
                users |= {each.pid: each.usedGpuMemory for each in read(handles[index])}
    return [_name_of(pid) + (f" {held / 2**30:.1f} GiB" if held else "") for pid, held in users.items()]


def _name_of(pid: int) -> str:
    name = Path("/proc", str(pid), "comm")
    return f"{name.read_text().strip() if name.is_file() else 'process'} ({pid})"


@contextmanager
def _nvml() -> Iterator[list]:
    """Yields the handles of all GPUs, in the order of the bus."""
    pynvml.nvmlInit()
    try:
        yield [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
    finally:
        pynvml.nvmlShutdown()


def _choose(handles: list, visible: str | None) -> list[int] | None:
    """Numbers of the GPUs that CUDA_VISIBLE_DEVICES selects; None if only CUDA can tell."""
    if any(_is_divided(handle) for handle in handles) or (visible or "").startswith("MIG-"):
        return None
    if visible is None:
        return list(range(len(handles)))
    by_number = not visible.startswith("GPU-")
    names = {pynvml.nvmlDeviceGetName(handle) for handle in handles}
    if by_number and len(names) > 1 and os.environ.get("CUDA_DEVICE_ORDER") != "PCI_BUS_ID":
        return None
    uuids = [pynvml.nvmlDeviceGetUUID(handle) for handle in handles]
    return visible_devices(visible, uuids)


def visible_devices(visible: str, uuids: list[str]) -> list[int]:
    """Indices of the devices that CUDA shows for a CUDA_VISIBLE_DEVICES of numbers or prefixes of UUIDs.

    The first word that names no device ends the list; a device that is named twice empties it (CUDA C++ Programming
    Guide, "CUDA Environment Variables"; torch.cuda._parse_visible_devices does the same).
    """
    chosen = []
    for word in visible.split(","):
        if visible.startswith("GPU-"):
            found = [i for i, uuid in enumerate(uuids) if word.startswith("GPU-") and uuid.startswith(word.strip())]
        else:
            number = re.match(r"\s*\+?(\d+)", word)
            found = [int(number[1])] if number and int(number[1]) < len(uuids) else []
        if len(found) != 1:
            break
        if found[0] in chosen:
            return []
        chosen += found
    return chosen


def _is_divided(handle) -> bool:
    """Whether the GPU is in MIG mode."""
    with suppress(pynvml.NVMLError):  # most GPUs do not have it
        return pynvml.nvmlDeviceGetMigMode(handle)[0] == pynvml.NVML_DEVICE_MIG_ENABLE
    return False


def _read_gpu(handle, index: int) -> Gpu:
    memory = pynvml.nvmlDeviceGetMemoryInfo(handle)  # NVMLError_NotSupported if it is shared with the host
    return Gpu(
        pynvml.nvmlDeviceGetName(handle),
        memory.total,
        memory.free,
        tuple(pynvml.nvmlDeviceGetCudaComputeCapability(handle)),
        _driver(),
        _has_nvlink(handle),
        index=index,
    )


def _driver() -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", pynvml.nvmlSystemGetDriverVersion()))


def _has_nvlink(handle) -> bool:
    for link in range(pynvml.NVML_NVLINK_MAX_LINKS):
        try:
            if pynvml.nvmlDeviceGetNvLinkState(handle, link):
                return True
        except pynvml.NVMLError:  # no such link
            return False
    return False


def _read_gpus_by_torch() -> list[Gpu]:
    import torch

    if not torch.cuda.is_available():
        return []
    gpus = []
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        free, driver, has_nvlink = _read_by_nvml(str(device.uuid))
        if device.is_integrated:
            free = device.total_memory  # limited by what the host has free
        elif free is None:
            free = _read_free_memory_by_torch(index, device.total_memory)
        gpus.append(
            Gpu(
                device.name,
                device.total_memory,
                min(free, device.total_memory),
                (device.major, device.minor),
                driver,
                has_nvlink,
                bool(device.is_integrated),
            )
        )
    return gpus


def _read_by_nvml(uuid: str) -> tuple[int | None, tuple[int, ...], bool]:
    """(free bytes, the driver's version, whether it has NVLink) of a GPU or a part of one (MIG)."""
    for kind in ("GPU", "MIG"):
        with suppress(pynvml.NVMLError), _nvml():
            handle = pynvml.nvmlDeviceGetHandleByUUID(f"{kind}-{uuid}")
            return pynvml.nvmlDeviceGetMemoryInfo(handle).free, _driver(), _has_nvlink(handle)
    return None, (), False


def _read_free_memory_by_torch(index: int, total: int) -> int:
    """Free bytes of this process's own device, else all of them: asking takes half a GiB of a device."""
    import torch

    return torch.cuda.mem_get_info(index)[0] if index == int(os.environ.get("LOCAL_RANK", "0")) else total
