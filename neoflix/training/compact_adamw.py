"""AdamW for bf16 weights, with states of 3.06 bytes per parameter where fp32 states take 12.

`compact_update.py` has their format.
"""

import math
from collections import defaultdict
from collections.abc import Callable
from functools import cache, partial

import torch
from torch import Tensor
from torch.utils._triton import has_triton

from neoflix.training.compact_update import block_of, empty_state, phase_of, place_of, update

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
        before, and those of the first step are not clipped; or by their own, after `measure_norm`.

        Args:
            max_norm: 0 for no clipping.
        """
        self._max_norm, self._norms, self._updates = max_norm, [], True
        for index, group in enumerate(self.param_groups):
            group["clip_factor"] = torch.ones((), device=group["params"][0].device)
            for parameter in group["params"]:
                parameter.register_post_accumulate_grad_hook(partial(self._update_and_free, index))

    @torch.no_grad()
    def _update_and_free(self, index: int, parameter: Tensor) -> None:
        group = self.param_groups[index]  # loading a state replaces the groups
        self._norms.append(torch.linalg.vector_norm(parameter.grad, dtype=torch.float32))
        if self._updates:
            if self._max_norm:
                parameter.grad.mul_(group["clip_factor"])
            self._update(parameter, group)
        parameter.grad = None

    def measure_norm(self, compute_loss: Callable[[], Tensor]) -> None:
        """Runs a forward and a backward pass that update nothing. The next backward pass, which must be of the same
        loss, clips by their gradients' norm. Random numbers will be drawn again."""
        device = self.param_groups[0]["params"][0].device
        self._updates = False
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            compute_loss().backward()
        self._updates = True
        self._end_step()

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
    """(the norm of all gradients, the factor that clips them to `max_norm`), by the norm of each, in fp32.

    The order of the norms changes no bit.
    """
    norm = torch.linalg.vector_norm(torch.stack(norms).sort().values)
    return norm, (max_norm / (norm + 1e-6)).clamp(max=1)


@cache
def compiled_update() -> Callable:
    return torch.compile(update, fullgraph=True)
