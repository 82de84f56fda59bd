"""Plans a run before anything is loaded: memory, disk space, steps and time, and whether it fits.

Torch is not imported, because that takes longer than `--plan` may; the plan of a model other than GPT-Neo imports it.
"""

import argparse
import re
from collections.abc import Callable
from dataclasses import replace

from neoflix.arguments.deepspeed_file import check_agreement, find_ds_config, read_ds_config
from neoflix.arguments.reader import keep_texts_per_step
from neoflix.model.shape import read_shape
from neoflix.planning.choices import choose_auto
from neoflix.planning.forecast import Plan, forecast
from neoflix.planning.lengths import count_texts
from neoflix.planning.preflight import check_compact, check_machine
from neoflix.planning.remedies import explain
from neoflix.planning.settings import read_settings
from neoflix.planning.table import plan_table
from neoflix.runtime.console import GIB, say
from neoflix.runtime.errors import UserError
from neoflix.runtime.hardware import Machine, read_machine
from neoflix.runtime.launcher import local_processes


def call(function: Callable, *args):
    return function(*args)


def plan_run(flags: argparse.Namespace, decide: Callable = call) -> Plan | None:
    """Plans a run, and prints the plan. Returns None for a model whose config.json is not on this machine yet.

    Changes `flags`: a run that is resumed keeps its texts per step, and 'auto' becomes what the machine allows.

    Args:
        decide: `decide(function, *args)` returns what `function` returns in one process, in all of them:
            `processes.run_on_main_process` for a run of several processes.

    Raises:
        UserError: the run does not fit, or this machine cannot run it. The message holds the plan's table, and what to
            change.
    """
    keep_texts_per_step(flags)
    machine = _replace_memory(read_machine(flags.output_dir, bool(flags.use_cpu)), flags)
    if flags.deepspeed != "auto":
        check_compact(machine, read_ds_config(flags.deepspeed), flags)
    shape = read_shape(flags.model_name_or_path)
    is_auto = "auto" in (flags.deepspeed, flags.tokens_per_device_batch, flags.activation_checkpointing)
    if shape is None and (flags.plan or is_auto):
        raise UserError(
            f"--model_name_or_path {flags.model_name_or_path}: has no config.json on this machine, which a plan needs; "
            "use a folder that has one, or a model of the hub that is downloaded"
        )
    if shape:
        if flags.max_length:
            shape = replace(shape, window=min(shape.window, flags.max_length))
        texts = count_texts(flags, shape)
        if is_auto:
            vars(flags).update(decide(choose_auto, flags, shape, texts, machine))
            flags.deepspeed = find_ds_config(flags.deepspeed)
    ds_config = read_ds_config(flags.deepspeed)
    check_agreement(ds_config, flags)
    plan = shape and forecast(shape, texts, read_settings(flags, shape, texts, machine, ds_config), machine)
    if plan and not plan.fits:
        if flags.plan_must_fit:
            raise UserError(f"{explain(plan)}\n  or --plan_must_fit false, to try it anyway")
        say("warning: by its plan this run does not fit; trying it anyway (--plan_must_fit false)")
    if not (flags.plan_device_memory or flags.plan_host_memory):
        check_machine(machine, ds_config, plan.pinned_bytes if plan else 0, flags.bf16, local_processes())
    say(plan_table(plan))
    return plan


def parse_bytes(text: str | None, flag: str) -> int | None:
    """'24GiB', '64 GB', '512M' -> bytes. A number without a unit is in GiB."""
    if text is None:
        return None
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)(B?)\s*", str(text), re.IGNORECASE)
    if match is None:
        raise UserError(f"--{flag} {text}: must be a size, such as 24GiB")
    number, unit, is_binary, byte = match.groups()
    base = 1000 if byte and not is_binary and unit else 1024
    return int(float(number) * base ** ("KMGT".index((unit or "G").upper()) + 1))


def _replace_memory(machine: Machine, flags: argparse.Namespace) -> Machine:
    """The machine with the memory of --plan_device_memory and --plan_host_memory, if they are set."""
    device = parse_bytes(flags.plan_device_memory, "plan_device_memory")
    host = parse_bytes(flags.plan_host_memory, "plan_host_memory")
    if device:
        machine = replace(
            machine,
            num_devices=local_processes(),
            device_name=f"a card of {device / GIB:.0f} GiB",
            device_memory=device,
            device_taken=0,
            capability=(8, 0),
        )
    if host:
        machine = replace(machine, host_memory=host)
    return replace(machine, disk=None) if device or host else machine  # another machine has another disk
