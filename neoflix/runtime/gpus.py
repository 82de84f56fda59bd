"""The GPUs that this process can use. The one place that asks for them.

Torch is asked where it is loaded: it alone knows what it can use. Elsewhere (`train.py --plan` must answer before torch
is imported) NVML is asked, the library of NVIDIA's driver. What NVML cannot tell goes to torch, which is imported for
it: a driver without NVML (containers with the capability "compute" only), MIG, memory shared with the host, and several
kinds of cards chosen by number (CUDA numbers them by speed, NVML by bus).
"""

import os
import re
import sys
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pynvml

# How torch 2.13 and later pin host memory for copies to a GPU: no more than was asked for, where it would round each
# buffer up to a power of two (40 GiB for the 25 of GPT-Neo-2.7B's offloaded optimizer). Buffers up to 8 MB are still
# rounded and used again. The two limits must be equal: a freed buffer that was cached but not rounded is handed out for
# larger requests of the same power of two and overflows (70 MiB for 120: ZeRO-3 with offload segfaults).
PINNED_MEMORY = "pinned_max_round_threshold_mb:8,pinned_max_cached_size_mb:8"


DRIVER_FILES = ("/dev/nvidiactl", "/dev/dxg")  # Linux; Windows' subsystem for Linux


@dataclass(frozen=True)
class Gpu:
    name: str
    memory: int  # bytes, all of it
    free: int  # bytes that no process holds
    capability: tuple[int, int]  # CUDA compute capability
    driver: tuple[int, ...] = ()  # its version; (): not known
    has_nvlink: bool = False
    shares_host_memory: bool = False


def read_gpus() -> list[Gpu]:
    """The GPUs that this process sees (CUDA_VISIBLE_DEVICES)."""
    gpus = None if "torch" in sys.modules else read_gpus_by_nvml()
    return _read_gpus_by_torch() if gpus is None else gpus


def read_gpus_by_nvml() -> list[Gpu] | None:
    """The GPUs by NVIDIA's driver, whether torch can use them or not; None where NVML cannot tell."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and not visible.strip():
        return []
    try:
        with _nvml():
            handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
            chosen = _choose(handles, visible)
            return None if chosen is None else [_read_gpu(handle) for handle in chosen]
    except (pynvml.NVMLError_LibraryNotFound, pynvml.NVMLError_DriverNotLoaded):
        return None if any(Path(file).exists() for file in DRIVER_FILES) else []
    except pynvml.NVMLError:
        return None


@contextmanager
def _nvml():
    pynvml.nvmlInit()
    try:
        yield
    finally:
        pynvml.nvmlShutdown()


def _choose(handles: list, visible: str | None) -> list | None:
    """Those that CUDA_VISIBLE_DEVICES leaves; None where only CUDA knows."""
    if any(_is_divided(handle) for handle in handles) or (visible or "").startswith("MIG-"):
        return None
    if visible is None:
        return handles
    by_number = not visible.startswith("GPU-")
    names = {pynvml.nvmlDeviceGetName(handle) for handle in handles}
    if by_number and len(names) > 1 and os.environ.get("CUDA_DEVICE_ORDER") != "PCI_BUS_ID":
        return None
    uuids = [pynvml.nvmlDeviceGetUUID(handle) for handle in handles]
    return [handles[i] for i in visible_devices(visible, uuids)]


def visible_devices(visible: str, uuids: list[str]) -> list[int]:
    """Indices of the devices that CUDA shows for a CUDA_VISIBLE_DEVICES of numbers or of beginnings of UUIDs.

    The first word that names no device ends the list; a device that is named twice empties it (CUDA C++ Programming
    Guide, "CUDA Environment Variables"; torch.cuda._parse_visible_devices reads it alike).
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
    with suppress(pynvml.NVMLError):  # most have none
        return pynvml.nvmlDeviceGetMigMode(handle)[0] == pynvml.NVML_DEVICE_MIG_ENABLE
    return False


def _read_gpu(handle) -> Gpu:
    memory = pynvml.nvmlDeviceGetMemoryInfo(handle)  # NVMLError_NotSupported where it is the host's
    return Gpu(
        pynvml.nvmlDeviceGetName(handle),
        memory.total,
        memory.free,
        tuple(pynvml.nvmlDeviceGetCudaComputeCapability(handle)),
        _driver(),
        _has_nvlink(handle),
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
        free, driver, has_nvlink = _ask_nvml_of(str(device.uuid))
        if device.is_integrated:
            free = device.total_memory  # what the host has free decides
        elif free is None:
            free = _ask_torch_for_free_memory(index, device.total_memory)
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


def _ask_nvml_of(uuid: str) -> tuple[int | None, tuple[int, ...], bool]:
    """(free bytes, the driver's version, whether there is NVLink) of a GPU or of a part of one (MIG)."""
    for kind in ("GPU", "MIG"):
        with suppress(pynvml.NVMLError), _nvml():
            handle = pynvml.nvmlDeviceGetHandleByUUID(f"{kind}-{uuid}")
            return pynvml.nvmlDeviceGetMemoryInfo(handle).free, _driver(), _has_nvlink(handle)
    return None, (), False


def _ask_torch_for_free_memory(index: int, total: int) -> int:
    """Only of this process's own device: to ask takes half a GiB of it."""
    import torch

    return torch.cuda.mem_get_info(index)[0] if index == int(os.environ.get("LOCAL_RANK", "0")) else total
