"""Bytes of a process on its device, by phase and part, each with its source.

Notation: P = parameters, L = trainable parameters, N = processes, b = bytes per weight.
"""

from dataclasses import replace

from neoflix.model.shape import Shape
from neoflix.planning.activations import activation_bytes, loss_bytes
from neoflix.planning.settings import Settings

EXCHANGED = 5 * 10**7  # elements of gradients that are exchanged at a time without ZeRO (training/deepspeed.py)


def device_memory(shape: Shape, settings: Settings) -> dict[str, dict[str, int]]:
    """Bytes of one process on its device: {phase: {part: bytes}}.

    Weights: b P; at stage 3 b P / N and what is gathered at the moment. Optimizer: 12 L, from stage 1 on 12 L / N, none
    if it is offloaded (or the share beyond `ratio`). Gradients: b L; from stage 2 on b L / N; offloaded, only those in
    transit. `make rehearse` compares the phases of a GPU with what is allocated there.
    """
    if settings.is_cpu:
        return _cpu_memory(shape, settings)
    b, resident, tokens = settings.weight_bytes, _resident(shape, settings), settings.batch_tokens
    gradients, copies = _gradients(shape, settings)
    accumulated = {"gradients": gradients if settings.accumulation > 1 else 0}
    working = accumulated | {"activations": activation_bytes(shape, settings, tokens)}
    kept = accumulated | {"activations": activation_bytes(shape, settings, tokens, is_recomputing=False)}
    loss = _loss(shape, settings, tokens)
    in_backward = resident | ({} if settings.stage == 3 else {"buffers": _buffers(shape, settings)})
    embedding = 0 if settings.lora_rank else b * shape.embedding
    arriving = {
        # The logits have become their gradient; it gives way to the head's, which waits for the embedding's own.
        "gradient of the head": max(tokens * shape.vocab_size * b, embedding),
        "gradients of a layer": _layer_gradients(shape, settings),
    }
    both_gradients = {"gradients of the embedding": (1 + shape.is_tied) * embedding}
    # Stages 1 and 2 take each gradient's norm in fp64: with offload when it leaves, otherwise before the step.
    norm = {"largest gradient in fp64": 8 * settings.largest_trainable(shape)} if settings.stage in (1, 2) else {}
    is_offloaded = bool(settings.offload("offload_optimizer"))
    phases = {
        "start": _start(shape, settings),
        "forward": resident | kept | loss,
        "backward of the loss": resident | kept | {"loss": loss_bytes(shape, settings, tokens, is_backward=True)},
        "backward": in_backward | working | arriving,
        "backward's end": in_backward | {"gradients": gradients} | (norm if norm and is_offloaded else both_gradients),
        "norm": resident | {"gradients": gradients} | ({} if is_offloaded else norm),
        "step": resident | {"gradients": gradients, "gradients' fp32 copies": copies},
        "evaluate": resident | _loss(shape, settings, settings.eval_tokens),
        "sample": resident,
        "save": resident,
    }
    if settings.recomputed_layers:
        phases["backward of the first layer"] = in_backward | {"gradients": gradients} | _first_layer(shape, settings)
    if settings.stage == 0 and settings.num_processes > 1:
        phases["exchange"] = resident | {"gradients": gradients, "buckets": _exchanged(shape, settings)}
    if settings.stage in (1, 2) and not is_offloaded:
        phases["first reduction"] = in_backward | _first_reduction(shape, settings, working["activations"], embedding)
    return phases if settings.stage != 3 else _with_gathered(phases, shape, settings)


def _layer_gradients(shape: Shape, settings: Settings) -> int:
    """Bytes of the gradients that a layer's backward pass has just computed. At stage 3 with offload a bucket of them
    is there in fp32 as well, on its way to the host."""
    b, trainable = settings.weight_bytes, settings.num_trainable(shape)
    layers = trainable - (0 if settings.lora_rank else shape.embedding)
    is_cast = settings.stage == 3 and settings.offload("offload_optimizer")
    cast = 4 * min(settings.bucket("reduce_bucket_size"), trainable) if is_cast else 0
    return b * layers // max(shape.num_layers, 1) + cast


