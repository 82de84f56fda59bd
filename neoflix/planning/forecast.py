"""A run's plan: its memory, disk space and time, from the model's shape, the texts, the settings and the machine.

Memory is forecast by phase (loading, training, the optimizer's step, evaluation), and each phase by its parts; the
fullest phase has to fit. The formulas follow DeepSpeed 0.19.8 (deepspeed/runtime/zero/stage_1_and_2.py, stage3.py,
fp16/fused_optimizer.py, bf16_optimizer.py), the ZeRO papers (Rajbhandari et al., "ZeRO", 2020, section 3; Ren et al.,
"ZeRO-Offload", 2021) and this project's own attention and loss.
"""

from dataclasses import dataclass

from neoflix.arguments.deepspeed_file import TWO_PASSES
from neoflix.checkpoints.find import forecast_bytes
from neoflix.model.shape import Shape
from neoflix.planning.device_memory import device_memory
from neoflix.planning.host_memory import host_memory
from neoflix.planning.lengths import Texts
from neoflix.planning.settings import Settings
from neoflix.planning.throughput import (
    SMALL_PRODUCTS,
    cpu_flops,
    flops_per_token,
    peak_flops,
    recomputed_flops_per_token,
)
from neoflix.runtime.console import GIB
from neoflix.runtime.hardware import Machine

CUDA_CONTEXT = int(0.6 * GIB)

# Memory that torch's caching allocator holds in blocks it cannot use, as a share of what it allocates, for batches of
# different sizes: an upper bound. On a stand-in for the CUDA runtime, 2.7B with offload ran six steps of 64 texts in
# 3% more than it allocated; another measurement needed 8%.
FRAGMENTATION = 0.08


@dataclass(frozen=True)
class Plan:
    """A forecast, in bytes. `device` and `host` are one process's parts in its fullest phase, by name."""

    shape: Shape
    texts: Texts
    settings: Settings
    machine: Machine
    device_phases: dict[str, dict[str, int]]
    host_phases: dict[str, dict[str, int]]
    checkpoint_bytes: int
    run_bytes: int
    flops: float

    @property
    def device(self) -> dict[str, int]:
        return _fullest(self.device_phases)

    @property
    def host(self) -> dict[str, int]:
        return _fullest(self.host_phases)

    @property
    def device_bytes(self) -> int:
        return sum(self.device.values())

    @property
    def allocated_bytes(self) -> int:
        """The device memory that torch allocates, as in `torch.cuda.max_memory_allocated`."""
        return sum(size for part, size in self.device.items() if part not in ("CUDA itself", "fragmentation"))

    @property
    def host_bytes(self) -> int:
        """Host memory of all processes of a node."""
        return sum(self.host.values()) * self.settings.local_processes

    @property
    def pinned_bytes(self) -> int:
        """Host memory of a node that is pinned."""
        return sum(size for part, size in self.host.items() if "pinned" in part) * self.settings.local_processes

    def over_budget(self, spare: int = 0) -> list[tuple[str, int, int, str]]:
        """What the machine has too little of: (name, bytes needed, bytes available, largest part) for each.

        Args:
            spare: bytes of the device that are to stay free.
        """
        machine, found = self.machine, []
        device_free = machine.device_memory - machine.device_taken - spare
        if machine.has_gpu and self.device_bytes > device_free:
            found.append(("device memory", self.device_bytes, device_free, _largest(self.device)))
        if machine.shares_memory and self.device_bytes + self.host_bytes > machine.host_memory:
            needed = self.device_bytes + self.host_bytes
            found.append(("memory that GPU and host share", needed, machine.host_memory, _largest(self.device)))
        elif self.host_bytes > machine.host_memory:
            found.append(("host memory", self.host_bytes, machine.host_memory, _largest(self.host)))
        if machine.disk is not None and self.run_bytes > machine.disk:
            found.append(("disk", self.run_bytes, machine.disk, f"{self.settings.num_checkpoints} checkpoints"))
        return found

    @property
    def fits(self) -> bool:
        return not self.over_budget()

    def utilization(self, tokens_per_second: float) -> float | None:
        """Model FLOPs utilization (MFU): the model's own FLOPs as a share of the devices' peak. Recomputed activations
        and padding do not count. None if the peak is not known."""
        if (peak := self._peak_flops()) is None:
            return None
        settings = self.settings
        per_token = flops_per_token(*self.shape.products(self.texts.mean), is_lora=settings.lora_rank > 0)
        return tokens_per_second * per_token / (peak * settings.num_processes)

    def seconds(self) -> tuple[float, str] | None:
        """(seconds of training, source of the figure), or None if the device's peak is not known."""
        if not self.machine.has_gpu:
            has_small_products = self.settings.lora_rank and self.shape.model_type != "gpt_neo"
            flops = self.flops * (SMALL_PRODUCTS if has_small_products else 1)
            return flops / cpu_flops(self.machine.num_cores), "at the rate of two Xeon cores"
        if (peak := self._peak_flops()) is None:
            return None
        return self.flops / (peak * self.settings.num_processes), "lower bound: at the device's peak rate"

    def _peak_flops(self) -> float | None:
        machine = self.machine
        return peak_flops(machine.device_name, self.settings.weight_bytes) if machine.has_gpu else None


def _fullest(phases: dict[str, dict[str, int]]) -> dict[str, int]:
    return max(phases.values(), key=lambda parts: sum(parts.values()))


def _largest(parts: dict[str, int]) -> str:
    name = max(parts, key=parts.get)
    return f"{name} {parts[name] / GIB:.1f} GiB"


def forecast(shape: Shape, texts: Texts, settings: Settings, machine: Machine) -> Plan:
    """The plan of a run. Nothing is read: it depends on these values alone."""
    device_phases = device_memory(shape, settings)
    host_phases = host_memory(shape, settings)
    if settings.is_cpu:  # the device is the host
        process = {phase: host_phases["train"] | parts for phase, parts in device_phases.items()}
        device_phases, host_phases = {"train": {}}, process | {"load": host_phases["load"]}
    else:
        overhead = {"CUDA itself": CUDA_CONTEXT}
        device_phases = {
            phase: parts | overhead | {"fragmentation": int(FRAGMENTATION * sum(parts.values()))}
            for phase, parts in device_phases.items()
        }
    trainable = settings.num_trainable(shape)
    checkpoint = forecast_bytes(trainable, settings.weight_bytes, settings.is_compact)
    swapped = trainable * 16 // settings.num_processes * settings.local_processes
    swapped *= settings.offload("offload_optimizer") == "nvme"
    products = shape.products(texts.mean)
    per_token = flops_per_token(*products, is_lora=settings.lora_rank > 0)
    recomputed = settings.recomputed_layers / max(shape.num_layers, 1)
    per_token += recomputed * recomputed_flops_per_token(*products)
    per_token *= 2 if settings.updates_in_backward == TWO_PASSES else 1
    return Plan(
        shape,
        texts,
        settings,
        machine,
        device_phases,
        host_phases,
        checkpoint,
        max(checkpoint * settings.num_checkpoints, settings.weight_bytes * trainable) + swapped,
        settings.train_tokens * settings.padding * per_token,
    )
