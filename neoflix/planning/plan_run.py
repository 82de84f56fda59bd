"""What a run will take, before anything is loaded: device and host memory, disk, steps, time, and whether it fits.

`forecast` is a pure function of the model's shape, the texts' token counts, the run's settings and the machine. Memory
is forecast by phase (loading, training, the optimizer's step, evaluating), each phase by its parts; the phase that
takes most is what has to fit. The formulas follow DeepSpeed 0.19.8 (deepspeed/runtime/zero/stage_1_and_2.py, stage3.py,
fp16/fused_optimizer.py, bf16_optimizer.py), the ZeRO papers (Rajbhandari et al., "ZeRO", 2020, section 3; Ren et al.,
"ZeRO-Offload", 2021) and this project's own attention and loss.

No torch here, whose import takes longer than `--plan` may: what of it is needed for other models than GPT-Neo is
imported there.

Signs: P parameters, L those that learn (all, or LoRA's adapters), N processes, b bytes a weight, w width, V words of
the vocabulary, T tokens of a batch.
"""

import argparse
import os
import re
import sys
from dataclasses import replace

from neoflix.arguments.deepspeed_file import check_compiler, read_ds_config, set_values
from neoflix.arguments.flags import check_numbers, check_writable
from neoflix.arguments.paths import expand_paths
from neoflix.arguments.quick import OTHER_FLAGS, PLAN_FLAGS
from neoflix.arguments.recipes import read_recipe
from neoflix.checkpoints.output_dir import check_output_dir
from neoflix.checkpoints.runs import read_texts_per_step
from neoflix.data.template import Template
from neoflix.model.shape import Shape, read_shape
from neoflix.planning.forecast import (
    Plan,
    _local_processes,
    forecast,
    read_settings,
)
from neoflix.planning.lengths import (
    Texts,
    count_texts,
)
from neoflix.planning.preflight import check_machine
from neoflix.planning.remedies import (
    _cannot_swap,
    explain,
    presets,
)
from neoflix.planning.table import plan_table
from neoflix.runtime.console import GIB, accept_any_text, is_main_process, say
from neoflix.runtime.errors import UserError
from neoflix.runtime.files import ROOT
from neoflix.runtime.hardware import Machine, read_machine


def plan_run(args, must_fit: bool = True) -> Plan | None:
    """The plan of a run by its arguments, choices made: `--deepspeed auto` and `--tokens_per_device_batch auto` become
    what they stand for in `args`. None for a model whose shape is not to be found (loading it will say why).

    Raises:
        UserError: where the run would not fit, if it must, or could not come to its end: the plan's table, and what
            to change.
    """
    machine = _stand_in(read_machine(args.output_dir, bool(args.use_cpu)), args)
    shape = read_shape(args.model_name_or_path)
    if shape is None:
        if args.plan or "auto" in (args.deepspeed, args.tokens_per_device_batch):
            raise UserError(
                f"--model_name_or_path {args.model_name_or_path}: has no config.json here, so that there is no plan; "
                "name a folder that has one, or a model of the hub that was downloaded"
            )
        return None
    if args.max_length:
        shape = replace(shape, window=min(shape.window, args.max_length))
    texts = count_texts(args, shape)

    if args.deepspeed == "auto":
        chosen, passed_over = choose_ds_config(args, shape, texts, machine)
        args.deepspeed = str(ROOT / chosen)
        say("\n".join([*passed_over, f"--deepspeed auto: {chosen}, the fastest that fits"]))
    ds_config = read_ds_config(args.deepspeed)
    if args.tokens_per_device_batch == "auto":
        args.tokens_per_device_batch = choose_batch(args, shape, texts, machine, ds_config)
        say(f"--tokens_per_device_batch auto: {args.tokens_per_device_batch}")
    plan = forecast(shape, texts, read_settings(args, shape, texts, machine, ds_config, args.deepspeed), machine)
    if must_fit and not plan.fits:
        if args.plan_must_fit:
            raise UserError(explain(plan) + "\n  or --plan_must_fit false, which tries it all the same")
        say("warning: by its plan this run does not fit; trying it all the same (--plan_must_fit false)")
    if must_fit and not (args.plan_device_memory or args.plan_host_memory):
        check_machine(machine, ds_config, plan.pinned_bytes, args.bf16, plan.settings.local_processes)
    return plan


