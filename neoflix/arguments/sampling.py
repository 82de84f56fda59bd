"""Sampling settings: names, defaults, and valid values."""

import math

from neoflix.runtime.errors import UserError

# A run saves these with its model (docs/sampling.md).
SAMPLING_DEFAULTS = {
    "temperature": 0.8,
    "top_k": 0,
    "top_p": 0.95,
    "repetition_penalty": 1.0,
    "max_new_tokens": 96,
}


SAMPLING_RULES = {
    "num_samples": (lambda v: v >= 1, "1 or more"),
    "batch_size": (lambda v: v >= 1, "1 or more"),
    "max_new_tokens": (lambda v: v >= 1, "1 or more"),
    "temperature": (lambda v: 0 < v < math.inf, "above 0 (--top_k 1 always samples the most likely token)"),
    "top_k": (lambda v: v >= 0, "0 (off) or more"),
    "top_p": (lambda v: 0 < v <= 1, "above 0 and at most 1"),
    "repetition_penalty": (lambda v: 0 < v < math.inf, "above 0 (1: none)"),
}


def check_sampling(said: str, name: str, value: float) -> None:
    """Raises UserError for a value that a sampling setting cannot have. `said` is the setting as it was typed."""
    holds, rule = SAMPLING_RULES[name]
    if not holds(value):
        raise UserError(f"{said}: must be {rule}")
