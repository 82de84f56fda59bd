"""Bytes of a process on its device, by phase and part, each with its source.

Notation: P = parameters, L = trainable parameters, N = processes, b = bytes per weight.
"""

from neoflix.model.shape import Shape
from neoflix.planning.settings import Settings

# With LoRA on a CPU, models other than GPT-Neo: the adapters' temporary tensors leave holes in the memory. Two runs of
# a Llama of 135 million parameters held 1.92 and 1.93 times the activations that autograd keeps (batches of 1,200
# tokens, and of 32 texts).
ADAPTERS_ON_CPU = 1.9

LOSS_CHUNK = {"cuda": 2**26 * 4, "cpu": 2**20 * 4}  # bytes of the fp32 logits that `loss.py` reads at a time


def activation_bytes(shape: Shape, settings: Settings, num_tokens: int) -> int:
    """Bytes that the forward pass keeps for the backward pass, without the logits.

    Each layer keeps for each token, in tensors of the width: the inputs of both layer norms and their results (4);
    query, key, value and the attention's result (4; without CUDA texts are separated, which copies the result); and
    five of the MLP's inner width (its input, three steps of the tanh form of GELU, and its result): 28 widths for
    GPT-Neo. tests/planning/test_device_memory.py counts them with autograd's saved-tensor hooks. Activation
    checkpointing keeps one width per layer, and one layer in full while it is recomputed (Chen et al., 2016). The
    embedding and the last norm come on top. With LoRA all of these are kept too, because every adapter keeps the input
    of its layer, and the result of its first matrix. For other models the layers are counted when their shape is read.
    """
    copies = 1.4 if settings.is_cpu else 0  # the copy, and padding to the longest text of a group
    layer = (8 + copies) * shape.width + 5 * shape.inner
    if counted := shape.kept_bytes[settings.weight_bytes // 4]:
        layer = counted / settings.weight_bytes / shape.num_layers
        layer *= ADAPTERS_ON_CPU if settings.is_cpu and settings.lora_rank else 1
    layer += settings.lora_rank * shape.num_linear / max(shape.num_layers, 1)
    kept = layer + shape.num_layers * shape.width if settings.recomputes else shape.num_layers * layer
    return int(num_tokens * settings.weight_bytes * (kept + 2 * shape.width))


def loss_bytes(shape: Shape, settings: Settings, num_tokens: int) -> int:
    """Bytes of the logits, which become their own gradient, and of two fp32 chunks of them (`loss.py`). Models other
    than GPT-Neo have Hugging Face's loss: logits, fp32 copy, log-softmax and the gradients of both."""
    logits = num_tokens * shape.vocab_size
    if not shape.is_gpt_neo:
        return logits * (2 * settings.weight_bytes + 12)
    chunk = min(logits * 4, LOSS_CHUNK["cpu" if settings.is_cpu else "cuda"])
    return logits * settings.weight_bytes + 2 * chunk


def device_memory(shape: Shape, settings: Settings) -> dict[str, dict[str, int]]:
    """Bytes of one process on its device: {phase: {part: bytes}}.

    Weights: b P; at stage 3 b P / N and the layers that are gathered (stage3_max_live_parameters, the prefetch bucket,
    and always the whole embedding). Optimizer: 12 L, from stage 1 on 12 L / N, none if it is offloaded (or the share
    beyond `ratio`). Gradients: b L; from stage 2 on b L / N; offloaded, only those in transit.
    """
    L, N, b, stage = settings.num_trainable(shape), settings.num_processes, settings.weight_bytes, settings.stage
    P = shape.num_parameters + (L if settings.lora_rank else 0)
    offloaded, on_device = settings.offload("offload_optimizer"), 1 - settings.offloaded_share

    parts = {"weights": b * P}
    if stage == 3:
        live = settings.bucket("stage3_max_live_parameters", 10**9) + settings.bucket("stage3_prefetch_bucket_size")
        gathered = min(P, max(live, shape.embedding + shape.layer_parameters))
        parts["weights"] = 0 if settings.offload("offload_param") else b * P // N
        parts["gathered layers"] = b * gathered
    parts["optimizer"] = int(on_device * settings.optimizer_bytes * L / (N if stage else 1))
    parts |= {"buffers": _buffers(shape, settings)}

    gradients, copies = _gradients(shape, settings, on_device)
    activations = activation_bytes(shape, settings, settings.batch_tokens)
    loss = loss_bytes(shape, settings, settings.batch_tokens)
    # The embedding is tied to the head: its first gradient comes at the beginning of the backward pass, and waits for
    # the second one at the end.
    embedding = {"gradients of the embedding": 0 if settings.lora_rank else (1 + shape.is_tied) * b * shape.embedding}
    working = {"activations": activations, "loss": loss}
    if settings.is_cpu:
        parts |= _kept_by_the_cpu(shape, settings)
        if b == 4:
            if shape.is_gpt_neo:  # padded batches differ too much in size
                # Freed memory is kept, in pieces: gradients reuse the memory of activations, if these were larger.
                grown = gradients + (0 if settings.lora_rank else b * shape.embedding)
                working["memory used twice"] = -min(grown, max(0, activations + loss - grown))
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
    """Further parts when ZeRO-2 reduces its first bucket of gradients, and accumulates them in another dtype.

    It allocates its whole share of the gradients then, and flattens the bucket. Activations of the layers that filled
    the bucket are freed. Of the embedding's two gradients the head's is there.
    """
    b, trainable = settings.weight_bytes, settings.num_trainable(shape)
    bucket = min(settings.bucket("reduce_bucket_size"), trainable)
    in_layers = trainable - (0 if settings.lora_rank else shape.embedding)
    share = 0 if settings.recomputes else min(1.0, bucket / max(in_layers, 1))
    return {
        "activations": int(activations * (1 - share)),
        "gradients of the embedding": 0 if settings.lora_rank else b * shape.embedding,
        "flattened bucket": b * bucket,
    }


def _kept_by_the_cpu(shape: Shape, settings: Settings) -> dict[str, int]:
    """Parts that only a CPU's memory holds, as measured in benchmarks/results/plan-cpu.jsonl.

    Without ZeRO, fp32 weights stay mapped from their file, and the embedding is there twice because it is resized; at
    stage 3 it is whole before and after. With LoRA it stays mapped at stages 1 and 2 too, where DeepSpeed copies only
    trainable weights. Gloo copies what processes exchange. With offload in bf16 the largest gradient is cast twice, and
    the buckets' memory is not reused (one configuration measured).
    """
    kept, embedding = {}, settings.weight_bytes * shape.embedding
    if settings.stage == 3:
        kept["embedding, resized"] = 2 * embedding
    elif settings.weight_bytes == 4 and (settings.stage == 0 or settings.lora_rank):
        kept["embedding, resized"] = embedding
    if settings.num_processes > 1 and settings.stage:
        bucket = min(settings.bucket("reduce_bucket_size"), settings.num_trainable(shape))
        kept["exchange"] = settings.weight_bytes * bucket
    if settings.weight_bytes == 2 and settings.stage in (1, 2) and settings.offload("offload_optimizer"):
        kept["gradients' fp32 copies, buckets again"] = (
            8 * shape.embedding + _buffers(shape, settings) - 2 * shape.embedding
        )
    return kept


def _buffers(shape: Shape, settings: Settings) -> int:
    """Reduce buckets, two if communication overlaps (at stage 3 one); with offload a gradient in transit.

    A GPU allocates a whole bucket; a CPU only the part that is written.
    """
    if settings.stage == 0:
        return 0
    bucket = settings.bucket("reduce_bucket_size")
    if settings.is_cpu:
        bucket = min(bucket, settings.num_trainable(shape))
    overlaps = settings.zero.get("overlap_comm", settings.stage == 3) and settings.stage < 3
    in_transit = settings.offload("offload_optimizer") and settings.stage < 3
    transit = settings.largest_trainable(shape) if in_transit else 0
    return settings.weight_bytes * (bucket * (2 if overlaps else 1) + transit)


def _gradients(shape: Shape, settings: Settings, on_device: float) -> tuple[int, int]:
    """(bytes of the gradients during a step, bytes of their copies), on the device.

    Stage 0 in half precision casts all of them to fp32 and flattens the copies (fused_optimizer.py). Stages 1 and 2
    flatten this process's share and cast it, unless they accumulate in fp32 already (18 instead of 22 bytes per
    parameter with one process). Stage 3 casts one sub-group at a time.
    """
    L, N, b, stage = settings.num_trainable(shape), settings.num_processes, settings.weight_bytes, settings.stage
    wide = settings.gradient_bytes
    if stage == 0:
        return b * L, 8 * L if b == 2 else 0
    if stage == 3:
        sub_group = min(settings.bucket("sub_group_size", 10**9), L // N)
        resident = 0 if settings.offload("offload_optimizer") == "cpu" and on_device == 0 else wide * L // N
        return int(resident + 4 * on_device * L / N), 4 * sub_group
    if settings.offload("offload_optimizer"):
        return 0, 0
    if stage == 1 and wide == 4 and b == 2:  # BF16_Optimizer
        return (b + 4) * L, 0
    kept = b * L if stage == 1 else wide * L // N
    return kept, 0 if wide == 4 and b == 2 else (b + (4 if b == 2 else 0)) * L // N
