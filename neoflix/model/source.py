"""Where a model comes from: checks of the hub, of its architecture and of its files."""

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
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig
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
    """Checks that the hub can be reached, if the model is neither a folder nor in the hub's cache.

    This takes at most 10 seconds, where huggingface_hub retries for most of a minute. It does not check that the hub
    has the model.

    Raises:
        UserError: if the hub cannot be reached.
    """
    name = model_name_or_path
    if is_offline_mode() or Path(name).exists() or name.count("/") > 1:
        return
    if isinstance(try_to_load_from_cache(name, "config.json"), str):
        return
    try:
        urlopen(Request(ENDPOINT, method="HEAD"), timeout=HUB_TIMEOUT).close()
    except HTTPError:
        return  # it answered
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise UserError(
            f"--model_name_or_path {name}: not a folder, and {ENDPOINT} cannot be reached ({reason}); connect "
            "to a network, or use a folder with the model"
        ) from error


def check_architecture(config: PreTrainedConfig, named: str) -> None:
    """Checks that a model is a causal language model of text alone.

    Args:
        named: how the user named the model, which the error begins with.

    Raises:
        UserError: if it is not.
    """
    kind, cure = f"{named}: a {config.model_type} model", "use a causal language model (docs/loading.md has a list)"
    if config.is_encoder_decoder:
        raise UserError(f"{kind} has an encoder and a decoder; {cure}")
    if config.get_text_config() is not config or hasattr(config, "vision_config"):
        raise UserError(f"{kind} also reads images or sound; {cure}")
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UserError(f"{kind} has no head for causal language modeling in transformers; {cure}")


def find_pickle(model_name_or_path: str, config: PreTrainedConfig) -> str | None:
    """The pickled file that transformers would read weights from; None if it finds safetensors, or nothing.

    `use_safetensors=True` is not enough: config.json or a safetensors index may name a pickled file.
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
def explain_loading_errors(model_name_or_path: str) -> Iterator[None]:
    """Turns an error of transformers while it loads a model into a UserError with the cause."""
    try:
        yield
    except (OSError, ValueError, SafetensorError, UnpicklingError) as error:
        cause = _find_cause(model_name_or_path, error)
        raise UserError(f"--model_name_or_path {model_name_or_path}: {cause}") from error


def _find_cause(model_name_or_path: str, error: Exception) -> str:
    folder = Path(model_name_or_path)
    if isinstance(error, UnpicklingError):
        return "its pickled weights contain more than tensors, or are corrupt, and are not read"
    if "trust_remote_code" in str(error):
        return "it needs its own code, which is not run; use a model that transformers supports"
    if "does not recognize this architecture" in str(error):
        return f"transformers {transformers.__version__} does not support its architecture; use another model"
    if folder.is_dir():
        found = ", ".join(sorted(path.name for path in folder.iterdir())) or "no files"
        return f"a model's folder needs config.json and weights (model.safetensors), and this one has {found}"
    return "not a folder, and the hub has no such model or cannot be reached"
