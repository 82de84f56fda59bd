"""The optimizer of a resumed run: the state of before, and the settings that change from there on."""

import torch
from torch.optim.lr_scheduler import LambdaLR

HYPERPARAMETERS = ("initial_lr", "lr", "weight_decay")


def restore_adam_beta_powers(optimizer) -> None:
    """Has DeepSpeed's CPU Adam count the steps that a loaded state has behind it.

    The powers of its betas live outside the state. It takes them anew after loading, as powers, where the run that
    was never interrupted multiplied step by step: the same but for rounding, and that is not the same run. One
    step of a single zero for each one taken (5 microseconds) brings them where they were.
    """
    while hasattr(optimizer, "optimizer"):  # accelerate's wrapper, ZeRO's
        optimizer = optimizer.optimizer
    if not hasattr(optimizer, "ds_opt_adam"):
        return
    num_steps = max((state["step"] for state in optimizer.state.values() if "step" in state), default=0)
    beta1, beta2 = optimizer.param_groups[0]["betas"]
    zeros = [torch.zeros(1) for _ in range(4)]
    for step in range(1, int(num_steps) + 1):
        optimizer.ds_opt_adam.adam_update(optimizer.opt_id, step, 0.0, beta1, beta2, 1e-8, 0.0, True, *zeros)


def read_hyperparameters(optimizer) -> list[dict]:
    """Learning rate and weight decay of each parameter group, as the arguments of this start set them."""
    return [{key: group[key] for key in HYPERPARAMETERS if key in group} for group in optimizer.param_groups]


def restore_weight_decay(optimizer, hyperparameters: list[dict]) -> None:
    """Gives each parameter group its own weight decay again.

    DeepSpeed 0.19.8 loads the universal form of a ZeRO-3 checkpoint with the first group's settings in every group
    (stage3.py, `load_hp_checkpoint_state_from_checkpoint_dir_stage3`): biases and normalization layers would be decayed
    from there on.
    """
    for group, values in zip(optimizer.param_groups, hyperparameters, strict=True):
        group["weight_decay"] = values["weight_decay"]


def apply_hyperparameters(optimizer, scheduler, hyperparameters: list[dict]) -> None:
    """Sets what `read_hyperparameters` read before the checkpoint was loaded, and the rate that the schedule of this
    start has for the step reached.

    Loading restores the earlier values: in the optimizer's groups, and as the schedule's `base_lrs`.
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
