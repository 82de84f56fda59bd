"""Bytes of a process in host memory, by phase and part.

Notation: P = parameters, L = trainable parameters, N = processes, b = bytes per weight.
"""

import math

from neoflix.model.shape import Shape
from neoflix.planning.settings import Settings
from neoflix.runtime.console import GIB

# Bytes of a process without a model: Python, torch 2.13, transformers, DeepSpeed and the tokenized data. Measured on
# the CPU (benchmarks/results/plan-cpu.jsonl), by bytes per weight; why fp32 takes more is not known. An estimate for
# processes with CUDA.
CPU_PROCESS = {2: 480 * 2**20, 4: 620 * 2**20}
CUDA_PROCESS = int(2.5 * GIB)


def host_memory(shape: Shape, settings: Settings) -> dict[str, dict[str, int]]:
    """Bytes of one process in host memory: {phase: {part: bytes}}. A node needs those of all its processes.

    An offloaded optimizer takes for a process's share L / N: fp32 weights and their gradients, 4 + 4, and a buffer of b
    for the updated weights, all pinned if the file sets it; the moments, 8, not pinned; with accumulation the
    accumulated gradients, b. Torch rounds each pinned buffer up to a power of two (CachingHostAllocator.h), unless
    PYTORCH_ALLOC_CONF sets pinned_max_round_threshold_mb. Loading reads all weights in every process.
    """
    P, L, b = shape.num_parameters, settings.num_trainable(shape), settings.weight_bytes
    own = {"Python, torch, DeepSpeed": CPU_PROCESS[b] if settings.is_cpu else CUDA_PROCESS}
    loading = own | {"weights being loaded": b * P}
    if settings.is_cpu and b == 2:
        loading["their file in fp32, mapped"] = 4 * P
    offloaded = _offloaded_optimizer(shape, settings) | _offloaded_weights(shape, settings)
    if settings.is_cpu:
        offloaded = {f"offloaded {part}": size for part, size in offloaded.items()}
    training = own | offloaded
    saving = training | {"weights being saved": 0 if settings.is_cpu else b * L}
    return {"load": loading, "train": training, "save": saving, "evaluate": training}


def _offloaded_optimizer(shape: Shape, settings: Settings) -> dict[str, int]:
    L, N, b, stage = settings.num_trainable(shape), settings.num_processes, settings.weight_bytes, settings.stage
    largest, share = settings.largest_trainable(shape), L * settings.offloaded_share / N
    match settings.offload("offload_optimizer"):
        case None:
            return {}
        case "nvme":
            count = settings.zero["offload_optimizer"].get("buffer_count", 4)
            sub_group = max(min(settings.bucket("sub_group_size", 10**9), L // N), largest // N)
            buffers, others = [4 * sub_group] * count + [b * L / N], 0
        case _ if stage == 3:
            buffers, others = [4 * share, b * L / N], settings.optimizer_bytes * share
        case _:
            buffers = [4 * share, 4 * share, b * share, b * largest]
            buffers += [b * share] if settings.accumulation > 1 else []
            others = (settings.optimizer_bytes - 4) * share
    is_pinned = _is_pinned(settings, "offload_optimizer")
    parts = {f"optimizer{', pinned' if is_pinned else ''}": int(sum(_sizes(settings, buffers, is_pinned)))}
    return parts | {"optimizer": int(others) + parts.get("optimizer", 0)}


def _offloaded_weights(shape: Shape, settings: Settings) -> dict[str, int]:
    if settings.offload("offload_param") != "cpu":
        return {}
    is_pinned = _is_pinned(settings, "offload_param")
    share = settings.weight_bytes * shape.num_parameters / settings.num_processes
    return {f"weights{', pinned' if is_pinned else ''}": int(sum(_sizes(settings, [share], is_pinned)))}


def _is_pinned(settings: Settings, part: str) -> bool:
    return bool(settings.zero[part].get("pin_memory")) and not settings.is_cpu


def _sizes(settings: Settings, buffers: list[float], is_pinned: bool) -> list[int]:
    """The sizes that torch allocates for buffers of these bytes."""
    if not (is_pinned and settings.rounds_pinned):
        return [int(size) for size in buffers]
    return [2 ** math.ceil(math.log2(size)) if size >= 1 else 0 for size in buffers]
