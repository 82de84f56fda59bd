"""Bytes of activations and of the loss, which a training pass adds to what stays on a device."""

from neoflix.model.shape import Shape
from neoflix.planning.settings import Settings

# With LoRA on a CPU, models other than GPT-Neo: the adapters' temporary tensors leave holes in the memory. Two runs of
# a Llama of 135 million parameters held 1.92 and 1.93 times the activations that autograd keeps (batches of 1,200
# tokens, and of 32 texts).
ADAPTERS_ON_CPU = 1.9

LOSS_CHUNK = {"cuda": 2**26 * 4, "cpu": 2**20 * 4}  # bytes of the fp32 logits that `loss.py` reads at a time


def activation_bytes(shape: Shape, settings: Settings, num_tokens: int, is_recomputing: bool = True) -> int:
    """Bytes that the forward pass keeps for the backward pass, without the logits.

    Each layer keeps for each token, in tensors of the width: the inputs of both layer norms and their results (4);
    query, key, value and the attention's result (4; without CUDA texts are separated, which copies the result); and
    five of the MLP's inner width (its input, three steps of the tanh form of GELU, and its result): 28 widths for
    GPT-Neo. tests/planning/test_device_memory.py counts them with autograd's saved-tensor hooks. A recomputed layer
    keeps one width, and one of them is in full while it is recomputed (Chen et al., 2016). The embedding and the last
    norm come on top. With LoRA all of these are kept too, because every adapter keeps the input of its layer, and the
    result of its first matrix. For other models the layers are counted when their shape is read.

    Args:
        is_recomputing: during the backward pass, if all layers are recomputed: the last one is in full then.
    """
    copies = 1.4 if settings.is_cpu else 0  # the copy, and padding to the longest text of a group
    layer = (8 + copies) * shape.width + 5 * shape.inner
    if counted := shape.kept_bytes[settings.weight_bytes // 4]:
        layer = counted / settings.weight_bytes / shape.num_layers
        layer *= ADAPTERS_ON_CPU if settings.is_cpu and settings.lora_rank else 1
    layer += settings.lora_rank * shape.num_linear / max(shape.num_layers, 1)
    recomputed = settings.recomputed_layers
    kept = (shape.num_layers - recomputed) * layer + recomputed * shape.width
    if is_recomputing and recomputed == shape.num_layers:
        kept += layer
    return int(num_tokens * settings.weight_bytes * (kept + 2 * shape.width))


def loss_bytes(shape: Shape, settings: Settings, num_tokens: int, is_backward: bool = False) -> int:
    """Bytes of the logits, which become their own gradient, and of two fp32 chunks of them (`loss.py`): forward a chunk
    and its copy, backward the last two chunks."""
    logits = num_tokens * shape.vocab_size
    chunk = min(logits * 4, LOSS_CHUNK["cpu" if settings.is_cpu else "cuda"])
    second = min(chunk, logits * 4 - chunk) if is_backward else chunk
    return logits * settings.weight_bytes + chunk + second
