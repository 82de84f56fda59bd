"""The optimizer and its schedule: what can be made at all, and Trainer's parameter groups where DeepSpeed makes it."""

import json
from pathlib import Path

import torch
from transformers import Trainer, get_scheduler

from neoflix.errors import UserError
from neoflix.manifest import read_manifest


def check_schedule(args) -> None:
    """UserError for a learning rate schedule that cannot be made, by making it."""
    said = f"--lr_scheduler_type {args.lr_scheduler_type}"
    if args.lr_scheduler_type in ("reduce_lr_on_plateau", "greedy"):
        raise UserError(f"{said}: follows the evaluations, which DeepSpeed cannot; use cosine, linear or constant")
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=args.learning_rate)
    settings = args.lr_scheduler_kwargs or {}
    try:
        get_scheduler(args.lr_scheduler_type, optimizer, 1, 100, scheduler_specific_kwargs=dict(settings))
    except (TypeError, ValueError) as error:
        raise UserError(f"{said} with --lr_scheduler_kwargs {json.dumps(settings)}: {error}") from error


def check_optimizer(args, config: dict) -> None:
    """UserError where `--optim` names an optimizer that the DeepSpeed file leaves no room for, or that isn't installed.

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
                    f"--{name} {getattr(args, name)}: has no effect beside the optimizer of {args.deepspeed} "
                    f"({config['optimizer'].get('type')}); leave it out, or remove 'optimizer' from a copy of that file"
                )
        return
    offload = config.get("zero_optimization", {}).get("offload_optimizer", {}).get("device", "none")
    if offload != "none" and not is_adamw and config.get("zero_force_ds_cpu_optimizer", True):
        raise UserError(
            f"--optim {args.optim}: DeepSpeed offloads AdamW alone; remove 'offload_optimizer' from the file"
        )
    try:
        Trainer.get_optimizer_cls_and_kwargs(args)
    except (ImportError, ValueError) as error:
        raise UserError(f"--optim {args.optim}: {error}") from error


def group_parameters(model: torch.nn.Module, decay_names: list[str], weight_decay: float) -> list[dict]:
    """Trainer's parameter groups: matrices are decayed, biases and normalization layers aren't.

    transformers hands DeepSpeed all parameters in one group where the DeepSpeed file has an `optimizer` block, and then
    every parameter is decayed.

    Args:
        decay_names: names of the decayed parameters, by `Trainer.get_decay_parameter_names`.

    Returns:
        One or two groups; frozen parameters are in none, and a group without parameters is left out.
    """
    decayed, rest = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (decayed if name in decay_names else rest).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def check_groups(checkpoint: Path, num_groups: int) -> None:
    """UserError where the optimizer in a checkpoint has other parameter groups than the one that is to load it."""
    saved = read_manifest(checkpoint).get("optimizer_groups", 1)  # absent in older checkpoints: all in one group
    if saved != num_groups:
        raise UserError(
            f"{checkpoint} was saved by an earlier version, whose weight decay also covered biases and normalization "
            "layers, and its optimizer cannot be resumed; start again in another --output_dir, with "
            f"--model_name_or_path {checkpoint} to keep what it learned"
        )


def keep_gradient_norm(engine) -> None:
    """Makes a DeepSpeed engine keep the norm it clips gradients by without ZeRO (stage 0), where it forgets it."""
    from deepspeed.runtime.utils import clip_grad_norm_  # at import it asks what the accelerator is: too early

    def clip() -> None:
        weights, most = engine.module.parameters(), engine.gradient_clipping()
        engine._global_grad_norm = clip_grad_norm_(parameters=weights, max_norm=most, mpu=engine.mpu)

    engine.clip_fp32_gradients = clip
