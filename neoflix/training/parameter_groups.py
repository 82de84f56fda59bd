"""The optimizer's parameter groups, as Trainer makes them."""

from pathlib import Path

import torch

from neoflix.checkpoints.manifest import read_manifest
from neoflix.runtime.errors import UserError


def group_parameters(model: torch.nn.Module, decay_names: list[str], weight_decay: float) -> list[dict]:
    """Returns Trainer's parameter groups: matrices are decayed, biases and normalization layers aren't.

    Where the DeepSpeed file has an `optimizer` block, transformers hands DeepSpeed all parameters in one group, and
    every parameter is decayed.

    Args:
        decay_names: names of the decayed parameters, by `Trainer.get_decay_parameter_names`.

    Returns:
        One or two groups. Frozen parameters are left out, and so is a group without parameters.
    """
    decayed, rest = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (decayed if name in decay_names else rest).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def check_groups(checkpoint: Path, num_groups: int) -> None:
    """UserError where the optimizer in a checkpoint has another number of parameter groups than the one to load it."""
    saved = read_manifest(checkpoint).get("optimizer_groups", 1)  # absent in older checkpoints: all in one group
    if saved != num_groups:
        raise UserError(
            f"{checkpoint} was saved by an earlier version, whose weight decay also covered biases and normalization "
            "layers, and its optimizer cannot be resumed; start again in another --output_dir, with "
            f"--model_name_or_path {checkpoint} to keep what it learned"
        )
