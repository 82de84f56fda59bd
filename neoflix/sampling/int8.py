"""Linear layers in 8-bit integers, for CPUs with instructions for these (VNNI, AMX).

Shapes: M rows, K input features, N output features, S features of a block.
"""

import torch
from torch import nn

from neoflix.runtime.console import say
from neoflix.runtime.errors import UserError
from neoflix.runtime.hardware import has_gpu

LARGEST_BLOCK = 64
INSTRUCTIONS = ("avx512_vnni", "avx_vnni", "amx_int8")


class Int8Linear(nn.Module):
    """A linear layer with 8-bit weights, one scale per output, and 8-bit inputs, one scale per row.

    A few features of a Transformer are many times as large as the others, so that 8 bits with one scale lose most of a
    row. Weights and inputs are therefore multiplied by the same orthogonal matrix first: Hadamard's, in blocks. It
    spreads a large feature over its block, and cancels out in the product (Ashkboos et al., "QuaRot", NeurIPS 2024).
    Sums of integers are exact, so that a row of the result does not depend on the other rows.

    Args:
        weight: [N, K]
        bias: [N] or None
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None):
        super().__init__()
        self.rotation_SS = hadamard(find_block(weight.shape[1]))
        rotated_NK = self._rotate(weight.detach().float())
        scale_N1 = _scale(rotated_NK)
        self.weight = (rotated_NK / scale_N1).round().to(torch.int8)
        self.scale_N, self.bias = scale_N1.squeeze(1), bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rotated_MK = self._rotate(x)
        scale_M1 = _scale(rotated_MK)
        rounded_MK = (rotated_MK / scale_M1).round_().to(torch.int8)
        y_MN = torch._int_mm(rounded_MK, self.weight.t()) * scale_M1
        y_MN = y_MN.mul_(self.scale_N) if self.bias is None else torch.addcmul(self.bias, y_MN, self.scale_N)
        return y_MN.unflatten(0, x.shape[:-1])

    def _rotate(self, x: torch.Tensor) -> torch.Tensor:
        """[..., K] -> [M, K]"""
        return (x.reshape(-1, len(self.rotation_SS)) @ self.rotation_SS).view(-1, x.shape[-1])


def _scale(x_MK: torch.Tensor) -> torch.Tensor:
    """[M, 1]: what an integer stands for, so that a row's largest value becomes 127 or -127."""
    return x_MK.abs().amax(1, keepdim=True).clamp_(min=1e-30) / 127


def find_block(num_features: int) -> int:
    """The largest power of two, at most 64, that divides the number of features."""
    return min(num_features & -num_features, LARGEST_BLOCK)


def hadamard(size: int) -> torch.Tensor:
    """[size, size]: Sylvester's orthogonal matrix; its entries are equal but for their signs. `size`: a power of 2."""
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return matrix / size**0.5


def check_int8(device: str | None) -> None:
    """Raises UserError if the device is a GPU; None is the GPU if there is one. Says so if this CPU lacks the
    instructions: int8 is slower then."""
    if device != "cpu" and (device or has_gpu()):
        raise UserError("--int8: is for sampling on a CPU; leave it out, or set CUDA_VISIBLE_DEVICES=")
    if not any(torch.cpu.get_capabilities().get(name) for name in INSTRUCTIONS):
        say("note: this CPU has no instructions for --int8 (AVX-512 VNNI, AVX-VNNI or AMX), so it is slower than fp32")
