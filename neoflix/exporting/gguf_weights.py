"""A model's weights by llama.cpp's names, shapes and data types.

A GPT-Neo becomes llama.cpp's `gpt2` (`model/gpt2.py` has the conversion), a Llama its `llama`. Sources: llama.cpp's
src/models/gpt2.cpp and src/models/llama.cpp, and the names in the `gguf` package.
"""

from collections.abc import Iterator

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, MODEL_ARCH, GGMLQuantizationType, GGUFWriter, get_tensor_name_map, quants
from transformers import LlamaConfig, PreTrainedModel

from neoflix.exporting.source import Supported
from neoflix.model.gpt2 import gpt2_config, rewrite
from neoflix.runtime.errors import UserError

SUPPORTED = Supported(("gpt_neo", "llama"), "can be written as GGUF")
POSITIONS = "position_embd.weight"
Q8_0 = GGMLQuantizationType.Q8_0


def check_supported(config, named: str) -> None:
    """Checks that llama.cpp computes what the model does, as far as the config tells.

    Raises:
        UserError: if llama.cpp has another activation, other rotations or no such biases.
    """
    wanted = {"activation_function": "gelu_new"}
    if config.model_type == "llama":
        wanted = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False}
        kind = config.rope_parameters["rope_type"]
        if kind != "default":
            raise UserError(f"{named}: its config has rope_type {kind}; only the default one can be written as GGUF")
    for name, value in wanted.items():
        if getattr(config, name) != value:
            raise UserError(
                f"{named}: its config has {name} {getattr(config, name)}; only {value} can be written as GGUF"
            )


def list_tensors(model: PreTrainedModel, num_tokens: int, on_meta: bool = False) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields (llama.cpp's name, weight) of all weights; matrices are [outputs, inputs].

    Args:
        num_tokens: the tokenizer's. The embedding's rows beyond it belong to no token; llama.cpp refuses them.
        on_meta: yields tensors without data, which take no memory.
    """
    weights = model.state_dict()
    if on_meta:
        weights = {name: weight.to("meta") for name, weight in weights.items()}
    is_llama = model.config.model_type == "llama"
    names = get_tensor_name_map(MODEL_ARCH.LLAMA if is_llama else MODEL_ARCH.GPT2, model.config.num_hidden_layers)
    for name, weight in (_llama if is_llama else _gpt2)(weights, model.config, num_tokens):
        yield names.get_name(name, try_suffixes=(".weight", ".bias")), weight


def _gpt2(weights: dict, config, num_tokens: int) -> Iterator[tuple[str, torch.Tensor]]:
    """A GPT-Neo's weights by GPT-2's names."""
    for name, weight in rewrite(weights, config, gpt2_config(config, num_tokens, torch.float32)):
        is_transposed = ".h." in name and weight.dim() == 2  # transformers' Conv1D
        yield name, weight.t() if is_transposed else weight


def _llama(weights: dict, config: LlamaConfig, num_tokens: int) -> Iterator[tuple[str, torch.Tensor]]:
    """A Llama's weights by its own names.

    Rotary embeddings turn pairs of a head's dimensions: transformers pairs each with the one half a head away,
    llama.cpp with its neighbour. So the rows of the queries' and keys' matrices change places.
    """
    for name, weight in weights.items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if "embed_tokens" in name or name == "lm_head.weight":
            weight = weight[:num_tokens]
        for kind, num_heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
            if kind in name:
                halves = weight.reshape(num_heads, 2, -1, weight.shape[-1])
                weight = halves.transpose(1, 2).reshape(weight.shape)
        yield name, weight


def stored_type(name: str, shape: tuple[int, ...], asked: GGMLQuantizationType) -> GGMLQuantizationType:
    """The data type of a weight in the file. Vectors and positions stay in fp32, as in every GGUF file. Rows that do
    not divide into Q8_0's blocks of 32 are fp16."""
    if len(shape) == 1 or name == POSITIONS:
        return GGMLQuantizationType.F32
    if asked == Q8_0 and shape[-1] % GGML_QUANT_SIZES[Q8_0][0]:
        return GGMLQuantizationType.F16
    return asked


def announce(writer: GGUFWriter, name: str, shape: tuple[int, ...], kind: GGMLQuantizationType) -> int:
    """Adds a weight to the file's index, and returns its size in bytes."""
    block, num_bytes = GGML_QUANT_SIZES[kind]
    size = int(np.prod(shape)) // block * num_bytes
    writer.add_tensor_info(name, shape, np.dtype(np.float32), size, kind)
    return size


def encode(name: str, weight: torch.Tensor, kind: GGMLQuantizationType) -> np.ndarray:
    """A weight's bytes in the file.

    Raises:
        UserError: if it overflows fp16.
    """
    if kind == GGMLQuantizationType.F16:
        weight = weight.half()
    if not weight.isfinite().all():
        raise UserError(f"{name} overflows {kind.name}; use --dtype bfloat16 or float32")
    return quants.quantize(np.ascontiguousarray(weight.float().numpy()), kind)
