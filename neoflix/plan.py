"""What a run will take, before anything is loaded: device and host memory, disk, steps, time, and whether it fits.

`forecast` is a pure function of the model's shape, the texts' token counts, the run's settings and the machine. Memory
is forecast by phase (loading, training, the optimizer's step, evaluating), each phase by its parts; the phase that
takes most is what has to fit. The formulas follow DeepSpeed 0.19.8 (deepspeed/runtime/zero/stage_1_and_2.py, stage3.py,
fp16/fused_optimizer.py, bf16_optimizer.py), the ZeRO papers (Rajbhandari et al., "ZeRO", 2020, section 3; Ren et al.,
"ZeRO-Offload", 2021) and this project's own attention and loss.

No torch here, whose import takes longer than `--plan` may: what of it is needed for other models than GPT-Neo is
imported there.

Signs: P parameters, L those that learn (all, or LoRA's adapters), N processes, b bytes a weight, w width, V words of
the vocabulary, T tokens of a batch.
"""

import argparse
import hashlib
import json
import math
import os
import random
import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import NormalDist

from neoflix.cache import in_cache, new_path
from neoflix.console import accept_any_text, is_main_process, say
from neoflix.ds_config import ROOT, check_compiler, read_ds_config, set_values
from neoflix.errors import UserError
from neoflix.flags import check_numbers, check_writable
from neoflix.gpus import PINNED_MEMORY
from neoflix.hub_copies import find_hub_copy
from neoflix.machine import Machine, check_machine, read_machine, torch_version
from neoflix.output_dir import check_output_dir
from neoflix.paths import expand_paths
from neoflix.reading import NETFLIX_PATH, default_cache_dir, find_dataset, sample_texts
from neoflix.recipes import read_recipe
from neoflix.runs import read_texts_per_step
from neoflix.shapes import HUB_SHAPES, Shape, gpt_neo_shape, read_shape
from neoflix.tables import find_text_files
from neoflix.template import Template
from neoflix.throughput import cpu_flops, flops_per_token, peak_flops, recomputed_flops_per_token

GIB = 2**30

# Bytes. What a process takes by itself is measured on the CPU (Python, torch 2.13, transformers, deepspeed, the
# tokenised data; benchmarks/results/plan-cpu.jsonl). Of a process with CUDA neither share has been measured here yet.
CPU_PROCESS = {2: 480 * 2**20, 4: 620 * 2**20}  # by bytes a weight: fp32 takes more, why was not looked into
CUDA_PROCESS = int(2.5 * GIB)
CUDA_CONTEXT = int(0.6 * GIB)
# Torch's caching allocator holds more than it hands out, in blocks that fit nothing else: no more than this share,
# where the run's shapes differ from batch to batch. Not measured on a GPU yet.
FRAGMENTATION = 0.06
# LoRA on a CPU, other models than GPT-Neo: what adapters compute for a moment leaves holes in the memory. Two runs of a
# Llama of 135 million parameters held 1.92 and 1.93 times the activations that autograd keeps (1,200 tokens at once,
# and 32 texts at once).
ADAPTERS_ON_CPU = 1.9
LOSS_CHUNK = {"cuda": 2**26 * 4, "cpu": 2**20 * 4}  # fp32 logits that `loss.py` reads at a time

CHARS_PER_TOKEN = 4.8  # the 7,787 Netflix descriptions, GPT-2's tokenizer; special tokens left out
SAMPLE_TEXTS = 500


# ---- what the plan is made of ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Texts:
    """Token counts of the data, special tokens included."""

    num_train: int
    num_validation: int
    mean: float  # tokens a text
    deviation: float
    longest: int
    source: str  # where the counts come from

    def of_batch(self, num_texts: int, packed: bool = True) -> int:
        """Most tokens that a batch of so many texts is likely to have (mean and two deviations). Where texts are padded
        to the longest of their batch, one batch of each epoch has the longest of all."""
        num_texts = min(num_texts, max(self.num_train, 1))
        if not packed:
            return num_texts * self.longest
        likely = num_texts * self.mean + 2 * self.deviation * math.sqrt(num_texts)
        return math.ceil(min(likely, num_texts * self.longest))

    def of_budget(self, num_tokens: int, packed: bool) -> int:
        """Most tokens that a batch computes whose texts have so many: more where they are padded."""
        if packed:
            return num_tokens
        return self.of_batch(max(1, round(num_tokens / self.mean)), packed)

    def padding(self, num_texts: int | None, budget: int | None, packed: bool) -> float:
        """Tokens that are computed for each real one: the longest of a batch's texts by their mean, for lengths spread
        normally (the expected largest of n: Blom, 1958)."""
        if packed:
            return 1.0
        n = min(num_texts or max(1, round(budget / self.mean)), max(self.num_train, 1))
        longest = self.mean + self.deviation * NormalDist().inv_cdf((n - 0.375) / (n + 0.25))
        return min(longest, self.longest) / self.mean


@dataclass(frozen=True)
class Settings:
    """What of the arguments and of DeepSpeed's file decides over memory and time."""

    ds_config: dict
    ds_name: str
    weight_bytes: int  # 2 in bf16 and fp16, 4 in fp32
    batch_tokens: int  # most tokens a process takes at once, padding included
    eval_tokens: int
    accumulation: int
    num_processes: int
    local_processes: int  # of these, on one node
    num_steps: int
    train_tokens: int  # that the run reads, over all epochs
    recomputes: bool  # activation checkpointing
    num_checkpoints: int  # side by side on disk; 0: none is saved
    is_cpu: bool
    rounds_pinned: bool = True  # torch rounds pinned buffers up to a power of two
    batch_texts: int | None = None  # where a batch is counted in texts
    lora_rank: int = 0  # 0: the whole model learns
    budget: int | None = None  # where a batch is counted in tokens
    padding: float = 1.0  # tokens that are computed for each real one

    def num_learning(self, shape: Shape) -> int:
        """Parameters that have gradients and an optimizer: all or, with LoRA, two narrow matrices for each layer."""
        return self.lora_rank * shape.adapted if self.lora_rank else shape.num_parameters

    @property
    def zero(self) -> dict:
        return self.ds_config.get("zero_optimization", {})

    @property
    def stage(self) -> int:
        return self.zero.get("stage", 0)

    def offload(self, part: str) -> str | None:
        """Where `offload_optimizer` or `offload_param` goes: "cpu", "nvme" or None."""
        device = self.zero.get(part, {}).get("device")
        return device if device in ("cpu", "nvme") else None

    @property
    def gradient_bytes(self) -> int:
        wide = self.ds_config.get("data_types", {}).get("grad_accum_dtype") in ("fp32", "float32")
        return 4 if wide else self.weight_bytes


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

    def misfits(self) -> list[tuple[str, int, int, str]]:
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
        return not self.misfits()

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


