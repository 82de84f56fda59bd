"""The forecast of a run: memory, disk and time, from a model's shape, its texts, settings and a machine."""

import math
import os
from dataclasses import dataclass
from pathlib import Path

from neoflix.model.shape import Shape
from neoflix.planning.lengths import Texts
from neoflix.planning.memory import (
    Settings,
    device_memory,
    host_memory,
    optimizer_bytes,
)
from neoflix.planning.throughput import cpu_flops, flops_per_token, peak_flops, recomputed_flops_per_token
from neoflix.runtime.console import GIB
from neoflix.runtime.hardware import Machine, torch_version

CUDA_CONTEXT = int(0.6 * GIB)


# Torch's caching allocator holds more than it hands out, in blocks that fit nothing else: no more than this share,
# where the run's shapes differ from batch to batch. Not measured on a GPU yet.
FRAGMENTATION = 0.06


@dataclass(frozen=True)
class Plan:
    """A forecast. Bytes; `device` and `host` are one process's parts in its fullest phase, `phases` all of them."""

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
        """Of the device's, what torch hands out: what `torch.cuda.max_memory_allocated` shows."""
        return sum(size for part, size in self.device.items() if part not in ("CUDA itself", "fragmentation"))

    @property
    def host_bytes(self) -> int:
        """Of one node: all its processes."""
        return sum(self.host.values()) * self.settings.local_processes

    @property
    def pinned_bytes(self) -> int:
        """Of the node's host memory, locked into place."""
        return sum(size for part, size in self.host.items() if "pinned" in part) * self.settings.local_processes

    def over_budget(self) -> list[tuple[str, int, int, str]]:
        """(what, bytes needed, bytes there, its largest part) for each thing the machine has too little of."""
        machine, found = self.machine, []
        device_free = machine.device_memory - machine.device_taken
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
        """Model FLOPs utilization: the share of all devices' peak that the model's own products take. What is computed
        again (activation checkpointing) and padding do not count. None where the peak is not known."""
        if (peak := self._peak_flops()) is None:
            return None
        settings = self.settings
        per_token = flops_per_token(*self.shape.products(self.texts.mean), is_lora=settings.lora_rank > 0)
        return tokens_per_second * per_token / (peak * settings.num_processes)

    def seconds(self) -> tuple[float, str] | None:
        """(seconds of training, where the figure comes from); None where nothing is known of the device."""
        if not self.machine.has_gpu:
            return self.flops / cpu_flops(self.machine.num_cores), "by the rate of two Xeon cores"
        if (peak := self._peak_flops()) is None:
            return None
        return self.flops / (peak * self.settings.num_processes), "at least: the device's peak, never reached"

    def _peak_flops(self) -> float | None:
        machine = self.machine
        return peak_flops(machine.device_name, self.settings.weight_bytes) if machine.has_gpu else None


def _fullest(phases: dict[str, dict[str, int]]) -> dict[str, int]:
    return max(phases.values(), key=lambda parts: sum(parts.values()))


def _largest(parts: dict[str, int]) -> str:
    name = max(parts, key=parts.get)
    return f"{name} {parts[name] / GIB:.1f} GiB"


def forecast(shape: Shape, texts: Texts, settings: Settings, machine: Machine) -> Plan:
    """All of a run's needs, from plain numbers; nothing is read and nothing is asked."""
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
    # A checkpoint: what learns twice (safetensors, and DeepSpeed's own copy), and what the optimizer keeps.
    learning = settings.num_learning(shape)
    checkpoint = learning * (2 * settings.weight_bytes + optimizer_bytes(settings, on_disk=True))
    swapped = learning * 16 // settings.num_processes * settings.local_processes
    swapped *= settings.offload("offload_optimizer") == "nvme"
    products = shape.products(texts.mean)
    per_token = flops_per_token(*products, is_lora=settings.lora_rank > 0)
    if settings.recomputes:
        per_token += recomputed_flops_per_token(*products)
    return Plan(
        shape,
        texts,
        settings,
        machine,
        device_phases,
        host_phases,
        checkpoint,
        max(checkpoint * settings.num_checkpoints, settings.weight_bytes * learning) + swapped,
        settings.train_tokens * settings.padding * per_token,
    )


def _local_processes() -> int:
    names = ("LOCAL_SIZE", "LOCAL_WORLD_SIZE", "WORLD_SIZE")  # DeepSpeed's launcher, torchrun, anybody
    return int(next((os.environ[name] for name in names if name in os.environ), "1"))


def read_settings(args, shape: Shape, texts: Texts, machine: Machine, ds_config: dict, ds_name: str) -> Settings:
    """What of the arguments matters here. Precision left unsaid is what the machine has, as in a run."""
    is_cpu = not machine.has_gpu
    is_half = bool(args.bf16 or args.fp16) or (args.bf16 is None and args.fp16 is None and not is_cpu)
    num_processes = int(os.environ.get("WORLD_SIZE", "1"))
    accumulation = max(1, args.gradient_accumulation_steps)
    batch = max(1, args.per_device_train_batch_size)
    budget = args.tokens_per_device_batch
    packed = shape.is_gpt_neo
    batch_tokens = texts.of_budget(budget, packed) if budget else texts.of_batch(batch, packed)
    mean_tokens = min(budget or batch * texts.mean, max(texts.num_train * texts.mean, 1))
    steps_an_epoch = math.ceil(texts.num_train * texts.mean / (mean_tokens * accumulation * num_processes))
    num_steps = args.max_steps if args.max_steps > 0 else math.ceil(max(1, steps_an_epoch) * args.num_train_epochs)
    kept = 0 if args.save_strategy == "no" else (args.save_total_limit or 1) + 1
    return Settings(
        ds_config=ds_config,
        ds_name=Path(ds_name).name if not str(ds_name).lstrip().startswith("{") else "{...}",
        weight_bytes=2 if is_half else 4,
        batch_tokens=batch_tokens,
        batch_texts=None if budget else batch,
        budget=budget,
        padding=texts.padding(None if budget else batch, budget, packed),
        eval_tokens=texts.of_batch(max(1, args.per_device_eval_batch_size), packed),
        accumulation=accumulation,
        num_processes=num_processes,
        local_processes=min(_local_processes(), num_processes),
        num_steps=num_steps,
        train_tokens=int(num_steps * mean_tokens * accumulation * num_processes),
        recomputes=any(getattr(args, f"{name}_checkpointing", None) for name in ("activation", "gradient")),
        num_checkpoints=kept,
        is_cpu=is_cpu,
        rounds_pinned=rounds_pinned(),
        lora_rank=args.lora_rank if args.lora else 0,
    )


def rounds_pinned() -> bool:
    """Whether torch will round pinned buffers up to a power of two: `distributed.py` asks torch 2.13 and later not to,
    where the user has not said anything of the allocator."""
    said = os.environ.get("PYTORCH_ALLOC_CONF") or os.environ.get("PYTORCH_CUDA_ALLOC_CONF")
    if said is None:
        return torch_version() < (2, 13)
    return "pinned_max_round_threshold_mb" not in said
