"""Where a model comes from: whether the hub can be reached, and what its files may hold."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import transformers
from huggingface_hub import is_offline_mode, try_to_load_from_cache
from huggingface_hub.constants import ENDPOINT
from safetensors import SafetensorError
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    PreTrainedConfig,
)
from transformers.utils import (
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
    cached_file,
    has_file,
)

from neoflix.runtime.errors import UserError

HUB_TIMEOUT = 10  # seconds


def check_reachable(model_name_or_path: str) -> None:
    """UserError, within seconds, for a model that is not here while the hub cannot be reached (the hub's own library
    tries for most of a minute before it says so). Whether the hub has such a model is not asked."""
    name = model_name_or_path
    if is_offline_mode() or Path(name).exists() or name.count("/") > 1:
        return
    if isinstance(try_to_load_from_cache(name, "config.json"), str):
        return
    try:
        urlopen(Request(ENDPOINT, method="HEAD"), timeout=HUB_TIMEOUT).close()
    except HTTPError:
        return  # it answers
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise UserError(
            f"--model_name_or_path {name}: no such folder here, and {ENDPOINT} cannot be reached ({reason}); connect "
            "to a network, or name a folder that holds the model"
        ) from error


def check_architecture(config: PreTrainedConfig, named: str) -> None:
    """UserError for a model that does not continue text, or not only; it begins with how the user `named` the model."""
    kind, cure = f"{named}: a {config.model_type} model", "use a causal language model (docs/loading.md has a list)"
    if config.is_encoder_decoder:
        raise UserError(f"{kind} has an encoder and a decoder; {cure}")
    if config.get_text_config() is not config or hasattr(config, "vision_config"):
        raise UserError(f"{kind} reads images or sound as well as text; {cure}")
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UserError(f"{kind} has no head for causal language modeling in transformers; {cure}")


def find_pickle(model_name_or_path: str, config: PreTrainedConfig) -> str | None:
    """The pickled file that transformers would read weights from; None where it finds safetensors, or nothing.

    `use_safetensors=True` alone would not do: config.json may name a file, and so may an index of safetensors.
    """
    named = getattr(config, "transformers_weights", None)
    known = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME, WEIGHTS_INDEX_NAME)  # in transformers' order
    file = named or next((file for file in known if has_file(model_name_or_path, file)), None)
    files = [file] if file else []
    if file and file.endswith(".safetensors.index.json"):
        index = json.loads(Path(cached_file(model_name_or_path, file)).read_text(encoding="utf-8"))
        files = sorted(set(index.get("weight_map", {}).values()))
    return next((file for file in files if not file.endswith(".safetensors")), None)


@contextmanager
def _in_one_sentence(model_name_or_path: str) -> Iterator[None]:
    """Turns what transformers raises where there is no model into a UserError that says what is missing."""
    try:
        yield
    except (OSError, ValueError, SafetensorError, UnpicklingError) as error:
        folder = Path(model_name_or_path)
        if isinstance(error, UnpicklingError):
            cure = "its pickled weights hold more than tensors, or are broken; they are not read"
        elif "trust_remote_code" in str(error):
            cure = "it comes with code of its own, which is not run; take a model that transformers knows"
        elif "does not recognize this architecture" in str(error):
            cure = f"transformers {transformers.__version__} does not know its architecture; use a model that it knows"
        elif folder.is_dir():
            found = ", ".join(sorted(path.name for path in folder.iterdir())) or "nothing"
            cure = f"a model's folder needs config.json and weights (model.safetensors); this one has {found}"
        else:
            cure = "no such folder here, and the hub could not be reached or has no such model"
        raise UserError(f"--model_name_or_path {model_name_or_path}: {cure}") from error