# ---- the forecast ------------------------------------------------------------------------------------------


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


def optimizer_bytes(settings: Settings, on_disk: bool = False) -> int:
    """Bytes a parameter of AdamW's state: fp32 weights beside those in half precision, and two moments.

    12 (ZeRO, section 3.1: "K = 12"); in fp32 without ZeRO, or at stage 3 without offload, the weights themselves are
    the fp32 ones: 8. DeepSpeed's bf16 master weights and states: 2 + 4.
    """
    block = settings.ds_config.get("bf16", {})
    master = 2 if block.get("bf16_master_weights_and_grads") else 4
    moments = 4 if block.get("bf16_optimizer_states") else 8
    is_own_master = settings.weight_bytes == 4 and (
        settings.stage == 0 or (settings.stage == 3 and not settings.offload("offload_optimizer"))
    )
    if is_own_master and not on_disk:
        master = 0
    return master + moments


def activation_bytes(shape: Shape, settings: Settings, num_tokens: int) -> int:
    """What the forward pass keeps for the backward pass, the logits left out.

    Of each layer and token, in tensors of the width: the input of both layer norms and their results (4), query, key,
    value and the attention's result (4; elsewhere than on CUDA the texts are taken apart, which copies the result), and
    five of the MLP's inner width (its input, three steps of the tanh form of GELU, and its result): 28 widths for
    GPT-Neo. Counted with autograd's saved-tensor hooks, which `tests/test_plan.py` does again. With checkpointing one
    width a layer, and one layer in full while it is worked out again (Chen et al., 2016). Besides: the embedding and
    the last norm. With LoRA the same, since every adapter keeps what goes into its layer, and what its first matrix
    makes of that. Of other models the layers are counted likewise, when their shape is read.
    """
    copies = 1.4 if settings.is_cpu else 0  # the copy, and what padding to the longest of a group adds
    layer = (8 + copies) * shape.width + 5 * shape.inner
    if counted := shape.kept_bytes[settings.weight_bytes // 4]:
        layer = counted / settings.weight_bytes / shape.num_layers
        layer *= ADAPTERS_ON_CPU if settings.is_cpu and settings.lora_rank else 1
    layer += settings.lora_rank * shape.num_linear / max(shape.num_layers, 1)
    kept = layer + shape.num_layers * shape.width if settings.recomputes else shape.num_layers * layer
    return int(num_tokens * settings.weight_bytes * (kept + 2 * shape.width))


def loss_bytes(shape: Shape, settings: Settings, num_tokens: int) -> int:
    """The logits, which become their own gradient, and two fp32 pieces of them (`loss.py`); for other models than
    GPT-Neo, Hugging Face's loss: logits, fp32 copy, log-softmax and the gradients of both."""
    logits = num_tokens * shape.vocab_size
    if not shape.is_gpt_neo:
        return logits * (2 * settings.weight_bytes + 12)
    piece = min(logits * 4, LOSS_CHUNK["cpu" if settings.is_cpu else "cuda"])
    return logits * settings.weight_bytes + 2 * piece


def device_memory(shape: Shape, settings: Settings) -> dict[str, dict[str, int]]:
    """Bytes of one process on its device: {phase: {part: bytes}}.

    Weights: b P, at stage 3 b P / N and the layers that are gathered (stage3_max_live_parameters, the prefetch
    bucket; the embedding, always whole). Optimizer: 12 L, from stage 1 on 12 L / N, offloaded nothing (Twin-Flow:
    the share beyond `ratio`). Gradients: b L; from stage 2 on b L / N; offloaded only what is on its way.
    """
    L, N, b, stage = settings.num_learning(shape), settings.num_processes, settings.weight_bytes, settings.stage
    P = shape.num_parameters + (L if settings.lora_rank else 0)
    offloaded = settings.offload("offload_optimizer")
    share = settings.zero.get("offload_optimizer", {}).get("ratio", 1.0) if offloaded and stage == 3 else 1.0
    on_device = (1 - share) if offloaded else 1.0

    parts = {"weights": b * P}
    if stage == 3:
        live = settings.zero.get("stage3_max_live_parameters", 10**9) + _bucket(settings, "stage3_prefetch_bucket_size")
        gathered = min(P, max(live, shape.embedding + shape.layer_parameters))
        parts["weights"] = 0 if settings.offload("offload_param") else b * P // N
        parts["gathered layers"] = b * gathered
    parts["optimizer"] = int(on_device * optimizer_bytes(settings) * L / (N if stage else 1))
    parts |= {"buffers": _buffers(shape, settings)}

    gradients, copies = _gradients(shape, settings, on_device)
    activations = activation_bytes(shape, settings, settings.batch_tokens)
    loss = loss_bytes(shape, settings, settings.batch_tokens)
    # Tied to the head: one gradient comes at the beginning of the backward pass and waits for the other at its end.
    embedding = {"gradients of the embedding": 0 if settings.lora_rank else (1 + shape.is_tied) * b * shape.embedding}
    working = {"activations": activations, "loss": loss}
    if settings.is_cpu:
        parts |= _kept_by_the_cpu(shape, settings)
        if b == 4:
            if shape.is_gpt_neo:  # padded batches differ too much in size
                # Freed memory is kept, in pieces: gradients find room where activations were, if these were the larger.
                grown = gradients + (0 if settings.lora_rank else b * shape.embedding)
                working["room used twice"] = -min(grown, max(0, activations + loss - grown))
            return {"train": parts | {"gradients": gradients + copies} | embedding | working}
    beginning = parts | {"gradients": gradients if settings.accumulation > 1 else 0} | embedding | working
    end = parts | {"gradients": gradients} | embedding
    step = parts | {"gradients": gradients, "gradients' fp32 copies": copies}
    evaluation = parts | {"loss": loss_bytes(shape, settings, settings.eval_tokens)}
    phases = {"train": beginning, "backward's end": end, "step": step, "evaluate": evaluation}
    if stage == 2 and not offloaded and settings.gradient_bytes != b:
        reduction = _first_reduction(shape, settings, activations)
        phases["first reduction"] = parts | {"gradients": gradients} | reduction
    if offloaded and stage in (1, 2):  # DeepSpeed flattens the weights, and clones the process's share
        phases["start"] = {"weights": b * P, "weights, flattened": b * L // N}
    return phases


def _first_reduction(shape: Shape, settings: Settings, activations: int) -> dict[str, int]:
    """What there is besides when ZeRO-2 reduces its first bucket of gradients to be summed up in another dtype: it
    allocates its whole share of them then, and flattens the bucket. Of the activations those are gone whose layers
    filled the bucket; of the embedding's two gradients the head's is there."""
    b, bucket = settings.weight_bytes, min(_bucket(settings, "reduce_bucket_size"), settings.num_learning(shape))
    in_layers = settings.num_learning(shape) - (0 if settings.lora_rank else shape.embedding)
    share = 0 if settings.recomputes else min(1.0, bucket / max(in_layers, 1))
    return {
        "activations": int(activations * (1 - share)),
        "gradients of the embedding": 0 if settings.lora_rank else b * shape.embedding,
        "flattened bucket": b * bucket,
    }


def _kept_by_the_cpu(shape: Shape, settings: Settings) -> dict[str, int]:
    """What only a CPU's memory holds besides, by the measurements in benchmarks/results/plan-cpu.jsonl.

    Without ZeRO fp32 weights stay mapped from their file, the embedding twice, as it is grown; at stage 3 it is whole
    before and after. With LoRA it stays mapped at stages 1 and 2 too, where DeepSpeed copies only what learns. What
    processes exchange gloo copies. With offload in bf16 the largest gradient is cast twice, and
    the buckets' room is not used again (one configuration measured).
    """
    kept, embedding = {}, settings.weight_bytes * shape.embedding
    if settings.stage == 3:
        kept["embedding, as it was grown"] = 2 * embedding
    elif settings.weight_bytes == 4 and (settings.stage == 0 or settings.lora_rank):
        kept["embedding, as it was grown"] = embedding
    if settings.num_processes > 1 and settings.stage:
        bucket = min(_bucket(settings, "reduce_bucket_size"), settings.num_learning(shape))
        kept["exchange"] = settings.weight_bytes * bucket
    if settings.weight_bytes == 2 and settings.stage in (1, 2) and settings.offload("offload_optimizer"):
        kept["gradients' fp32 copies, buckets again"] = (
            8 * shape.embedding + _buffers(shape, settings) - 2 * shape.embedding
        )
    return kept


def _bucket(settings: Settings, name: str, default: int = 5 * 10**8) -> int:
    size = settings.zero.get(name, default)
    return default if size == "auto" else int(size)


def _buffers(shape: Shape, settings: Settings) -> int:
    """Reduce buckets, two where communication overlaps (at stage 3 one); with offload a gradient in transit.

    torch.empty takes all of a bucket on a GPU; of the host's memory only what is written.
    """
    if settings.stage == 0:
        return 0
    bucket = _bucket(settings, "reduce_bucket_size")
    if settings.is_cpu:
        bucket = min(bucket, settings.num_learning(shape))
    overlaps = settings.zero.get("overlap_comm", settings.stage == 3) and settings.stage < 3
    transit = _largest_learning(shape, settings) if settings.offload("offload_optimizer") and settings.stage < 3 else 0
    return settings.weight_bytes * (bucket * (2 if overlaps else 1) + transit)


def _largest_learning(shape: Shape, settings: Settings) -> int:
    """Elements of the largest parameter that learns: the embedding or, with LoRA, the MLP's adapter."""
    return settings.lora_rank * shape.inner if settings.lora_rank else shape.embedding


def _gradients(shape: Shape, settings: Settings, on_device: float) -> tuple[int, int]:
    """(bytes of the gradients that a step works with, bytes of their copies while it does), on the device.

    Stage 0 in half precision casts all of them to fp32 and flattens the copies (fused_optimizer.py); stages 1 and 2
    flatten this process's share and cast it, unless they are summed up in fp32 in the first place (18 instead of 22
    bytes a parameter with one process); stage 3 casts a sub-group at a time.
    """
    P, N, b, stage = settings.num_learning(shape), settings.num_processes, settings.weight_bytes, settings.stage
    wide = settings.gradient_bytes
    if stage == 0:
        return b * P, 8 * P if b == 2 else 0
    if stage == 3:
        sub_group = min(_bucket(settings, "sub_group_size", 10**9), P // N)
        resident = 0 if settings.offload("offload_optimizer") == "cpu" and on_device == 0 else wide * P // N
        return int(resident + 4 * on_device * P / N), 4 * sub_group
    if settings.offload("offload_optimizer"):
        return 0, 0
    if stage == 1 and wide == 4 and b == 2:  # BF16_Optimizer
        return (b + 4) * P, 0
    kept = b * P if stage == 1 else wide * P // N
    return kept, 0 if wide == 4 and b == 2 else (b + (4 if b == 2 else 0)) * P // N


def host_memory(shape: Shape, settings: Settings) -> dict[str, dict[str, int]]:
    """Bytes of one process in host memory: {phase: {part: bytes}}; a node's are those of all its processes.

    Offloaded, a process's share L / N takes: fp32 weights and their gradients, 4 + 4, and a buffer of b for the updated
    weights, all pinned where the file says so; the moments, 8, unpinned; with accumulation the gradients so far, b.
    Torch rounds each pinned buffer up to a power of two (CachingHostAllocator.h), unless PYTORCH_ALLOC_CONF sets
    pinned_max_round_threshold_mb. Loading reads all weights in every process.
    """
    P, N, b, stage = shape.num_parameters, settings.num_processes, settings.weight_bytes, settings.stage
    L, largest = settings.num_learning(shape), _largest_learning(shape, settings)
    own = {"Python, torch, DeepSpeed": CPU_PROCESS[b] if settings.is_cpu else CUDA_PROCESS}
    loading = own | {"weights being loaded": b * P}
    if settings.is_cpu and b == 2:
        loading["their file in fp32, mapped"] = 4 * P
    offloaded, states = settings.offload("offload_optimizer"), {}
    sizes, loose = [], 0
    if offloaded == "cpu":
        ratio = settings.zero["offload_optimizer"].get("ratio", 1.0) if stage == 3 else 1.0
        share = L * ratio / N
        half = 2 if settings.ds_config.get("bf16", {}).get("bf16_master_weights_and_grads") else 4
        master = half * share
        if stage == 3:
            sizes, loose = [half * share, b * L / N], master
        else:
            sizes = [master, half * share, b * share, b * largest]
            sizes += [b * share] if settings.accumulation > 1 else []
        loose += (optimizer_bytes(settings) - half) * share
    elif offloaded == "nvme":
        count = settings.zero["offload_optimizer"].get("buffer_count", 4)
        sub_group = max(min(_bucket(settings, "sub_group_size", 10**9), L // N), largest // N)
        sizes = [4 * sub_group] * count + [b * L / N]
    is_pinned = bool(settings.zero.get("offload_optimizer", {}).get("pin_memory")) and not settings.is_cpu
    if offloaded:
        states[f"optimizer{', pinned' if is_pinned else ''}"] = int(sum(_pinned(settings, sizes, is_pinned)))
        states["optimizer"] = int(loose) + states.get("optimizer", 0)
    if settings.offload("offload_param") == "cpu":
        is_pinned = bool(settings.zero["offload_param"].get("pin_memory")) and not settings.is_cpu
        states[f"weights{', pinned' if is_pinned else ''}"] = int(sum(_pinned(settings, [b * P / N], is_pinned)))
    if settings.is_cpu:
        states = {f"offloaded {part}": size for part, size in states.items()}
    training = own | states
    saving = training | {"weights being saved": 0 if settings.is_cpu else b * L}
    return {"load": loading, "train": training, "save": saving, "evaluate": training}


def _pinned(settings: Settings, sizes: list[float], is_pinned: bool) -> list[int]:
    if not (is_pinned and settings.rounds_pinned):
        return [int(size) for size in sizes]
    return [2 ** math.ceil(math.log2(size)) if size >= 1 else 0 for size in sizes]


# ---- from arguments ----------------------------------------------------------------------------------------


def plan_run(args, must_fit: bool = True) -> Plan | None:
    """The plan of a run by its arguments, choices made: `--deepspeed auto` and `--tokens_per_device_batch auto` become
    what they stand for in `args`. None for a model whose shape is not to be found (loading it will say why).

    Raises:
        UserError: where the run would not fit, if it must, or could not come to its end: the plan's table, and what
            to change.
    """
    machine = _stand_in(read_machine(args.output_dir, bool(args.use_cpu)), args)
    shape = read_shape(args.model_name_or_path)
    if shape is None:
        if args.plan or "auto" in (args.deepspeed, args.tokens_per_device_batch):
            raise UserError(
                f"--model_name_or_path {args.model_name_or_path}: has no config.json here, so that there is no plan; "
                "name a folder that has one, or a model of the hub that was downloaded"
            )
        return None
    if args.max_length:
        shape = replace(shape, window=min(shape.window, args.max_length))
    texts = count_texts(args, shape)

    if args.deepspeed == "auto":
        chosen, passed_over = choose_ds_config(args, shape, texts, machine)
        args.deepspeed = str(ROOT / chosen)
        say("\n".join([*passed_over, f"--deepspeed auto: {chosen}, the fastest that fits"]))
    ds_config = read_ds_config(args.deepspeed)
    if args.tokens_per_device_batch == "auto":
        args.tokens_per_device_batch = choose_batch(args, shape, texts, machine, ds_config)
        say(f"--tokens_per_device_batch auto: {args.tokens_per_device_batch}")
    plan = forecast(shape, texts, read_settings(args, shape, texts, machine, ds_config, args.deepspeed), machine)
    if must_fit and not plan.fits:
        if args.plan_must_fit:
            raise UserError(explain(plan) + "\n  or --plan_must_fit false, which tries it all the same")
        say("warning: by its plan this run does not fit; trying it all the same (--plan_must_fit false)")
    if must_fit and not (args.plan_device_memory or args.plan_host_memory):
        check_machine(machine, ds_config, plan.pinned_bytes, args.bf16, plan.settings.local_processes)
    return plan


def parse_bytes(text: str | None, flag: str) -> int | None:
    """'24GiB', '64 GB', '512M' -> bytes; a bare number is GiB."""
    if text is None:
        return None
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)(B?)\s*", str(text), re.IGNORECASE)
    if match is None:
        raise UserError(f"--{flag} {text}: must be a size, such as 24GiB")
    number, unit, is_binary, byte = match.groups()
    base = 1000 if byte and not is_binary and unit else 1024
    return int(float(number) * base ** ("KMGT".index((unit or "G").upper()) + 1))


def _stand_in(machine: Machine, args) -> Machine:
    """The machine, with the memory that `--plan_device_memory` and `--plan_host_memory` put in its place."""
    device = parse_bytes(args.plan_device_memory, "plan_device_memory")
    host = parse_bytes(args.plan_host_memory, "plan_host_memory")
    if (device or host) and not args.plan:
        raise UserError("--plan_device_memory and --plan_host_memory stand in for hardware: they go with --plan only")
    if device:
        num_devices = _local_processes()
        name = f"a card of {device / GIB:.0f} GiB"
        machine = replace(machine, num_devices=num_devices, device_name=name, device_memory=device, device_taken=0)
        machine = replace(machine, capability=(8, 0))
    if host:
        machine = replace(machine, host_memory=host)
    return replace(machine, disk=None) if device or host else machine  # nor is this machine's disk the one meant


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


# ---- the texts' tokens -------------------------------------------------------------------------------------


def count_texts(args, shape: Shape) -> Texts:
    """Tokens of the data: those that an earlier run counted, else estimated from the file's first rows."""
    path = _counts_file(args, shape.window)
    with in_cache(_cache_dir(args)):
        if path and path.is_file():
            return Texts(**json.loads(path.read_text()), source="counted by an earlier run")
    return estimate_texts(_find_data(args), args, shape.window)


def remember_counts(args, window: int, lengths_N, num_validation: int) -> None:
    """Keeps the token counts of the texts to learn from, int [texts], for the plans to come. One process."""
    if path := _counts_file(args, window):
        counts = {
            "num_train": len(lengths_N),
            "num_validation": num_validation,
            "mean": float(lengths_N.mean()),
            "deviation": float(lengths_N.std()),
            "longest": int(lengths_N.max()),
        }
        with in_cache(path.parent), new_path(path) as unfinished:  # another run may be reading it
            unfinished.write_text(json.dumps(counts))


def _find_data(args) -> Path | None:
    """The file of `--dataset`, where it is here already: nothing is downloaded for a plan."""
    if args.dataset.startswith("hf:"):
        return find_hub_copy(args.dataset, _cache_dir(args))
    if args.dataset == "netflix" and not NETFLIX_PATH.is_file():
        return None
    return find_dataset(args.dataset)


COUNTS_FORMAT = 3  # raised when the same file may be read as other texts than before


def _counts_file(args, window: int) -> Path | None:
    """Where the counts of these texts are kept: by file (of a folder, every file in it), column, template, held-out
    share, window and tokenizer (the model's name). None where the data is not on this machine."""
    data = _find_data(args)
    if data is None:
        return None
    files = find_text_files(data) if data.is_dir() else [data]
    states = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    key = [COUNTS_FORMAT, states, args.validation_fraction, window]
    key += [args.text_column, args.template, str(args.model_name_or_path)]
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:24]
    return _cache_dir(args) / f"counts-{digest}.json"


def _cache_dir(args) -> Path:
    return Path(args.cache_dir) if args.cache_dir else default_cache_dir()


def estimate_texts(path: Path | None, args, window: int) -> Texts:
    """From the first texts of the file: rows by the file's size, tokens by the model's own tokenizer or, where that is
    not here, by characters. Without a file: what the Netflix descriptions have."""
    if path is None:
        is_netflix = args.dataset == "netflix"
        netflix = "figures of the Netflix descriptions, as published"
        source = netflix if is_netflix else f"a guess: {args.dataset} is not on this machine yet; {netflix}"
        return Texts(7008, 779, 31.8, 4.4, 64, source)
    template = Template(args.template) if args.template else None
    texts, num_texts = sample_texts(path, args.text_column, template, 4 * SAMPLE_TEXTS)
    chosen = random.Random(0).sample(texts, min(SAMPLE_TEXTS, len(texts)))
    tokenizer = _load_tokenizer(args.model_name_or_path)
    if tokenizer:
        lengths = [len(encoding.ids) + 2 for encoding in tokenizer.encode_batch(chosen, add_special_tokens=False)]
    else:
        lengths = [len(text) / CHARS_PER_TOKEN + 2 for text in chosen]
    lengths = [min(length, window) for length in lengths]
    mean = sum(lengths) / len(lengths)
    deviation = math.sqrt(sum((length - mean) ** 2 for length in lengths) / len(lengths))
    num_held_out = round(num_texts * min(max(args.validation_fraction, 0), 0.99))
    way = f"by its tokenizer, from {len(chosen)} texts" if tokenizer else f"from {len(chosen)} texts' characters"
    return Texts(
        max(num_texts - num_held_out, 1), num_held_out, mean, deviation, math.ceil(max(lengths)), f"estimated {way}"
    )


def _load_tokenizer(model_name_or_path: str):
    """The folder's tokenizer, without transformers; None where there is none."""
    from tokenizers import ByteLevelBPETokenizer, Tokenizer

    folder = Path(model_name_or_path)
    if (folder / "tokenizer.json").is_file():
        return Tokenizer.from_file(str(folder / "tokenizer.json"))
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        return ByteLevelBPETokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
    return None


# ---- what fits ---------------------------------------------------------------------------------------------


def choose_ds_config(args, shape: Shape, texts: Texts, machine: Machine) -> tuple[str, list[str]]:
    """(the fastest shipped set-up that fits, a line for each one passed over). UserError where none does."""
    passed_over, last = [], None
    for name in set_ups(machine, int(os.environ.get("WORLD_SIZE", "1"))):
        config = read_ds_config(ROOT / name)
        if reason := _cannot_swap(config):
            passed_over.append(f"passed over {name}: {reason}")
            continue
        fitted = argparse.Namespace(**vars(args))
        if args.tokens_per_device_batch == "auto":
            fitted.tokens_per_device_batch = texts.longest  # what the smallest batch must hold
        last = forecast(shape, texts, read_settings(fitted, shape, texts, machine, config, name), machine)
        if last.fits:
            return name, passed_over
        what, needed, there, largest = last.misfits()[0]
        passed_over.append(
            f"passed over {name}: needs {needed / GIB:.1f} GiB of {what}, {there / GIB:.1f} are there ({largest})"
        )
    raise UserError("\n".join(["--deepspeed auto: none fits", *passed_over, explain(last)]))


def set_ups(machine: Machine, num_processes: int) -> list[str]:
    """The shipped set-ups that this machine can run, fastest first.

    Where GPUs have no NVLink ZeRO-1 comes before ZeRO-2: it sends gradients once a step, not once a batch.
    """
    if not machine.has_gpu:
        return ["ds_configs/cpu.json"]
    alone = ["ds_configs/no_offload.json"]
    many = ["ds_configs/multi_gpu.json", "ds_configs/multi_gpu_zero1.json"]
    fast = alone if num_processes == 1 else many if machine.is_linked else many[::-1]
    return [*fast, "ds_config.json", "ds_configs/zero3_offload.json", "ds_configs/nvme.json"]


def _cannot_swap(config: dict) -> str | None:
    block = config["zero_optimization"].get("offload_optimizer", {})
    if block.get("device") == "nvme" and not Path(block["nvme_path"]).is_dir():
        return f"its nvme_path {block['nvme_path']} is no folder here"
    return None


FEWEST_STEPS = 50  # an epoch keeps so many: a batch of all there is learns little


def choose_batch(args, shape: Shape, texts: Texts, machine: Machine, ds_config: dict) -> int:
    """The most tokens a device can take at once, to 64; no more than leaves an epoch 50 steps, no fewer than the
    longest text has."""

    def fits(budget: int) -> bool:
        tried = argparse.Namespace(**(vars(args) | {"tokens_per_device_batch": budget}))
        return forecast(shape, texts, read_settings(tried, shape, texts, machine, ds_config, ""), machine).fits

    per_step = max(1, args.gradient_accumulation_steps) * int(os.environ.get("WORLD_SIZE", "1"))
    most = int(texts.num_train * texts.mean / (FEWEST_STEPS * per_step))
    low, high = -(-texts.longest // 64), max(most // 64, -(-texts.longest // 64))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(64 * middle) else (low, middle - 1)
    return 64 * low


def explain(plan: Plan) -> str:
    """A plan that does not fit: its table, what is too large, and the three smallest changes that would make it fit."""
    lines = ["this run does not fit", plan_table(plan)]
    for what, needed, there, largest in plan.misfits():
        lines.append(f"too large: {needed / GIB:.1f} GiB of {what}, {there / GIB:.1f} GiB are there; {largest}")
    found = smallest_changes(plan)
    lines += [f"  {words}: {_needs(changed, plan)}" for words, changed in found]
    if not found:
        lines.append("nothing that this project knows would make it fit: take a smaller model or a larger machine")
    return "\n".join(lines)


LEARNS_WORSE = "bf16_states.json"  # a last resort: `auto` never takes it
LORA_RANK = 16  # train.py's default


def _needs(plan: Plan, before: Plan) -> str:
    device = f"device {plan.device_bytes / GIB:.1f} GiB, " if plan.machine.has_gpu else ""
    price = "; learns worse (ds_configs/bf16_states.md)" if plan.settings.ds_name == LEARNS_WORSE else ""
    price += "; adapters alone learn (docs/lora.md)" if plan.settings.lora_rank > before.settings.lora_rank else ""
    return f"{device}host {plan.host_bytes / GIB:.1f} GiB, disk {plan.run_bytes / GIB:.1f} GiB{price}"


def smallest_changes(plan: Plan, most: int = 3) -> list[tuple[str, Plan]]:
    """The first changes, from the least to the most that they ask for, with which the run fits: (words, its plan)."""
    found = {}
    for words, changed in _changes(plan):
        parts = frozenset(words.removeprefix("--").split(" --"))
        if changed.fits and not any(fewer <= parts for fewer in found):
            found[parts] = (words, changed)
        if len(found) == most:
            break
    return list(found.values())


def smaller_runs(plan: Plan, most: int = 3) -> list[tuple[str, Plan]]:
    """The first changes with which the run takes at least a tenth less of the device or of the host than planned: for a
    run that failed although it seemed to fit."""
    tight = replace(plan.machine, host_memory=int(0.9 * plan.host_bytes))
    if plan.machine.has_gpu:
        taken = plan.machine.device_memory - int(0.9 * plan.device_bytes)
        tight = replace(plan.machine, device_taken=max(plan.machine.device_taken, taken))
    return smallest_changes(replace(plan, machine=tight), most)


def _changes(plan: Plan):
    """Single changes first; then pairs, of one that helps without sufficing and another; then smaller models."""
    kinds = (_batch_changes, _recomputing, _disk_changes, _host_changes, _set_up_changes, _last_resorts)
    singles = [change for kind in kinds for change in kind(plan)]
    yield from singles
    for words, changed in singles:
        if not changed.fits and _excess(changed) < _excess(plan):
            for kind in kinds:
                yield from (
                    (f"{words} {others}", both) for others, both in kind(changed) if _flags(others) != _flags(words)
                )
    for name, known in reversed(HUB_SHAPES.items()):
        smaller = gpt_neo_shape(known)
        if smaller.num_parameters < plan.shape.num_parameters * 0.9:
            yield f"--model_name_or_path {name}", forecast(smaller, plan.texts, plan.settings, plan.machine)


def _excess(plan: Plan) -> int:
    return sum(needed - there for _, needed, there, _ in plan.misfits())


def _flags(words: str) -> set[str]:
    return {word for word in words.split() if word.startswith("--")}


def _with(plan: Plan, **changes) -> Plan:
    return forecast(plan.shape, plan.texts, replace(plan.settings, **changes), plan.machine)


def _cheaper_batch(plan: Plan, divisor: int) -> dict:
    settings, texts, packed = plan.settings, plan.texts, plan.shape.is_gpt_neo
    cheaper = {"accumulation": settings.accumulation * divisor}
    if settings.batch_texts is None:
        budget = settings.budget // divisor
        tokens, padding = texts.of_budget(budget, packed), texts.padding(None, budget, packed)
        return cheaper | {"budget": budget, "batch_tokens": tokens, "padding": padding}
    count = settings.batch_texts // divisor
    tokens, padding = texts.of_batch(count, packed), texts.padding(count, None, packed)
    return cheaper | {"batch_texts": count, "batch_tokens": tokens, "padding": padding}


def _batch_changes(plan: Plan):
    """Smaller batches, more of them a step; the largest that fits comes first."""
    texts, divisor = plan.settings.batch_texts, 2
    while (texts or plan.settings.budget // max(plan.texts.longest, 1)) // divisor >= 1:
        cheaper = _cheaper_batch(plan, divisor)
        flag, count = ("per_device_train_batch_size", texts and texts // divisor)
        if texts is None:
            flag, count = "tokens_per_device_batch", cheaper["budget"]
        words = f"--{flag} {count} --gradient_accumulation_steps {cheaper['accumulation']}"
        changed = _with(plan, **cheaper, eval_tokens=min(plan.settings.eval_tokens, cheaper["batch_tokens"]))
        if changed.fits or texts == divisor:
            yield words, changed
            return
        divisor *= 2


def _recomputing(plan: Plan):
    if not plan.settings.recomputes:
        yield "--activation_checkpointing true", _with(plan, recomputes=True)


def _disk_changes(plan: Plan):
    if plan.settings.num_checkpoints > 2:
        yield "--save_total_limit 1", _with(plan, num_checkpoints=2)
    if plan.settings.num_checkpoints:
        yield "--save_strategy no", _with(plan, num_checkpoints=0)


def _host_changes(plan: Plan):
    if plan.settings.rounds_pinned and plan.pinned_bytes:
        yield f"PYTORCH_ALLOC_CONF={PINNED_MEMORY}", _with(plan, rounds_pinned=False)


def _set_up_changes(plan: Plan):
    for name in set_ups(plan.machine, plan.settings.num_processes):
        config = read_ds_config(ROOT / name)
        if Path(name).name != plan.settings.ds_name and not _cannot_swap(config):
            yield f"--deepspeed {name}", _with(plan, ds_config=config, ds_name=Path(name).name)


def _last_resorts(plan: Plan):
    """What changes what is learnt, not only how."""
    if not plan.settings.lora_rank:
        yield "--lora true", _with(plan, lora_rank=LORA_RANK)
    if plan.machine.capability >= (8, 0) and plan.settings.weight_bytes == 2 and plan.settings.ds_name != LEARNS_WORSE:
        config = read_ds_config(ROOT / "ds_configs" / LEARNS_WORSE)
        words = f"--bf16 true --deepspeed ds_configs/{LEARNS_WORSE}"
        yield words, _with(plan, ds_config=config, ds_name=LEARNS_WORSE)


# ---- in words ----------------------------------------------------------------------------------------------


def plan_table(plan: Plan | None) -> str:
    """The plan as a table for the reader, in GiB."""
    if plan is None:
        return "plan: none, the model's config.json is not here yet"
    shape, texts, settings, machine = plan.shape, plan.texts, plan.settings, plan.machine
    precision = "half precision" if settings.weight_bytes == 2 else "fp32"
    learning = f"{_count(settings.num_learning(shape))} of them learn (LoRA), " if settings.lora_rank else ""
    lines = [
        f"plan: {_count(shape.num_parameters)} parameters, {learning}{precision}, {settings.ds_name} (ZeRO "
        f"{settings.stage}), {settings.num_processes} process(es)",
        f"texts: {texts.num_train:,} to learn from, {texts.mean:.1f} tokens each ({texts.source}); at most "
        f"{settings.batch_tokens:,} tokens at once{'' if shape.is_gpt_neo else ', padding included'}",
    ]
    if machine.has_gpu:
        free = machine.device_memory - machine.device_taken
        lines += _part_lines(f"device memory ({machine.device_name})", plan.device, plan.device_bytes, free)
    times = f" x {settings.local_processes}" if settings.local_processes > 1 else ""
    lines += _part_lines(f"host memory{times}", plan.host, plan.host_bytes, machine.host_memory)
    kept = f"{settings.num_checkpoints} checkpoints of {plan.checkpoint_bytes / GIB:.1f} GiB side by side"
    there = "GiB" if machine.disk is None else f"of {machine.disk / GIB:.1f} GiB free"
    lines.append(f"disk {plan.run_bytes / GIB:.1f} {there}: {kept}")
    lines.append(
        f"{settings.num_steps:,} steps, {settings.train_tokens:,} tokens, {plan.flops:.2g} FLOP, {_time_words(plan)}"
    )
    return "\n".join(lines)


def _count(number: int) -> str:
    return f"{number / 1e9:.2f} billion" if number >= 1e9 else f"{number / 1e6:.1f} million"


def _part_lines(title: str, parts: dict[str, int], total: int, free: int) -> list[str]:
    lines = [f"{title:44}{'GiB':>8}"]
    lines += [f"  {part:42}{size / GIB:8.2f}" for part, size in parts.items() if abs(size) >= 0.005 * GIB]
    return [*lines, f"  {'in all':42}{total / GIB:8.2f}  of {free / GIB:.1f} free"]


def _time_words(plan: Plan) -> str:
    if (known := plan.seconds()) is None:
        return f"time not measured on {plan.machine.device_name}"
    seconds, how = known
    amount = f"{seconds / 3600:.1f} h" if seconds > 5400 else f"{seconds / 60:.0f} min"
    return f"{amount} of training ({how})"


def compare(plan: Plan, device_bytes: int, host_bytes: int) -> tuple[str, dict[str, int]]:
    """Forecast beside measured peaks: (a line for the reader, figures for all_results.json).

    Args:
        device_bytes: `torch.cuda.max_memory_allocated` of the fullest device; 0 without a GPU.
        host_bytes: of all processes together.
    """
    planned_host = plan.host_bytes // plan.settings.local_processes * plan.settings.num_processes
    figures, words = {"plan_host_bytes": planned_host}, []
    if plan.machine.has_gpu:
        figures["plan_device_bytes"] = plan.allocated_bytes
        words.append(f"device {plan.allocated_bytes / GIB:.1f} GiB, measured {device_bytes / GIB:.1f} GiB")
    words.append(f"host {planned_host / GIB:.1f} GiB, measured {host_bytes / GIB:.1f} GiB")
    return f"plan: {'; '.join(words)}", figures


def explain_failure(plan: Plan | None, error: str, allocated: int, reserved: int, host: int) -> str:
    """Out of memory: the plan's table beside the allocator's figures, and the smallest changes from here.

    Args:
        allocated, reserved, host: peaks in bytes: what torch handed out and held on the device, 0 without a GPU, and
            what this process had of the host.
    """
    device = f"torch handed out {allocated / GIB:.1f} GiB at the peak and held {reserved / GIB:.1f} GiB; "
    lines = [f"out of memory: {error.splitlines()[0]}"]
    lines += [f"{device if reserved else ''}this process had {host / GIB:.1f} GiB of the host's memory"]
    changes = smaller_runs(plan) if plan else []
    if plan:
        lines += [plan_table(plan)]
    lines += ["what would take less:"] if changes else ["a smaller --per_device_train_batch_size would take less"]
    return "\n".join([*lines, *(f"  {words}: {_needs(changed, plan)}" for words, changed in changes)])


def check_same_everywhere(args, texts) -> None:
    """UserError, in every process, where processes run other code, other versions, other settings or other texts than
    the first: they would wait for each other for ever, or learn something that nobody asked for. Collective."""
    from importlib.metadata import version

    from neoflix.distributed import gather, num_processes

    if num_processes() == 1:
        return
    code, data = hashlib.sha256(), hashlib.sha256()
    for path in [*sorted((ROOT / "neoflix").glob("*.py")), ROOT / "train.py"]:
        code.update(path.read_bytes())
    for text in texts.train:
        data.update(text.encode())
    settings = (
        "deepspeed tokens_per_device_batch per_device_train_batch_size gradient_accumulation_steps bf16 fp16 seed"
    )
    facts = {
        "code": code.hexdigest()[:12],
        "versions": {name: version(name) for name in ("torch", "transformers", "deepspeed", "accelerate")},
        "texts": data.hexdigest()[:12],
        "settings": {name: str(getattr(args, name)) for name in settings.split()},
    }
    everywhere = gather(facts)
    for rank, theirs in enumerate(everywhere):
        for what in facts:
            if theirs[what] != everywhere[0][what]:
                raise UserError(
                    f"process {rank} has other {what} than process 0 ({theirs[what]}, not {everywhere[0][what]}): "
                    "give every node the same"
                )


# ---- `train.py --plan`, before anything else is imported ------------------------------------------------------

# The flags that a plan looks at, with train.py's defaults (`tests/test_plan.py` holds them equal).
PLAN_FLAGS = {
    "model_name_or_path": "EleutherAI/gpt-neo-2.7B", "dataset": "netflix", "text_column": None, "template": None,
    "validation_fraction": 0.1, "max_length": None, "cache_dir": None, "output_dir": "results",
    "deepspeed": str(ROOT / "ds_config.json"), "per_device_train_batch_size": 64, "tokens_per_device_batch": None,
    "per_device_eval_batch_size": 32, "gradient_accumulation_steps": 1, "num_train_epochs": 5.0, "max_steps": -1,
    "save_strategy": "epoch", "save_total_limit": 2, "bf16": None, "fp16": None, "use_cpu": False,
    "gradient_checkpointing": None, "activation_checkpointing": None, "plan": True, "plan_device_memory": None,
    "plan_host_memory": None, "plan_must_fit": True, "lora": False, "lora_rank": LORA_RANK,
}  # fmt: skip
# Further flags that recipes set and no plan depends on, and their types; of words, those that need no further check.
OTHER_FLAGS = {
    "learning_rate": float, "warmup_steps": float, "weight_decay": float, "logging_steps": float, "lora_alpha": float,
    "early_stopping_patience": int, "seed": int, "local_rank": int, "num_progress_samples": int, "sample_prompts": str,
    "disable_tqdm": bool, "eval_strategy": ("no", "epoch"), "lr_scheduler_type": ("linear", "cosine", "constant"),
    "report_to": ("none", "tensorboard"),
}  # fmt: skip


def answer_quickly() -> None:
    """Answers `train.py --plan ...` in a second and ends the program. Returns where something else is asked for, or
    where only the full parser can check or refuse what is."""
    accept_any_text()
    args = read_quickly(sys.argv[1:]) if "--plan" in sys.argv else None
    if args is None:
        return
    try:
        say(plan_table(plan_run(args)))
    except UserError as error:
        if is_main_process():
            print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
    sys.exit(0)


def read_quickly(words: list[str]) -> argparse.Namespace | None:
    """The arguments of a plan, recipe included; None where the full parser is needed: for a flag that isn't above, for
    a value that isn't plainly one of its flag, and for whatever a check refuses, so that it is refused there."""
    try:
        said = expand_paths(_split_words(words))
        recipe, _ = read_recipe(said.pop("config"), _quick_flags()) if "config" in said else ({}, {})
        said = expand_paths(recipe) | said
        values = {name: _convert(name, value) for name, value in said.items()}
        args = argparse.Namespace(**PLAN_FLAGS | values)
        _check_quickly(args, said)
    except (KeyError, ValueError):
        return None
    return argparse.Namespace(**{name: getattr(args, name) for name in PLAN_FLAGS})


def _quick_flags() -> set[str]:
    return (PLAN_FLAGS.keys() - {"plan"}) | OTHER_FLAGS.keys()


def _split_words(words: list[str]) -> dict[str, str]:
    """['--plan', '--max-steps=7'] -> {'max_steps': '7'}; ValueError for anything but flags with one value each."""
    said, rest = {}, list(words)
    while rest:
        word, equals, value = rest.pop(0).partition("=")
        if word == "--plan" and not equals and (not rest or rest[0].startswith("--")):
            continue
        name = word.removeprefix("--")
        name = name.replace("-", "_") if "_" not in name else name
        if not word.startswith("--") or name not in _quick_flags() | {"config"} or name in said:
            raise ValueError(word)
        if not equals:
            if not rest or rest[0].startswith("-"):
                raise ValueError(word)
            value = rest.pop(0)
        said[name] = value
    return said


def _convert(name: str, value):
    """A flag's value from what was typed; ValueError where that isn't plainly one."""
    default, kind = PLAN_FLAGS.get(name), OTHER_FLAGS.get(name)
    if not isinstance(value, str):
        raise ValueError(name)
    if isinstance(kind, tuple) and value not in kind:
        raise ValueError(name)
    if name in ("bf16", "fp16") or name.endswith("_checkpointing") or isinstance(default, bool) or kind is bool:
        return {"true": True, "false": False}[value.lower()]
    if name in ("max_length", "tokens_per_device_batch") and value != "auto":
        return int(value)
    if kind in (int, float):
        return kind(value)
    return value if default is None else type(default)(value)


def _check_quickly(args: argparse.Namespace, said: dict) -> None:
    """ValueError where the full parser would refuse something, or change an argument."""
    check_numbers(args)
    if args.template is not None:
        Template(args.template)
    batch = 1 if args.tokens_per_device_batch else args.per_device_train_batch_size
    texts_per_step = batch * args.gradient_accumulation_steps * int(os.environ.get("WORLD_SIZE", "1"))
    lora_alone = {"lora_rank", "lora_alpha"} & said.keys() and not args.lora
    is_unusual = (
        args.template is not None and args.text_column is not None,
        args.tokens_per_device_batch not in (None, "auto") and args.tokens_per_device_batch < 2,
        args.lora and args.model_name_or_path == "demo",
        args.save_strategy not in ("no", "epoch"),
        not args.output_dir.strip(),
        read_texts_per_step(args.output_dir, None) not in (None, texts_per_step),  # a run keeps its own
        args.bf16 and args.fp16,
        lora_alone,
    )
    if any(is_unusual):
        raise ValueError
    check_writable(args.output_dir)
    check_output_dir(args.output_dir, args.model_name_or_path)
    if args.deepspeed != "auto":
        config = read_ds_config(args.deepspeed)
        check_compiler(config)
        if any((key, value) != ("bf16.enabled", args.bf16) for key, value in set_values(config).items()):
            raise ValueError
