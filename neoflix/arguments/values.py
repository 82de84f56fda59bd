"""The values that a flag can have. Imports no torch."""

import argparse
import math

from neoflix.runtime.errors import UserError

YES, NO = ("yes", "true", "t", "y", "1"), ("no", "false", "f", "n", "0")


def yes_or_no(word: str) -> bool:
    """The type of a flag that is on or off."""
    if word.lower() not in YES + NO:
        raise argparse.ArgumentTypeError(f"{word!r} must be true or false")
    return word.lower() in YES


def tokens_or_auto(word: str) -> int | str:
    """The type of a flag that is a number of tokens, or 'auto'."""
    try:
        return word if word == "auto" else int(word)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{word!r} must be a number of tokens, or auto") from None


def yes_or_array(word: str) -> bool | str:
    """The type of --tune."""
    return word if word == "array" else yes_or_no(word)


def layers_or_auto(word: str) -> bool | int | str:
    """The type of a flag that is true (all layers), false, a number of layers from 2 on, or 'auto'."""
    if word.lower() in YES + NO:
        return word.lower() in YES
    if word != "auto" and not word.isdecimal():
        raise argparse.ArgumentTypeError(f"{word!r} must be true, false, auto or a number of layers")
    return word if word == "auto" else int(word)


_POSITIVE = (lambda v: 0 < v < math.inf, "above 0")
_NOT_NEGATIVE = (lambda v: 0 <= v < math.inf, "0 or more")
_AT_LEAST_1 = (lambda v: v >= 1, "1 or more")
_FRACTION = (lambda v: 0 <= v < 1, "at least 0 and below 1")
_SEED = (lambda v: 0 <= v < 2**32, "at least 0 and below 2**32")

NUMBER_RULES = {
    "validation_fraction": _FRACTION,
    "max_length": (lambda v: v >= 3, "3 or more (two are special tokens)"),
    "early_stopping_patience": _NOT_NEGATIVE,
    "lora_rank": _POSITIVE,
    "lora_alpha": _POSITIVE,
    "num_progress_samples": (lambda v: v >= 0, "0 (none) or more"),
    "per_device_train_batch_size": _AT_LEAST_1,
    "per_device_eval_batch_size": _AT_LEAST_1,
    "gradient_accumulation_steps": _AT_LEAST_1,
    "num_train_epochs": _POSITIVE,
    "max_steps": (lambda v: v == -1 or v >= 1, "1 or more (or -1: as many as --num_train_epochs takes)"),
    "learning_rate": _POSITIVE,
    "tune_steps": (lambda v: v >= 4, "4 or more"),
    "warmup_steps": _NOT_NEGATIVE,
    "weight_decay": _NOT_NEGATIVE,
    "adam_beta1": _FRACTION,
    "adam_beta2": _FRACTION,
    "adam_epsilon": _POSITIVE,
    "max_grad_norm": (lambda v: 0 <= v < math.inf, "0 (no clipping) or more"),
    "logging_steps": _POSITIVE,
    "eval_steps": _POSITIVE,
    "save_steps": _POSITIVE,
    "eval_delay": _NOT_NEGATIVE,
    "save_total_limit": (lambda v: v >= 1, "1 or more (in a recipe, null keeps all checkpoints)"),
    "seed": _SEED,
    "data_seed": _SEED,
    "dataloader_num_workers": _NOT_NEGATIVE,
    "dataloader_prefetch_factor": _AT_LEAST_1,
    "torch_empty_cache_steps": _AT_LEAST_1,
    "ddp_timeout": _AT_LEAST_1,
}


def check_numbers(flags) -> None:
    """Raises UserError for a number that no run can use. Flags that are not set are skipped."""
    for name, (is_valid, rule) in NUMBER_RULES.items():
        value = getattr(flags, name, None)
        if value is not None and not is_valid(value):
            raise UserError(f"{as_typed(name, value)}: must be {rule}")


def as_typed(name: str, value) -> str:
    """A flag and its value as a user types them."""
    shown = str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else value
    return f"--{name} {shown}"
