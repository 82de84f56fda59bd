"""What 'auto' stands for: the fastest DeepSpeed file, the fewest layers to recompute, and the most tokens in a batch
that fit."""

import argparse
import os
from dataclasses import replace

from neoflix.arguments.deepspeed_file import read_ds_config
from neoflix.model.shape import Shape
from neoflix.planning.forecast import Plan, forecast
from neoflix.planning.lengths import Texts
from neoflix.planning.presets import find_presets, missing_swap_folder
from neoflix.planning.remedies import explain, fewest_layers
from neoflix.planning.settings import read_settings
from neoflix.runtime.console import GIB, say
from neoflix.runtime.errors import UserError
from neoflix.runtime.hardware import Machine

MIN_STEPS = 50  # optimizer steps in an epoch: larger batches train worse


def choose_auto(flags: argparse.Namespace, shape: Shape, texts: Texts, machine: Machine) -> dict:
    """Values for those of `deepspeed`, `activation_checkpointing` and `tokens_per_device_batch` that are 'auto'.
    Announces them.

    Free memory differs from process to process and from moment to moment, so one process decides for all. A DeepSpeed
    file is relative to the project's folder, which may lie elsewhere on another machine.
    """
    choices = {}
    if flags.deepspeed == "auto" and flags.activation_checkpointing is None and not flags.gradient_checkpointing:
        flags = argparse.Namespace(**vars(flags) | {"activation_checkpointing": "auto"})
    if flags.deepspeed == "auto":
        choices["deepspeed"], passed_over = choose_ds_config(flags, shape, texts, machine)
        say("\n".join([*passed_over, f"--deepspeed auto: {choices['deepspeed']}, the fastest that fits"]))
    if flags.activation_checkpointing == "auto":
        name = choices.get("deepspeed", flags.deepspeed)
        plan = plan_with(flags, name, shape, texts, machine)
        choices["activation_checkpointing"] = plan.settings.recomputed_layers
        say(f"--activation_checkpointing auto: {plan.settings.recomputed_layers} of {shape.num_layers} layers")
        flags = argparse.Namespace(**vars(flags) | choices)
    if flags.tokens_per_device_batch == "auto":
        ds_config = read_ds_config(choices.get("deepspeed", flags.deepspeed))
        choices["tokens_per_device_batch"] = choose_batch(flags, shape, texts, machine, ds_config)
        say(f"--tokens_per_device_batch auto: {choices['tokens_per_device_batch']}")
    return choices


def choose_ds_config(flags, shape: Shape, texts: Texts, machine: Machine) -> tuple[str, list[str]]:
    """(the fastest DeepSpeed file of ours that fits, a line for each faster one). UserError if none fits."""
    passed_over, plan = [], None
    for name in find_presets(machine, int(os.environ.get("WORLD_SIZE", "1")), bool(flags.fp16)):
        if folder := missing_swap_folder(read_ds_config(name)):
            passed_over.append(f"passed over {name}: its nvme_path {folder} is not a folder")
            continue
        plan = plan_with(flags, name, shape, texts, machine)
        if plan.fits:
            return name, passed_over
        what, needed, available, largest = plan.over_budget()[0]
        passed_over.append(
            f"passed over {name}: needs {needed / GIB:.1f} GiB of {what}, {available / GIB:.1f} available ({largest})"
        )
    raise UserError("\n".join(["--deepspeed auto: none fits", *passed_over, explain(plan)]))


def plan_with(flags, deepspeed: str, shape: Shape, texts: Texts, machine: Machine) -> Plan:
    """The plan with a DeepSpeed file and, where they are 'auto', with the smallest batch and the fewest recomputed
    layers that fit, or else with all of them."""
    tried = argparse.Namespace(**vars(flags) | {"deepspeed": deepspeed})
    if flags.tokens_per_device_batch == "auto":
        tried.tokens_per_device_batch = texts.longest
    settings = read_settings(tried, shape, texts, machine, read_ds_config(deepspeed))

    def planned(layers: int) -> Plan:
        return forecast(shape, texts, replace(settings, recomputed_layers=layers), machine)

    if flags.activation_checkpointing == "auto":
        fewest = fewest_layers(planned, shape.num_layers)
        return planned(shape.num_layers if fewest is None else fewest)
    return planned(settings.recomputed_layers)


def choose_batch(flags, shape: Shape, texts: Texts, machine: Machine, ds_config: dict) -> int:
    """The most tokens in a batch that fit on a device, as a multiple of 64. An epoch keeps at least `MIN_STEPS` steps,
    and the longest text always fits in."""

    def fits(budget: int) -> bool:
        tried = argparse.Namespace(**vars(flags) | {"tokens_per_device_batch": budget})
        return forecast(shape, texts, read_settings(tried, shape, texts, machine, ds_config), machine).fits

    batches_per_step = flags.gradient_accumulation_steps * int(os.environ.get("WORLD_SIZE", "1"))
    most = int(texts.num_train * texts.mean / (MIN_STEPS * batches_per_step))
    low, high = -(-texts.longest // 64), max(most // 64, -(-texts.longest // 64))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(64 * middle) else (low, middle - 1)
    return 64 * low
