"""The update of `CompactAdamW`, the format of its states, and how it rounds.

A small learning rate moves a bf16 weight by less than half of its last bit, so that plain bf16 training stands still.
Here a weight has 23 bits: its bf16 value, with which the model computes, and 7 more bits of an fp32 mantissa. The first
moment is a sign and a 7-bit logarithm, the second an 8-bit logarithm, both in eighths of an octave below the largest
value of their block of 128, which is kept in fp32.

Each of the three is rounded up or down such that the mean over many steps is exact. The choice follows a
low-discrepancy sequence (Weyl, 1916) of the step's and the element's number, not a random generator: a resumed run
continues bit for bit, all processes round alike, and the error is smaller. docs/speed.md has the figures.

The 23 bits are not rounded to the nearest bf16 value either. A model that is loaded in bf16 would compute with the same
weights until they have moved by half of their last bit. Each weight has its own threshold (ordered dithering), so that
after a tenth of a bit a tenth of the weights has changed.
"""

import math

import torch
from torch import Tensor

BLOCK = 128  # elements with a common scale
PER_OCTAVE = 8  # levels of a logarithm
MOMENT_LEVELS, SQUARE_LEVELS = 127, 255  # 16 and 32 octaves
# Of the sequence that decides how to round. Triton computes positions with 32 bits, whose overflow 2^24 divides.
PERIOD, PER_ELEMENT = 2**24, 0x5BD1E9
MIX = 0xC13FA9  # makes another sequence of this one: thresholds that do not follow the dither


def block_of(parameter: Tensor) -> int:
    """Elements of a block: BLOCK, or fewer for a parameter whose size is not a multiple of it."""
    return math.gcd(parameter.numel(), BLOCK)


def empty_state(parameter: Tensor) -> dict:
    count, block = parameter.numel(), block_of(parameter)

    def zeros(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=parameter.device)

    return {
        "step": 0,
        "low_bits": zeros(count, dtype=torch.int8),
        "exp_avg": zeros(count, dtype=torch.int8),
        "exp_avg_max": zeros(count // block, 1, dtype=torch.float32),
        "exp_avg_sq": zeros(count, dtype=torch.uint8),
        "exp_avg_sq_max": zeros(count // block, 1, dtype=torch.float32),
    }


def phase_of(step: int) -> int:
    """How far the sequence has advanced: by the golden ratio with each step, in units of 2^-24."""
    return step * 0x9E3779 % PERIOD


def place_of(element: int) -> int:
    """Where the sequence stands at an element before the first step."""
    return element * PER_ELEMENT % PERIOD


def update(
    weight: Tensor,
    grad: Tensor,
    low_bits: Tensor,
    moment: Tensor,
    square: Tensor,
    moment_max: Tensor,
    square_max: Tensor,
    kept: Tensor,
    rate: Tensor,
    one_minus_beta1: Tensor,
    one_minus_beta2: Tensor,
    square_scale: Tensor,
    eps: Tensor,
    phase: Tensor,
    place: Tensor,
) -> None:
    """One step of AdamW, in place.

    Args:
        weight, grad, low_bits, moment, square: [blocks, block]: bf16, any float, int8, int8, uint8.
        moment_max, square_max: [blocks, 1], fp32.
        kept: what weight decay leaves of a weight.
        rate: learning rate, corrected for the bias of the first moment.
        square_scale: factor for the root of the second moment, against its bias.
        phase, place: of the step and of the first element, in the sequence that decides how to round.
    """
    places = torch.arange(weight.numel(), device=weight.device).view(weight.shape)
    places = (places * PER_ELEMENT + place) & (PERIOD - 1)
    dither = (places + phase) & (PERIOD - 1)
    grad = grad.float()
    mean = decode(moment.abs(), moment_max, MOMENT_LEVELS) * moment.sign()
    mean = mean + (grad - mean) * one_minus_beta1
    variance = decode(square, square_max, SQUARE_LEVELS)
    variance = variance + (grad * grad - variance) * one_minus_beta2
    value = join_bits(weight, low_bits) * kept
    value = value - rate * mean / (variance.sqrt() * square_scale + eps)

    high, low = split_bits(value, dither, places)
    weight.copy_(high)
    low_bits.copy_(low)
    codes, largest = encode(mean.abs(), dither, MOMENT_LEVELS)
    moment.copy_(codes * mean.sign())
    moment_max.copy_(largest)
    codes, largest = encode(variance, dither ^ (PERIOD // 2), SQUARE_LEVELS)
    square.copy_(codes.clamp(min=1))  # a vanished variance would make a step too large
    square_max.copy_(largest)


def join_bits(weight: Tensor, low_bits: Tensor) -> Tensor:
    """bf16 values, and what is to be added to them in units of 1/128 of their last bit -> fp32."""
    high = weight.view(torch.int16).int() << 16
    return (high + (low_bits.int() << 9)).view(torch.float32)


def split_bits(value: Tensor, dither: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    """fp32 -> bf16 values and the rest, which `dither` rounds to the 7 bits that follow.

    The bf16 value is the lower neighbour, or the upper one if the rest reaches a threshold, which depends on the
    element's place alone.
    """
    bits = value.view(torch.int32)
    bits = (bits + (dither >> 15).int()) & ~0x1FF
    thresholds = (places * MIX & (PERIOD - 1)) >> 17 << 9
    high = (bits + thresholds.int()) >> 16
    return high.to(torch.int16).view(torch.bfloat16), ((bits - (high << 16)) >> 9).to(torch.int8)


def decode(codes: Tensor, largest: Tensor, num_levels: int) -> Tensor:
    """Codes [blocks, block] -> values: `largest` for the code `num_levels`, an octave less for each PER_OCTAVE below
    it, and 0 for 0."""
    values = torch.exp2((codes.float() - num_levels) / PER_OCTAVE) * largest
    return torch.where(codes > 0, values, 0.0)


def encode(values: Tensor, dither: Tensor, num_levels: int) -> tuple[Tensor, Tensor]:
    """Non-negative values [blocks, block] -> (codes in fp32, the largest value of each block).

    A value between two levels gets the upper one in that share of cases in which the mean is the value.
    """
    largest = values.amax(dim=1, keepdim=True)
    relative = torch.where(largest > 0, values / largest, 0.0)
    below = (-torch.log2(relative) * PER_OCTAVE).floor().clamp(0, num_levels - 1)  # levels below the top
    upper = torch.exp2(-below / PER_OCTAVE)
    lower = torch.where(below < num_levels - 1, torch.exp2(-(below + 1) / PER_OCTAVE), 0.0)
    goes_up = dither.float() / PERIOD < (relative - lower) / (upper - lower)
    return num_levels - below - (~goes_up).float(), largest
