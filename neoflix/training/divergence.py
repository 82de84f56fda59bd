"""Training that diverged: losses or weights that are NaN or infinite. Such a model is not saved, nor reported."""

from pathlib import Path

import torch

from neoflix.checkpoints.find import list_checkpoints
from neoflix.runtime.errors import DivergedError


def has_finite_weights(model) -> bool:
    """Whether every weight that is trained is a finite number, as far as this process holds them."""
    weights = [getattr(weight, "ds_tensor", weight.detach()) for weight in model.parameters() if weight.requires_grad]
    weights = [weight for weight in weights if weight.numel()]
    return not weights or bool(torch.stack([torch.isfinite(weight).all() for weight in weights]).all())


def diverged(args, step: int, what: str) -> DivergedError:
    """The error to raise: what went wrong, and which setting to change."""
    if args.fp16:
        remedy = "use --bf16 true if the GPU has it, --fp16 false (fp32), or a lower --learning_rate"
    else:
        clipping = "a lower --max_grad_norm" if args.max_grad_norm else "clip gradients (--max_grad_norm 1)"
        remedy = f"use a lower --learning_rate than {args.learning_rate:g}, or {clipping}"
    has_checkpoints = bool(list_checkpoints(Path(args.output_dir)))
    way_back = f". The checkpoints in {args.output_dir} are from before: use --resume_from_checkpoint with one of them"
    return DivergedError(f"step {step}: {what}; {remedy}{way_back if has_checkpoints else ''}")