def parse_bytes(text: str | None, flag: str) -> int | None:
    """'24GiB', '64 GB', '512M' -> bytes; a bare number is GiB."""
    if text is None:
        return None
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)(B?)\s*", str(text), re.IGNORECASE)
    if match is None:
        raise UserError(f"--{flag} {text}: must be a size, such as 24GiB")
    number, unit, is_binary, byte = match.groups()
    base = 1000 if byte and not is_binary and unit else 1024
    return int(float(number) * base ** ("KMGT".index((unit or "G").upper()) + 1))


def _stand_in(machine: Machine, args) -> Machine:
    """The machine, with the memory that `--plan_device_memory` and `--plan_host_memory` put in its place."""
    device = parse_bytes(args.plan_device_memory, "plan_device_memory")
    host = parse_bytes(args.plan_host_memory, "plan_host_memory")
    if (device or host) and not args.plan:
        raise UserError("--plan_device_memory and --plan_host_memory stand in for hardware: they go with --plan only")
    if device:
        num_devices = _local_processes()
        name = f"a card of {device / GIB:.0f} GiB"
        machine = replace(machine, num_devices=num_devices, device_name=name, device_memory=device, device_taken=0)
        machine = replace(machine, capability=(8, 0))
    if host:
        machine = replace(machine, host_memory=host)
    return replace(machine, disk=None) if device or host else machine  # nor is this machine's disk the one meant


def choose_ds_config(args, shape: Shape, texts: Texts, machine: Machine) -> tuple[str, list[str]]:
    """(the fastest shipped set-up that fits, a line for each one passed over). UserError where none does."""
    passed_over, last = [], None
    for name in presets(machine, int(os.environ.get("WORLD_SIZE", "1"))):
        config = read_ds_config(ROOT / name)
        if reason := _cannot_swap(config):
            passed_over.append(f"passed over {name}: {reason}")
            continue
        fitted = argparse.Namespace(**vars(args))
        if args.tokens_per_device_batch == "auto":
            fitted.tokens_per_device_batch = texts.longest  # what the smallest batch must hold
        last = forecast(shape, texts, read_settings(fitted, shape, texts, machine, config, name), machine)
        if last.fits:
            return name, passed_over
        what, needed, there, largest = last.over_budget()[0]
        passed_over.append(
            f"passed over {name}: needs {needed / GIB:.1f} GiB of {what}, {there / GIB:.1f} are there ({largest})"
        )
    raise UserError("\n".join(["--deepspeed auto: none fits", *passed_over, explain(last)]))


FEWEST_STEPS = 50  # an epoch keeps so many: a batch of all there is learns little


