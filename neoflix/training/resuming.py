"""Resuming from a checkpoint: its form for this number of processes, and the optimizer's settings once it is loaded."""

from pathlib import Path

from torch.optim.lr_scheduler import LambdaLR

from neoflix.checkpoints.world_size import check_loadable, convert, needs_conversion
from neoflix.model.lora import check_spare_rows
from neoflix.runtime.processes import run_on_main_process
from neoflix.training.deepspeed import restore_adam_beta_powers

HYPERPARAMETERS = ("initial_lr", "lr", "weight_decay")


def fit_to_processes(checkpoint: Path, target: Path, model, config: dict, num_processes: int) -> Path:
    """Returns the checkpoint or, where another number of processes saved it, its universal form. Collective.

    UserError where the checkpoint fits neither the model nor the DeepSpeed configuration.

    Args:
        target: folder for the universal form.
        config: DeepSpeed's. It is set to load the universal form where there is one.
    """
    check_spare_rows(model, checkpoint)
    check_loadable(checkpoint, config.get("zero_optimization", {}), num_processes)
    if not needs_conversion(checkpoint, num_processes):
        return checkpoint
    config.setdefault("checkpoint", {})["load_universal"] = True
    return run_on_main_process(convert, checkpoint, target)


def read_hyperparameters(optimizer) -> list[dict]:
    """Learning rate and weight decay of each parameter group, as the arguments of this start set them."""
    return [{key: group[key] for key in HYPERPARAMETERS if key in group} for group in optimizer.param_groups]


def restore_settings(optimizer, scheduler, hyperparameters: list[dict], has_changes: bool) -> None:
    """Corrects what loading a checkpoint has left in the optimizer and its schedule.

    Args:
        hyperparameters: by `read_hyperparameters`, before the checkpoint was loaded.
        has_changes: whether this start changes settings of the run (`--override_resumed`).
    """
    restore_adam_beta_powers(optimizer)
    restore_weight_decay(optimizer, hyperparameters)
    if has_changes:
        apply_hyperparameters(optimizer, scheduler, hyperparameters)


def restore_weight_decay(optimizer, hyperparameters: list[dict]) -> None:
    """Gives each parameter group its own weight decay again.

    DeepSpeed 0.19.8 loads the universal form of a ZeRO-3 checkpoint with the first group's settings in every group
    (stage3.py, `load_hp_checkpoint_state_from_checkpoint_dir_stage3`); biases and normalization layers would be decayed
    from then on.
    """
    for group, values in zip(optimizer.param_groups, hyperparameters, strict=True):
        group["weight_decay"] = values["weight_decay"]


def apply_hyperparameters(optimizer, scheduler, hyperparameters: list[dict]) -> None:
    """Sets this start's learning rate and weight decay, at the step that the schedule has reached.

    Loading restores the earlier values, in the optimizer's groups and as the schedule's `base_lrs`.
    """
    for group, values in zip(optimizer.param_groups, hyperparameters, strict=True):
        group |= values
    scheduler = getattr(scheduler, "scheduler", scheduler)  # accelerate's wrapper
    if not isinstance(scheduler, LambdaLR):
        return
    scheduler.base_lrs = [values["initial_lr"] for values in hyperparameters]
    rates = [
        base * factor(scheduler.last_epoch)
        for base, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
    ]
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    scheduler._last_lr = rates
