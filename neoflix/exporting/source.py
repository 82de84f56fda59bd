"""What is exported: a run's model and its tokenizer."""

import json
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from neoflix.checkpoints.find import find_model
from neoflix.data.tokenizer import read_tokenizer
from neoflix.model.folder import holds_adapters
from neoflix.model.load import load_pretrained
from neoflix.runtime.errors import UserError


class Supported(NamedTuple):
    """The models that can be exported.

    Attributes:
        model_types: as in config.json.
        purpose: the end of the sentence "only a gpt_neo ...".
    """

    model_types: tuple[str, ...]
    purpose: str


def find_source(run: str, supported: Supported) -> Path:
    """The folder of a run's best model, or a checkpoint. Nothing is loaded, so a wrong architecture is refused early.

    Raises:
        UserError: if there is no model, or it is of another architecture.
    """
    folder = find_model(run, "RUN")
    if not holds_adapters(folder):  # otherwise the base model's is checked, once it is loaded
        saved = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        check_model_type(saved.get("model_type"), folder, supported)
    return folder


def load_source(
    folder: Path, dtype: str | torch.dtype, allow_pickle: bool, supported: Supported
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A folder's model, with LoRA adapters merged, and its tokenizer. Arguments as for `load_pretrained`.

    Raises:
        UserError: if the model is of another architecture, or the tokenizer does not fit it.
    """
    model = load_pretrained(str(folder), dtype, allow_pickle).eval()
    tokenizer = read_tokenizer(folder, f"RUN {folder}")
    check_model_type(model.config.model_type, folder, supported)
    rows = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > rows:
        raise UserError(f"RUN {folder}: its tokenizer has {len(tokenizer):,} tokens, its model {rows:,}")
    return model, tokenizer


def check_model_type(model_type: str | None, folder: Path, supported: Supported) -> None:
    """Raises UserError unless the model's type is supported."""
    if model_type not in supported.model_types:
        names = " or ".join(supported.model_types)
        raise UserError(f"RUN {folder}: its model is a {model_type}; only a {names} {supported.purpose}")