def _first_layer(shape: Shape, settings: Settings) -> dict[str, int]:
    """What the backward pass of the first layer holds beside the gradients if it is recomputed: that layer in full. No
    moment before is fuller than the beginning or this one, because all layers are alike."""
    one_layer = replace(shape, num_layers=1, kept_bytes=tuple(size // shape.num_layers for size in shape.kept_bytes))
    activations = activation_bytes(one_layer, replace(settings, recomputed_layers=1), settings.batch_tokens)
    waiting = shape.is_tied and settings.updates_in_backward and not settings.lora_rank
    return {"activations": activations, "gradient of the head": waiting * settings.weight_bytes * shape.embedding}


def _exchanged(shape: Shape, settings: Settings) -> int:
    """Bytes of the gradients that processes exchange at a time without ZeRO (engine.py, `allreduce_no_retain`): copied
    into one tensor and, where DeepSpeed does not know that they are in half precision, cast to fp32."""
    return _exchange_bucket(shape, settings) * (settings.weight_bytes + (4 if settings.is_compact else 0))


def _exchange_bucket(shape: Shape, settings: Settings) -> int:
    return min(settings.num_trainable(shape), EXCHANGED + settings.largest_trainable(shape))


def _with_gathered(phases: dict, shape: Shape, settings: Settings) -> dict[str, dict[str, int]]:
    """The phases of stage 3, with the weights that are gathered (stage3.py, partitioned_param_coordinator.py).

    The start and saving hold the whole embedding and its copy. Otherwise weights stay until
    `stage3_max_live_parameters` are there, and some are fetched ahead. At the loss none are there: the forward pass is
    fullest then or, with few tokens, at the head.
    """
    b, P, embedding = settings.weight_bytes, shape.num_parameters, shape.embedding
    live = max(settings.bucket("stage3_max_live_parameters", 10**9), embedding + shape.layer_parameters)
    fetched = b * min(P, live + settings.bucket("stage3_prefetch_bucket_size", 5 * 10**7))
    gathered = {"start": 2 * b * embedding, "save": 2 * b * embedding, "sample": b * min(P, live + embedding)}
    gathered |= {"backward": fetched, "backward's end": fetched}
    phases = {phase: parts | {"gathered weights": gathered.get(phase, 0)} for phase, parts in phases.items()}
    for phase, tokens in (("forward", settings.batch_tokens), ("evaluate", settings.eval_tokens)):
        at_head = {"loss": tokens * shape.vocab_size * b, "gathered weights": fetched}
        phases[f"{phase}, at the head"] = phases[phase] | at_head
    return phases


def _loss(shape: Shape, settings: Settings, num_tokens: int) -> dict[str, int]:
    return {"loss": loss_bytes(shape, settings, num_tokens)}


def _resident(shape: Shape, settings: Settings) -> dict[str, int]:
    """What stays on the device from one step to the next: weights, optimizer, and at stage 3 the reduce bucket."""
    parts = _states(shape, settings)
    if settings.stage == 3:
        return parts | {"buffers": _buffers(shape, settings)}
    return parts | ({"gradient in transit": transit} if (transit := _transit(shape, settings)) else {})


def _states(shape: Shape, settings: Settings) -> dict[str, int]:
    L, N, b, stage = settings.num_trainable(shape), settings.num_processes, settings.weight_bytes, settings.stage
    weights = b * (shape.num_parameters + (L if settings.lora_rank else 0))
    if stage == 3:
        weights = 0 if settings.offload("offload_param") else weights // N
    share = settings.optimizer_bytes * L / (N if stage else 1)
    return {"weights": weights, "optimizer": int((1 - settings.offloaded_share) * share)}


def _start(shape: Shape, settings: Settings) -> dict[str, int]:
    """What DeepSpeed allocates when it makes its optimizer (stage_1_and_2.py).

    With offload it flattens the weights and clones this process's share; otherwise it casts the share to fp32, and
    allocates gradients of it for a moment. The moments come at the first step.
    """
    L, N, b = settings.num_trainable(shape), settings.num_processes, settings.weight_bytes
    if settings.stage == 3:
        return _resident(shape, settings) | {"optimizer": 0}
    weights = {"weights": _states(shape, settings)["weights"]}
    if settings.stage == 0:
        return weights
    if settings.offload("offload_optimizer"):
        return weights | {"weights, flattened": b * L // N}
    return weights | {"optimizer's fp32 weights": 4 * L // N, "its gradients": 4 * L // N}


def _cpu_memory(shape: Shape, settings: Settings) -> dict[str, dict[str, int]]:
    """The phases of a CPU, where freed memory is kept: all that a step allocates counts, whenever it does."""
    b, P = settings.weight_bytes, shape.num_parameters + (settings.num_trainable(shape) if settings.lora_rank else 0)
    parts = _states(shape, settings)
    if settings.stage == 3:
        live = settings.bucket("stage3_max_live_parameters", 10**9) + settings.bucket("stage3_prefetch_bucket_size")
        parts["gathered weights"] = b * min(P, max(live, shape.embedding + shape.layer_parameters))
    parts |= {"buffers": _buffers(shape, settings) + _transit(shape, settings)} | _kept_by_the_cpu(shape, settings)
    gradients, copies = _gradients(shape, settings)
    activations = activation_bytes(shape, settings, settings.batch_tokens)
    loss = _loss(shape, settings, settings.batch_tokens)
    # The embedding is tied to the head: its first gradient comes at the beginning of the backward pass, and waits for
    # the second one at the end.
    embedding = {"gradients of the embedding": 0 if settings.lora_rank else (1 + shape.is_tied) * b * shape.embedding}
    working = {"activations": activations} | loss
    if b == 4:
        if shape.is_packed:  # padded batches differ too much in size
            # Freed memory is kept, in pieces: gradients reuse the memory of activations, if these were larger.
            grown = gradients + (0 if settings.lora_rank else b * shape.embedding)
            working["memory used twice"] = -min(grown, max(0, activations + loss["loss"] - grown))
        return {"train": parts | {"gradients": gradients + copies} | embedding | working}
    beginning = parts | {"gradients": gradients if settings.accumulation > 1 else 0} | embedding | working
    return {
        "train": beginning,
        "backward's end": parts | {"gradients": gradients} | embedding,
        "step": parts | {"gradients": gradients, "gradients' fp32 copies": copies},
        "evaluate": parts | _loss(shape, settings, settings.eval_tokens),
    }


def _first_reduction(shape: Shape, settings: Settings, activations: int, embedding: int) -> dict[str, int]:
    """What the first reduction of gradients allocates beside the buffers, at stages 1 and 2 (stage_1_and_2.py).

    It allocates this process's whole share of the gradients, and flattens the bucket. Activations of the layers that
    filled the bucket are freed. Of the embedding's two gradients the head's is there.
    """
    gradients, _ = _gradients(shape, settings)
    trainable = settings.num_trainable(shape)
    bucket = min(settings.bucket("reduce_bucket_size"), trainable)
    in_layers = trainable - (0 if settings.lora_rank else shape.embedding)
    in_full = shape.num_layers - settings.recomputed_layers
    share = min(1.0, bucket / max(in_layers, 1) * shape.num_layers / in_full) if in_full else 0
    return {
        "gradients": gradients,
        "activations": int(activations * (1 - share)),
        "gradients of the embedding": embedding,
        "flattened bucket": settings.weight_bytes * bucket,
    }


def _kept_by_the_cpu(shape: Shape, settings: Settings) -> dict[str, int]:
    """Parts that only a CPU's memory holds, as measured in benchmarks/results/plan-cpu.jsonl.

    Without ZeRO, fp32 weights stay mapped from their file, and the embedding is there twice because it is resized; at
    stage 3 it is whole before and after. With LoRA it stays mapped at stages 1 and 2 too, where DeepSpeed copies only
    trainable weights. With `CompactAdamW`, whose states are small, the memory in which the embedding was converted to
    bf16 is not reused. Gloo copies what processes exchange. With offload in bf16 the largest gradient is cast twice,
    and the buckets' memory is not reused (one configuration measured).
    """
    kept, embedding = {}, settings.weight_bytes * shape.embedding
    if settings.stage == 3:
        kept["embedding, resized"] = 2 * embedding
    elif settings.weight_bytes == 4 and (settings.stage == 0 or settings.lora_rank):
        kept["embedding, resized"] = embedding
    elif settings.is_compact:
        kept["embedding, converted"] = 6 * shape.embedding
    if settings.num_processes > 1 and settings.is_compact:
        kept["exchange"] = 4 * _exchange_bucket(shape, settings)
    elif settings.num_processes > 1 and settings.stage:
        bucket = min(settings.bucket("reduce_bucket_size"), settings.num_trainable(shape))
        kept["exchange"] = settings.weight_bytes * bucket
    if settings.weight_bytes == 2 and settings.stage in (1, 2) and settings.offload("offload_optimizer"):
        kept["gradients' fp32 copies, buckets again"] = (
            6 * shape.embedding + _buffers(shape, settings) + _transit(shape, settings)
        )
    return kept


def _buffers(shape: Shape, settings: Settings) -> int:
    """Reduce buckets, two if communication overlaps (at stage 3 one). A GPU allocates a whole bucket; a CPU only the
    part that is written."""
    if settings.stage == 0:
        return 0
    bucket = settings.bucket("reduce_bucket_size")
    if settings.is_cpu:
        bucket = min(bucket, settings.num_trainable(shape))
    overlaps = settings.zero.get("overlap_comm", settings.stage == 3) and settings.stage < 3
    return settings.weight_bytes * bucket * (2 if overlaps else 1)


def _transit(shape: Shape, settings: Settings) -> int:
    """With offload at stages 1 and 2: a buffer for a gradient on its way to the host, as large as the largest."""
    in_transit = settings.offload("offload_optimizer") and settings.stage in (1, 2)
    return settings.weight_bytes * settings.largest_trainable(shape) if in_transit else 0


def _gradients(shape: Shape, settings: Settings) -> tuple[int, int]:
    """(bytes of the gradients during a step, bytes of their copies), on the device.

    Stage 0 in half precision casts all of them to fp32 and flattens the copies (fused_optimizer.py), but not for
    `CompactAdamW`. Stages 1 and 2 flatten this process's share and cast it, unless they accumulate in fp32 already (18
    instead of 22 bytes per parameter with one process). Stage 3 casts one sub-group at a time.
    """
    L, N, b, stage = settings.num_trainable(shape), settings.num_processes, settings.weight_bytes, settings.stage
    wide, on_device = settings.gradient_bytes, 1 - settings.offloaded_share
    if stage == 0 and settings.updates_in_backward:
        return 0, 0
    if stage == 0:
        return b * L, 8 * L if b == 2 and not settings.is_compact else 0
    if stage == 3:
        sub_group = min(settings.bucket("sub_group_size", 10**9), L // N) if settings.is_cpu or on_device else 0
        resident = 0 if settings.offload("offload_optimizer") == "cpu" and on_device == 0 else wide * L // N
        return int(resident + 4 * on_device * L / N), 4 * sub_group
    if settings.offload("offload_optimizer"):
        return 0, 0
    if stage == 1 and wide == 4 and b == 2:  # BF16_Optimizer
        return (b + 4) * L, 0
    kept = b * L if stage == 1 else wide * L // N
    return kept, 0 if wide == 4 and b == 2 else (b + (4 if b == 2 else 0)) * L // N
