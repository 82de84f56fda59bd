"""A model's shape, from its config.json alone: what its memory and FLOPs depend on.

GPT-Neo's shape is computed without torch, whose import takes longer than `--plan` may. A model of another architecture
is built from its config with fake tensors (shapes without values) and run once, which needs torch.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from neoflix.model.folder import ADAPTERS_CONFIG_FILE
from neoflix.model.packaged import SMOLLM2

DEMO_SHAPE = {"num_layers": 4, "hidden_size": 256, "vocab_size": 4096, "max_position_embeddings": 512}

# From the config.json of each GPT-Neo on the hub, so that its plan needs no network.
HUB_SHAPES = {
    f"EleutherAI/gpt-neo-{size}": {"num_layers": num_layers, "hidden_size": width}
    for size, num_layers, width in (("125M", 12, 768), ("1.3B", 24, 2048), ("2.7B", 32, 2560))
}

# Architectures whose texts are packed, as `model_type` in config.json. tests/model/test_packed_attention.py compares
# each with texts that are read one by one.
PACKED = {
    *("cohere", "gemma", "gpt2", "gpt_neo", "gpt_neox", "granite", "llama", "mistral", "olmo", "olmo2", "phi", "phi3"),
    *("qwen2", "qwen3", "smollm3", "stablelm", "starcoder2"),
}

VOCAB_MULTIPLE = 64  # tensor cores are fastest with multiples of it
COUNTED_TEXTS, COUNTED_TOKENS = 2, 64  # the batch for which activations are counted


def pad_vocab_size(vocab_size: int) -> int:
    """The next multiple of 64."""
    return -(-vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


@dataclass(frozen=True)
class Shape:
    """A model's shape. Widths are in numbers of features."""

    num_layers: int
    width: int
    inner: int  # width of the MLP
    vocab_size: int  # rows of the embedding, padded
    num_parameters: int
    window: int
    model_type: str = "gpt_neo"
    adapted: int = 0  # sum of in_features + out_features over all linear layers but the head
    num_linear: int = 0  # linear layers without the head
    is_tied: bool = True  # the output layer's weight is the embedding's
    # Bytes per token that autograd saves for the backward pass without the logits, with weights of 2 and of 4 bytes;
    # (0, 0) if not counted.
    kept_bytes: tuple[float, float] = (0, 0)

    @property
    def is_packed(self) -> bool:
        """Whether texts are packed into one row, without padding."""
        return self.model_type in PACKED

    @property
    def embedding(self) -> int:
        return self.vocab_size * self.width

    @property
    def layer_parameters(self) -> int:
        """Parameters of one layer's attention and MLP, without biases and norms."""
        if self.model_type == "gpt_neo":
            return 4 * self.width**2 + 2 * self.width * self.inner
        rest = self.num_parameters - self.embedding * (1 if self.is_tied else 2)
        return rest // self.num_layers

    def products(self, mean_length: float) -> tuple[int, int, int, float]:
        """The arguments of `flops_per_token`. An untied embedding is a lookup and needs no FLOPs."""
        num_weights = self.num_parameters - (0 if self.is_tied else self.embedding)
        return num_weights, self.num_layers, self.width, mean_length


# As `_other_shape` counts it.
SMOLLM2_SHAPE = Shape(
    *(30, 576, 1536, 49152, 134515008, 8192, "llama"),
    adapted=305280,
    num_linear=210,
    kept_bytes=(793268, 1444660),
)


