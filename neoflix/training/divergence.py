"""Training that diverged: losses or weights that are NaN or infinite. Such a model is neither saved nor reported."""

from pathlib import Path

import torch

from neoflix.checkpoints.find import list_checkpoints
from neoflix.runtime.errors import DivergedError
from neoflix.runtime.processes import any_across_ranks
from neoflix.training.deepspeed import local_values


def check_finite(args, step: int, losses_are_finite: torch.Tensor, model: torch.nn.Module) -> None:
    """DivergedError, in every process, where a loss or a weight is NaN or infinite. Collective.

    Args:
        losses_are_finite: of this process's losses so far, a bool.
    """
    if any_across_ranks(not bool(losses_are_finite)):
        raise diverged(args, step, "a loss since the last checkpoint is NaN or infinite")
    if any_across_ranks(not has_finite_weights(model)):
        raise diverged(args, step, "weights are NaN or infinite")


def has_finite_weights(model: torch.nn.Module) -> bool:
    """Whether every trainable weight is a finite number, as far as this process holds them."""
    weights = [local_values(weight) for weight in model.parameters() if weight.requires_grad]
    weights = [weight for weight in weights if weight.numel()]
    return not weights or bool(torch.stack([torch.isfinite(weight).all() for weight in weights]).all())


def diverged(args, step: int, what: str) -> DivergedError:
    """Makes the error to raise: what happened at which step, and which setting to change."""
    if args.fp16:
        remedy = "use --bf16 true if the GPU has it, --fp16 false (fp32), or a lower --learning_rate"
    else:
        clipping = "a lower --max_grad_norm" if args.max_grad_norm else "clip gradients (--max_grad_norm 1)"
        remedy = f"use a lower --learning_rate than {args.learning_rate:g}, or {clipping}"
    has_checkpoints = bool(list_checkpoints(Path(args.output_dir)))
    way_back = f". The checkpoints in {args.output_dir} are from before: use --resume_from_checkpoint with one of them"
    return DivergedError(f"step {step}: {what}; {remedy}{way_back if has_checkpoints else ''}")
