"""Bytes of a run on the device and the host, by phase and part, each with its source.

Notation: P = parameters, L = trainable parameters.
"""

import math
from dataclasses import dataclass

from neoflix.model.shape import Shape
from neoflix.runtime.console import GIB

# Bytes. What a process takes by itself is measured on the CPU (Python, torch 2.13, transformers, deepspeed, the
# tokenised data; benchmarks/results/plan-cpu.jsonl). Of a process with CUDA neither share has been measured here yet.
CPU_PROCESS = {2: 480 * 2**20, 4: 620 * 2**20}  # by bytes a weight: fp32 takes more, why was not looked into


CUDA_PROCESS = int(2.5 * GIB)


# LoRA on a CPU, other models than GPT-Neo: what adapters compute for a moment leaves holes in the memory. Two runs of a
# Llama of 135 million parameters held 1.92 and 1.93 times the activations that autograd keeps (1,200 tokens at once,
# and 32 texts at once).
ADAPTERS_ON_CPU = 1.9


LOSS_CHUNK = {"cuda": 2**26 * 4, "cpu": 2**20 * 4}  # fp32 logits that `loss.py` reads at a time


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
    value and the attention's result (4; elsewhere than on CUDA the texts are taken apart, which copies the result),
    and five of the MLP's inner width (its input, three steps of the tanh form of GELU, and its result): 28 widths for
    GPT-Neo. Counted with autograd's saved-tensor hooks, as `tests/planning/test_forecast.py` does. With checkpointing
    one width a layer, and one layer in full while it is worked out again (Chen et al., 2016). Besides: the embedding
    and the last norm. With LoRA the same, since every adapter keeps what goes into its layer, and what its first
    matrix makes of that. Of other models the layers are counted likewise, when their shape is read.
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
