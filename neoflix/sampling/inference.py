"""A model made ready for sampling: eval mode, and faster modules with the same function."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.activations import NewGELUActivation
from transformers.pytorch_utils import Conv1D

from neoflix.runtime.console import say
from neoflix.runtime.errors import UserError
from neoflix.sampling.int8 import Int8Linear


@contextmanager
def eval_mode(model: PreTrainedModel) -> Iterator[None]:
    """Puts a model into eval mode, and at the end each of its modules back into the mode that it had."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, was_training in modes:
            module.training = was_training


class PackedLinear(nn.Module):
    """`nn.Linear` with its weight in the block layout of oneDNN's matrix products.

    In fp32 on a CPU (one core of a 2023 Xeon, GPT-Neo-125M's shapes) it is 1.3 times as fast with 20 rows, twice with
    12, and no faster with one. It is the operator that torch.compile uses for linear layers.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, num_rows: int):
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), num_rows)
        self.bias = bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


def optimize_for_inference(model: PreTrainedModel, num_rows: int, int8: bool = False) -> PreTrainedModel:
    """Replaces modules of a model by faster ones with the same function. The model cannot be trained or saved then.

    GELU becomes one kernel instead of eight. In fp32 on a CPU, linear layers are packed, unless `num_rows`, the number
    of texts written at once, is 1.

    Args:
        int8: linear layers compute with 8-bit integers instead, which rounds. For a model on a CPU.
    """
    packs = model.device.type == "cpu" and model.dtype == torch.float32 and num_rows > 1
    packs = packs and torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, NewGELUActivation):
                setattr(module, name, nn.GELU(approximate="tanh"))
            elif (packs or int8) and type(child) in (nn.Linear, Conv1D):
                weight = child.weight if type(child) is nn.Linear else child.weight.t()  # GPT-2's is transposed
                linear = Int8Linear(weight, child.bias) if int8 else PackedLinear(weight, child.bias, num_rows)
                setattr(module, name, linear)
    return model


def prepare(model: PreTrainedModel, num_rows: int, int8: bool, has_slots: bool) -> None:
    """Optimizes a model for this project's decoder. If it has no slots for the model, says so instead.

    Raises:
        UserError: if int8 is wanted for a model without slots.
    """
    kind = model.config.model_type
    if has_slots:
        optimize_for_inference(model, num_rows, int8)
    elif int8:
        raise UserError(f"--int8: transformers' generate samples {kind} models, without int8; leave it out")
    else:
        say(f"note: transformers' generate samples {kind} models, which is slower than this project's decoder")