def choose_batch(args, shape: Shape, texts: Texts, machine: Machine, ds_config: dict) -> int:
    """The most tokens a device can take at once, to 64; no more than leaves an epoch 50 steps, no fewer than the
    longest text has."""

    def fits(budget: int) -> bool:
        tried = argparse.Namespace(**(vars(args) | {"tokens_per_device_batch": budget}))
        return forecast(shape, texts, read_settings(tried, shape, texts, machine, ds_config, ""), machine).fits

    per_step = max(1, args.gradient_accumulation_steps) * int(os.environ.get("WORLD_SIZE", "1"))
    most = int(texts.num_train * texts.mean / (FEWEST_STEPS * per_step))
    low, high = -(-texts.longest // 64), max(most // 64, -(-texts.longest // 64))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(64 * middle) else (low, middle - 1)
    return 64 * low


def answer_quickly() -> None:
    """Answers `train.py --plan ...` in a second and ends the program. Returns where something else is asked for, or
    where only the full parser can check or refuse what is."""
    accept_any_text()
    args = read_quickly(sys.argv[1:]) if "--plan" in sys.argv else None
    if args is None:
        return
    try:
        say(plan_table(plan_run(args)))
    except UserError as error:
        if is_main_process():
            print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
    sys.exit(0)


def read_quickly(words: list[str]) -> argparse.Namespace | None:
    """The arguments of a plan, recipe included; None where the full parser is needed: for a flag that isn't above, for
    a value that isn't plainly one of its flag, and for whatever a check refuses, so that it is refused there."""
    try:
        said = expand_paths(_split_words(words))
        recipe, _ = read_recipe(said.pop("config"), _quick_flags()) if "config" in said else ({}, {})
        said = expand_paths(recipe) | said
        values = {name: _convert(name, value) for name, value in said.items()}
        args = argparse.Namespace(**PLAN_FLAGS | values)
        _check_quickly(args, said)
    except (KeyError, ValueError):
        return None
    return argparse.Namespace(**{name: getattr(args, name) for name in PLAN_FLAGS})


def _quick_flags() -> set[str]:
    return (PLAN_FLAGS.keys() - {"plan"}) | OTHER_FLAGS.keys()


def _split_words(words: list[str]) -> dict[str, str]:
    """['--plan', '--max-steps=7'] -> {'max_steps': '7'}; ValueError for anything but flags with one value each."""
    said, rest = {}, list(words)
    while rest:
        word, equals, value = rest.pop(0).partition("=")
        if word == "--plan" and not equals and (not rest or rest[0].startswith("--")):
            continue
        name = word.removeprefix("--")
        name = name.replace("-", "_") if "_" not in name else name
        if not word.startswith("--") or name not in _quick_flags() | {"config"} or name in said:
            raise ValueError(word)
        if not equals:
            if not rest or rest[0].startswith("-"):
                raise ValueError(word)
            value = rest.pop(0)
        said[name] = value
    return said


def _convert(name: str, value):
    """A flag's value from what was typed; ValueError where that isn't plainly one."""
    default, kind = PLAN_FLAGS.get(name), OTHER_FLAGS.get(name)
    if not isinstance(value, str):
        raise ValueError(name)
    if isinstance(kind, tuple) and value not in kind:
        raise ValueError(name)
    if name in ("bf16", "fp16") or name.endswith("_checkpointing") or isinstance(default, bool) or kind is bool:
        return {"true": True, "false": False}[value.lower()]
    if name in ("max_length", "tokens_per_device_batch") and value != "auto":
        return int(value)
    if kind in (int, float):
        return kind(value)
    return value if default is None else type(default)(value)


def _check_quickly(args: argparse.Namespace, said: dict) -> None:
    """ValueError where the full parser would refuse something, or change an argument."""
    check_numbers(args)
    if args.template is not None:
        Template(args.template)
    batch = 1 if args.tokens_per_device_batch else args.per_device_train_batch_size
    texts_per_step = batch * args.gradient_accumulation_steps * int(os.environ.get("WORLD_SIZE", "1"))
    lora_alone = {"lora_rank", "lora_alpha"} & said.keys() and not args.lora
    is_unusual = (
        args.template is not None and args.text_column is not None,
        args.tokens_per_device_batch not in (None, "auto") and args.tokens_per_device_batch < 2,
        args.lora and args.model_name_or_path == "demo",
        args.save_strategy not in ("no", "epoch"),
        not args.output_dir.strip(),
        read_texts_per_step(args.output_dir, None) not in (None, texts_per_step),  # a run keeps its own
        args.bf16 and args.fp16,
        lora_alone,
    )
    if any(is_unusual):
        raise ValueError
    check_writable(args.output_dir)
    check_output_dir(args.output_dir, args.model_name_or_path)
    if args.deepspeed != "auto":
        config = read_ds_config(args.deepspeed)
        check_compiler(config)
        if any((key, value) != ("bf16.enabled", args.bf16) for key, value in set_values(config).items()):
            raise ValueError
