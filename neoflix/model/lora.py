"""LoRA: fine-tuning by small adapters beside frozen weights (Hu et al., "LoRA", 2021), through `peft`.

Each linear layer but the head gets two narrow layers, whose product is added to its output. Only these have gradients
and optimizer states. A checkpoint is the adapters, a few megabytes, and the name of the base model. The embeddings are
not trained. The rows of new tokens are computed again when adapters are loaded (`resize_embeddings`).
"""

import json
import warnings
from contextlib import nullcontext
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled

from neoflix.model.folder import ADAPTERS_CONFIG_FILE, ADAPTERS_FILE
from neoflix.runtime.errors import UserError

SPARE_ROWS = "spare_rows"  # in an adapter file's metadata; absent in files from before spare rows were filled


def add_adapters(model: PreTrainedModel, rank: int, alpha: float, base: str):
    """Wraps `model` in a `peft.PeftModel`: its weights are frozen, each linear layer but the head gets an adapter.

    The adapters start with a product of zero, so the model's output is unchanged. They have the dtype of the weights;
    DeepSpeed keeps an fp32 copy of them in half precision, as of all trainable weights.

    Args:
        rank: width of an adapter.
        alpha: an adapter's product is multiplied by alpha / rank.
        base: hub name or folder of `model`, which is saved with the adapters.
    """
    from peft import LoraConfig

    config = LoraConfig(task_type="CAUSAL_LM", r=rank, lora_alpha=alpha, target_modules="all-linear")
    torch.manual_seed(torch.initial_seed())  # the adapters depend on the seed, not on how the model was loaded
    adapted = _wrap(model, config)
    config.base_model_name_or_path = str(Path(base).resolve()) if Path(base).is_dir() else base
    return adapted


def _wrap(model: PreTrainedModel, config):
    from peft import get_peft_model

    with warnings.catch_warnings():  # peft 0.21.2 uses a name that transformers 6 will drop
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        return get_peft_model(model, config, autocast_adapter_dtype=False)


def has_adapters(model) -> bool:
    """Whether a model is wrapped in adapters."""
    return hasattr(model, "peft_config")


def collect_adapters(model) -> dict[str, torch.Tensor]:
    """The adapters' weights by their names in `peft`'s files, gathered under ZeRO-3. Collective: all ranks call it."""
    from peft import get_peft_model_state_dict

    weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    with _gathered(list(weights.values())):
        copies = {name: weight.detach().cpu().clone() for name, weight in weights.items()}
    return get_peft_model_state_dict(model, state_dict=copies, save_embedding_layers=False)


def _gathered(weights: list[torch.Tensor]):
    if not is_deepspeed_zero3_enabled():
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(weights)


def save_adapters(model, weights: dict[str, torch.Tensor], folder: Path) -> None:
    """Writes adapters as `peft` does, but without a request to the hub about the base. Only one process calls it."""
    save_file(weights, folder / ADAPTERS_FILE, metadata={"format": "pt", SPARE_ROWS: "filled"})
    model.peft_config["default"].save_pretrained(str(folder))
    model.generation_config.save_pretrained(folder)


def read_adapters(folder: str | Path) -> tuple[str, torch.dtype, bool]:
    """(hub name or folder of the base model, dtype of the adapters, whether new tokens in the base's spare rows were
    filled when they were trained).

    Raises:
        UserError: if the adapters are corrupt, or not LoRA adapters.
    """
    try:
        config = json.loads(Path(folder, ADAPTERS_CONFIG_FILE).read_text(encoding="utf-8"))
        with safe_open(Path(folder, ADAPTERS_FILE), "pt") as file:
            dtype = file.get_tensor(next(iter(file.keys()))).dtype
            fills_spare_rows = SPARE_ROWS in (file.metadata() or {})
    except (OSError, ValueError, StopIteration, SafetensorError) as error:
        raise UserError(f"{folder}: its adapters cannot be read ({error})") from error
    kind, base = config.get("peft_type"), config.get("base_model_name_or_path")
    if kind != "LORA" or config.get("megatron_config") or not base:
        raise UserError(f"{folder}: its adapters must be LoRA with a named base model, and are {kind} with base {base}")
    return base, dtype, fills_spare_rows


def check_spare_rows(model, checkpoint: Path) -> None:
    """Checks that a checkpoint's adapters were trained with the rows that new tokens have in this model.

    Raises:
        UserError: if they were trained before spare rows were filled.
    """
    if has_adapters(model) and getattr(model, "filled_spare_rows", False) and not read_adapters(checkpoint)[2]:
        raise UserError(
            f"{checkpoint}: its adapters were trained by an older version, which did not initialize new tokens in the "
            "base model's spare rows; train in another --output_dir (sampling and exports still work)"
        )


def merge_adapters(model: PreTrainedModel, folder: str | Path) -> PreTrainedModel:
    """Adds a folder's adapters to the model's own weights, in place, and returns the model without adapters.

    Raises:
        UserError: if the adapters do not fit the model.
    """
    from peft import LoraConfig, set_peft_model_state_dict

    config = LoraConfig.from_pretrained(str(folder))
    config.base_model_name_or_path = None  # peft warns about a base that is itself a run's folder
    adapted = _wrap(model, config)
    try:
        outcome = set_peft_model_state_dict(adapted, load_file(Path(folder, ADAPTERS_FILE)))
    except RuntimeError as error:  # another shape
        raise UserError(f"{folder}: its adapters do not fit its base model") from error
    if outcome.unexpected_keys or any("lora_" in name for name in outcome.missing_keys):
        raise UserError(f"{folder}: its adapters do not fit its base model")
    return adapted.merge_and_unload()
