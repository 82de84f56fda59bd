"""Checks of the optimizer and the learning rate schedule against the DeepSpeed file."""

import json

import torch
from transformers import Trainer, get_scheduler

from neoflix.runtime.errors import UserError


def check_schedule(args) -> None:
    """Raises UserError if the learning rate schedule cannot be created."""
    said = f"--lr_scheduler_type {args.lr_scheduler_type}"
    if args.lr_scheduler_type in ("reduce_lr_on_plateau", "greedy"):
        raise UserError(f"{said}: DeepSpeed cannot follow evaluations; use cosine, linear or constant")
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=args.learning_rate)
    settings = args.lr_scheduler_kwargs or {}
    try:
        get_scheduler(args.lr_scheduler_type, optimizer, 1, 100, scheduler_specific_kwargs=dict(settings))
    except (TypeError, ValueError) as error:
        raise UserError(f"{said} with --lr_scheduler_kwargs {json.dumps(settings)}: {error}") from error


def check_optimizer(args, config: dict) -> None:
    """Raises UserError if the DeepSpeed file excludes the optimizer of `--optim`, or if it is not installed.

    Args:
        config: the DeepSpeed file.
    """
    is_adamw = args.optim in ("adamw_torch", "adamw_torch_fused")
    if "optimizer" in config:
        for name, is_default in (
            ("optim", is_adamw),
            ("optim_args", args.optim_args is None),
            ("optim_target_modules", args.optim_target_modules is None),
        ):
            if not is_default:
                raise UserError(
                    f"--{name} {getattr(args, name)}: has no effect with the optimizer of {args.deepspeed} "
                    f"({config['optimizer'].get('type')}); leave it out, or remove 'optimizer' from a copy of that file"
                )
        return
    offload = config.get("zero_optimization", {}).get("offload_optimizer", {}).get("device", "none")
    if offload != "none" and not is_adamw and config.get("zero_force_ds_cpu_optimizer", True):
        raise UserError(
            f"--optim {args.optim}: DeepSpeed can offload only AdamW; remove 'offload_optimizer' from the file"
        )
    try:
        Trainer.get_optimizer_cls_and_kwargs(args)
    except (ImportError, ValueError) as error:
        raise UserError(f"--optim {args.optim}: {error}") from error