def read_shape(model_name_or_path: str) -> Shape | None:
    """The shape from a folder's config.json, from the table above or from the hub's cache; None if none has it."""
    if model_name_or_path == "demo":
        return gpt_neo_shape(DEMO_SHAPE)
    if (adapters := Path(model_name_or_path, ADAPTERS_CONFIG_FILE)).is_file():  # the shape of their base
        return read_shape(json.loads(adapters.read_text(encoding="utf-8")).get("base_model_name_or_path") or "")
    if model_name_or_path == SMOLLM2:
        return SMOLLM2_SHAPE
    path = Path(model_name_or_path, "config.json")
    if not path.is_file():
        if known := {name.lower(): shape for name, shape in HUB_SHAPES.items()}.get(model_name_or_path.lower()):
            return gpt_neo_shape(known)
        path = _find_in_hub(model_name_or_path)
    try:
        config = json.loads(path.read_text(encoding="utf-8")) if path else {}
    except (OSError, ValueError):
        return None
    if config.get("model_type") == "gpt_neo":
        return gpt_neo_shape(config) if {"num_layers", "hidden_size"} <= config.keys() else None
    return _other_shape(path.parent) if config else None


def _find_in_hub(name: str) -> Path | None:
    if name.count("/") > 1 or name.startswith((".", "/")):
        return None
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, "config.json")
    return Path(found) if isinstance(found, str) else None


def gpt_neo_shape(config: dict) -> Shape:
    """The shape of a GPT-Neo. With width w and vocabulary V its parameters are:

    - embeddings: V w + positions w; the head is tied to them
    - each layer: 4 w^2 + w (attention; one projection of four has a bias), 2 w inner + inner + w (MLP), 4 w (two norms)
    - the last norm: 2 w
    """
    width, num_layers = config["hidden_size"], config["num_layers"]
    inner = config.get("intermediate_size") or 4 * width
    vocab = pad_vocab_size(config.get("vocab_size", 50257))
    positions = config.get("max_position_embeddings", 2048)
    layer = 4 * width**2 + width + 2 * width * inner + inner + width + 4 * width
    return Shape(
        *(num_layers, width, inner, vocab, (vocab + positions) * width + num_layers * layer + 2 * width, positions),
        adapted=num_layers * (8 * width + 2 * (width + inner)),
        num_linear=6 * num_layers,
    )


def _other_shape(folder: Path) -> Shape | None:
    """The shape of another causal language model, built with fake tensors."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.pytorch_utils import Conv1D

    try:
        config = AutoConfig.from_pretrained(folder)
        with FakeTensorMode():
            dtypes = (torch.bfloat16, torch.float32)
            models = [AutoModelForCausalLM.from_config(config, dtype=dtype) for dtype in dtypes]
    except (OSError, ValueError, KeyError):
        return None
    config, model = config.get_text_config(), models[0]
    width = config.hidden_size
    inner = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * width
    window = getattr(config, "max_position_embeddings", None) or 2048
    vocab = pad_vocab_size(config.vocab_size)
    linear = [layer.weight.shape for layer in model.modules() if isinstance(layer, torch.nn.Linear | Conv1D)]
    adapted = [shape for shape in linear if shape[0] != config.vocab_size]
    head = model.get_output_embeddings()
    return Shape(
        *(config.num_hidden_layers, width, inner, vocab, model.num_parameters(), window),
        model_type=config.model_type,
        adapted=sum(map(sum, adapted)),
        num_linear=len(adapted),
        is_tied=head is None or head.weight is model.get_input_embeddings().weight,
        kept_bytes=tuple(_count_kept_bytes(model, min(window, COUNTED_TOKENS)) for model in models),
    )


def _count_kept_bytes(model, num_tokens: int) -> float:
    """Bytes per token that autograd saves in a forward pass of a model of fake tensors, without the weights.

    0 for a model that does not run on fake tensors.
    """
    import torch

    weights = {weight.untyped_storage()._cdata for weight in model.parameters()}
    kept = {}

    def remember(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage  # a reference, so that its address is not used again
        return tensor

    size = (COUNTED_TEXTS, num_tokens)
    try:
        with next(model.parameters()).fake_mode, torch.autograd.graph.saved_tensors_hooks(remember, lambda t: t):
            ones = torch.ones(size, dtype=torch.long)
            model.train()(input_ids=ones, attention_mask=ones, use_cache=False)
    except Exception:  # an architecture may need values; the plan then uses a formula
        return 0
    return sum(storage.nbytes() for storage in kept.values()) / (COUNTED_TEXTS * num_tokens)
