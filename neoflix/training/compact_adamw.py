"""AdamW for bf16 weights, with states of 3.06 bytes per parameter where fp32 states take 12.

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
from collections import defaultdict
from collections.abc import Callable
from functools import cache, partial

import torch
from torch import Tensor
from torch.utils._triton import has_triton

BLOCK = 128  # elements with a common scale
PER_OCTAVE = 8  # levels of a logarithm
MOMENT_LEVELS, SQUARE_LEVELS = 127, 255  # 16 and 32 octaves
# Of the sequence that decides how to round. Triton computes positions with 32 bits, whose overflow 2^24 divides.
PERIOD, PER_ELEMENT = 2**24, 0x5BD1E9
MIX = 0xC13FA9  # makes another sequence of this one: thresholds that do not follow the dither

# Elements that are updated at a time without a compiler: on a CPU intermediate results stay in its cache, on a GPU they
# take 0.3 GiB.
CHUNK = {"cpu": 2**16, "cuda": 2**22}


class CompactAdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov and Hutter, 2019) for bf16 parameters; `torch.optim.AdamW` but for the rounding.

    On CUDA one kernel updates a parameter; torch.compile makes it, with Triton.

    Raises:
        ValueError: a parameter is not in bf16.
    """

    def __init__(self, params, lr: float, betas: tuple[float, float], eps: float, weight_decay: float):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self._norms: list[Tensor] = []  # of the gradients that this backward pass has freed
        if wrong := {p.dtype for group in self.param_groups for p in group["params"]} - {torch.bfloat16}:
            raise ValueError(f"CompactAdamW trains parameters in bf16, not in {wrong.pop()}")

    @classmethod
    def from_arguments(cls, groups: list[dict], args) -> "CompactAdamW":
        """With the settings of `TrainArguments`."""
        betas = (args.adam_beta1, args.adam_beta2)
        optimizer = cls(groups, args.learning_rate, betas, args.adam_epsilon, args.weight_decay)
        if args.updates_in_backward:
            optimizer.update_in_backward(args.max_grad_norm)
        return optimizer

    def update_in_backward(self, max_norm: float) -> None:
        """From now on the backward pass updates each parameter once its gradient is there, and frees the gradient (as
        LOMO does, Lv et al., 2023). `step` only ends the step.

        The norm of all gradients is known only when all of them are freed. So they are clipped by the norm of the step
        before; those of the first step are not clipped.

        Args:
            max_norm: 0 for no clipping.
        """
        self._max_norm, self._norms = max_norm, []
        for index, group in enumerate(self.param_groups):
            group["clip_factor"] = torch.ones((), device=group["params"][0].device)
            for parameter in group["params"]:
                parameter.register_post_accumulate_grad_hook(partial(self._update_and_free, index))

    @torch.no_grad()
    def _update_and_free(self, index: int, parameter: Tensor) -> None:
        group = self.param_groups[index]  # loading a state replaces the groups
        self._norms.append(torch.linalg.vector_norm(parameter.grad, dtype=torch.float32))
        if self._max_norm:
            parameter.grad.mul_(group["clip_factor"])
        self._update(parameter, group)
        parameter.grad = None

    def _end_step(self) -> None:
        norm, factor = clip_factor(self._norms, self._max_norm)
        self._global_grad_norm = norm  # DeepSpeed reads it, to be logged
        self._norms.clear()
        if self._max_norm:
            for group in self.param_groups:
                group["clip_factor"] = factor

    @torch.no_grad()
    def step(self, closure: Callable | None = None):
        """Updates every parameter that has a gradient. The host does not wait for the device."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)
        if self._norms:
            self._end_step()
        return loss

    def allocate_states(self) -> None:
        """Allocates all states. If the first step did, they would lie between what the passes before it have freed, and
        the holes would stay."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.requires_grad:
                    self._state_of(parameter)

    def _state_of(self, parameter: Tensor) -> dict:
        if not self.state[parameter]:
            self.state[parameter] |= empty_state(parameter)
        return self.state[parameter]

    def _update(self, parameter: Tensor, group: dict) -> None:
        state = self._state_of(parameter)
        state["step"] += 1
        step, (beta1, beta2) = state["step"], group["betas"]
        numbers = (
            1 - group["lr"] * group["weight_decay"],
            group["lr"] / (1 - beta1**step),
            1 - beta1,
            1 - beta2,
            1 / math.sqrt(1 - beta2**step),
            group["eps"],
        )
        # Tensors of the host are arguments of a kernel: new values neither compile it anew nor wait for a copy.
        numbers = [torch.tensor(number, dtype=torch.float32) for number in numbers]
        phase = torch.tensor(phase_of(step))
        block = block_of(parameter)
        whole = [parameter, parameter.grad, state["low_bits"], state["exp_avg"], state["exp_avg_sq"]]
        tensors = [tensor.view(-1, block) for tensor in whole]
        tensors += [state["exp_avg_max"], state["exp_avg_sq_max"]]
        if parameter.is_cuda and has_triton():
            compiled_update()(*tensors, *numbers, phase, torch.tensor(0))
            return
        rows = max(CHUNK[parameter.device.type] // block, 1)
        for first in range(0, len(tensors[0]), rows):
            place = torch.tensor(place_of(first * block))
            update(*(tensor[first : first + rows] for tensor in tensors), *numbers, phase, place)

    def load_state_dict(self, state_dict: dict) -> None:
        """torch's own would cast every state to the parameter's dtype."""
        super().load_state_dict(state_dict | {"state": {}})
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for group in self.param_groups:
            if "clip_factor" in group:
                group["clip_factor"] = group["clip_factor"].to(parameters[0].device)
        self.state = defaultdict(dict)
        for index, state in state_dict["state"].items():
            device = parameters[index].device
            self.state[parameters[index]] = {
                name: value.to(device, copy=True) if isinstance(value, Tensor) else value
                for name, value in state.items()
            }


def clip_factor(norms: list[Tensor], max_norm: float) -> tuple[Tensor, Tensor]:
    """(the norm of all gradients, the factor that clips them to `max_norm`), by the norm of each, in fp32."""
    norm = torch.linalg.vector_norm(torch.stack(norms))
    return norm, (max_norm / (norm + 1e-6)).clamp(max=1)


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


@cache
def compiled_update() -> Callable:
    return torch.compile(update, fullgraph=True)


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
