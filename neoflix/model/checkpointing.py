"""Activation checkpointing of a part of the layers."""

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer


def recompute_first_layers(model: nn.Module, count: int | None) -> None:
    """Restricts activation checkpointing, which Trainer turns on for all layers, to the first `count`; None: to none.

    The first ones, because the backward pass reaches them last, when nearly all gradients are in memory. Results are
    the same for any number.
    """
    if count is None:
        return
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    for index, layer in enumerate(layers):
        layer.gradient_checkpointing = index < count
