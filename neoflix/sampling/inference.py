"""A model made ready for sampling: fused projections."""

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.activations import NewGELUActivation


class PackedLinear(nn.Module):
    """`nn.Linear` with its weight in the blocks that oneDNN's products take.

    On a CPU in fp32 (one core of a 2023 Xeon, GPT-Neo-125M's shapes) 1.3 times as fast with 20 rows, twice with 12,
    not at all with one. The operator is the one that torch.compile puts in a linear layer's place.
    """

    def __init__(self, linear: nn.Linear, num_rows: int):
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), num_rows)
        self.bias = linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


def optimize_for_inference(model: PreTrainedModel, num_rows: int) -> PreTrainedModel:
    """Puts faster modules of the same function into a model that only samples: GELU in one kernel instead of eight;
    in fp32 on a CPU, linear layers packed for `num_rows` texts side by side."""
    packs = model.device.type == "cpu" and model.dtype == torch.float32 and num_rows > 1
    packs = packs and torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, NewGELUActivation):
                setattr(module, name, nn.GELU(approximate="tanh"))
            elif packs and type(child) is nn.Linear:
                setattr(module, name, PackedLinear(child, num_rows))
    return model
