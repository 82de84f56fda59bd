"""Training that diverged: losses or weights that are NaN or infinite. Such a model is not saved, nor reported."""

import torch

from neoflix.errors import DivergedError


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
        remedy = f"use a lower --learning_rate than {args.learning_rate:g}, or a lower --max_grad_norm"
    return DivergedError(
        f"step {step}: {what}; {remedy}. Checkpoints in {args.output_dir} are whole; resume from one with "
        "--resume_from_checkpoint"
    )
