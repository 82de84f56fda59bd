"""The settings of a run that decide how much memory and time it needs."""

import math
import os
from dataclasses import dataclass
from pathlib import Path

from neoflix.arguments.deepspeed_file import is_compact, is_json, updates_in_backward
from neoflix.checkpoints.find import COMPACT_BYTES
from neoflix.model.shape import Shape
from neoflix.planning.lengths import Texts
from neoflix.runtime.driver import torch_version
from neoflix.runtime.hardware import Machine
from neoflix.runtime.launcher import local_processes


@dataclass(frozen=True)
class Settings:
    """Settings from the flags and DeepSpeed's file. Sizes are of one process."""

    ds_config: dict
    ds_name: str
    weight_bytes: int  # 2 in bf16 and fp16, 4 in fp32
    batch_tokens: int  # most tokens in a batch, padding included
    eval_tokens: int
    accumulation: int
    num_processes: int
    local_processes: int  # on one node
    num_steps: int
    train_tokens: int  # of all processes, over all epochs
    recomputed_layers: int  # activation checkpointing, from the first layer on
    num_checkpoints: int  # on disk at the same time; 0: none is saved
    is_cpu: bool
    rounds_pinned: bool = True  # torch rounds pinned buffers up to a power of two
    batch_texts: int | None = None  # if batches are counted in texts
    lora_rank: int = 0  # 0: the whole model is trained
    budget: int | None = None  # if batches are counted in tokens
    padding: float = 1.0  # tokens computed for each real one
    is_fp16: bool = False  # by its flag

    def num_trainable(self, shape: Shape) -> int:
        """Parameters with gradients and optimizer states: all, or with LoRA two narrow matrices for each layer."""
        return self.lora_rank * shape.adapted if self.lora_rank else shape.num_parameters

    def largest_trainable(self, shape: Shape) -> int:
        """Elements of the largest trainable parameter: the embedding, or with LoRA the adapter of an MLP layer."""
        return self.lora_rank * shape.inner if self.lora_rank else shape.embedding

    @property
    def zero(self) -> dict:
        return self.ds_config.get("zero_optimization", {})

    @property
    def is_compact(self) -> bool:
        """Whether `CompactAdamW` trains the model."""
        return is_compact(self.ds_config)

    @property
    def updates_in_backward(self) -> bool | str:
        """Whether each gradient is freed as soon as it is there; TWO_PASSES if all are computed twice."""
        return updates_in_backward(self.ds_config)

    @property
    def stage(self) -> int:
        return self.zero.get("stage", 0)

    def offload(self, part: str) -> str | None:
        """Where `offload_optimizer` or `offload_param` goes: "cpu", "nvme" or None."""
        device = self.zero.get(part, {}).get("device")
        return device if device in ("cpu", "nvme") else None

    @property
    def offloaded_share(self) -> float:
        """Share of the optimizer that is offloaded: all, unless ZeRO-3's `ratio` keeps a part on the device."""
        if not self.offload("offload_optimizer"):
            return 0.0
        return self.zero["offload_optimizer"].get("ratio", 1.0) if self.stage == 3 else 1.0

    def bucket(self, name: str, default: int = 5 * 10**8) -> int:
        """A size in elements from DeepSpeed's file."""
        size = self.zero.get(name, default)
        return default if size == "auto" else int(size)

    @property
    def gradient_bytes(self) -> int:
        """Bytes per gradient where they are accumulated."""
        is_wide = self.ds_config.get("data_types", {}).get("grad_accum_dtype") in ("fp32", "float32")
        return 4 if is_wide else self.weight_bytes

    @property
    def optimizer_bytes(self) -> float:
        """Bytes per trainable parameter of AdamW's state: fp32 weights and two moments (ZeRO, section 3.1: "K = 12").

        In fp32 without ZeRO, and at stage 3 without offload, the model's weights are the fp32 weights: 8.
        `CompactAdamW`: three bytes, and two scales for each block.
        """
        if self.is_compact:
            return COMPACT_BYTES
        is_own_master = self.weight_bytes == 4 and (
            self.stage == 0 or (self.stage == 3 and not self.offload("offload_optimizer"))
        )
        return 8 if is_own_master else 12


def read_settings(flags, shape: Shape, texts: Texts, machine: Machine, ds_config: dict) -> Settings:
    """The settings of a run with these flags. Where no precision is set, a GPU has half precision and a CPU fp32."""
    is_cpu = not machine.has_gpu
    is_half = bool(flags.bf16 or flags.fp16) or (flags.bf16 is None and flags.fp16 is None and not is_cpu)
    num_processes = int(os.environ.get("WORLD_SIZE", "1"))
    accumulation, batch = flags.gradient_accumulation_steps, flags.per_device_train_batch_size
    budget = flags.tokens_per_device_batch
    is_packed = shape.is_packed
    batch_tokens = texts.of_budget(budget, is_packed) if budget else texts.of_batch(batch, is_packed)
    mean_tokens = min(budget or batch * texts.mean, max(texts.num_train * texts.mean, 1))
    steps_per_epoch = math.ceil(texts.num_train * texts.mean / (mean_tokens * accumulation * num_processes))
    num_steps = flags.max_steps if flags.max_steps > 0 else math.ceil(max(1, steps_per_epoch) * flags.num_train_epochs)
    num_checkpoints = 0 if flags.save_strategy == "no" else (flags.save_total_limit or 1) + 1
    return Settings(
        ds_config=ds_config,
        ds_name="{...}" if is_json(flags.deepspeed) else Path(flags.deepspeed).name,
        weight_bytes=2 if is_half else 4,
        batch_tokens=batch_tokens,
        batch_texts=None if budget else batch,
        budget=budget,
        padding=texts.padding(None if budget else batch, budget, is_packed),
        eval_tokens=texts.of_batch(flags.per_device_eval_batch_size, is_packed),
        accumulation=accumulation,
        num_processes=num_processes,
        local_processes=min(local_processes(), num_processes),
        num_steps=num_steps,
        train_tokens=int(num_steps * mean_tokens * accumulation * num_processes),
        recomputed_layers=count_layers(flags.activation_checkpointing or flags.gradient_checkpointing, shape),
        num_checkpoints=num_checkpoints,
        is_cpu=is_cpu,
        rounds_pinned=rounds_pinned(),
        lora_rank=flags.lora_rank if flags.lora else 0,
        is_fp16=bool(flags.fp16),
    )


def count_layers(recomputed: bool | int | str | None, shape: Shape) -> int:
    """The number of layers that --activation_checkpointing means; 'auto' is none until `choices.py` has decided."""
    if isinstance(recomputed, bool):
        return shape.num_layers if recomputed else 0
    return min(recomputed, shape.num_layers) if isinstance(recomputed, int) else 0


def rounds_pinned() -> bool:
    """Whether torch rounds pinned buffers up to a power of two. Since torch 2.13 `runtime/environment.py` turns that
    off, unless the user configures the allocator."""
    config = os.environ.get("PYTORCH_ALLOC_CONF") or os.environ.get("PYTORCH_CUDA_ALLOC_CONF")
    if config is None:
        return torch_version() < (2, 13)
    return "pinned_max_round_threshold_mb" not in config
