"""Arguments: what can be said on the command line or in a recipe, the defaults, and every check of them.

A recipe is a YAML file whose keys are `train.py`'s flags, plus an optional `generation:` section with
`generate.py`'s sampling flags. The command line wins over the recipe, the recipe over the defaults.
"""

import argparse
import json
import re
import sys
import traceback
from dataclasses import fields
from pathlib import Path
from types import NoneType
from typing import get_args, get_origin, get_type_hints

import torch
from transformers import HfArgumentParser
from transformers.hf_argparser import string_to_bool

from neoflix.arguments.deepspeed_file import (
    find_ds_config,
)
from neoflix.arguments.flags import check_numbers
from neoflix.arguments.paths import expand_paths
from neoflix.arguments.recipes import nearest, read_recipe
from neoflix.arguments.sampling import SAMPLING_DEFAULTS
from neoflix.arguments.training import (
    NAMES_OF_RECOMPUTING,
    RECOMPUTING,
    TrainArguments,
    _count_or_auto,
)
from neoflix.checkpoints.runs import find_run
from neoflix.planning.forecast import Plan
from neoflix.planning.plan_run import plan_run
from neoflix.runtime.errors import UserError
from neoflix.runtime.files import ROOT
from neoflix.runtime.hardware import has_gpu
from neoflix.runtime.processes import run_on_main_process
from neoflix.runtime.redaction import redact_command


class _OneSentence:
    """An argparse mix-in: argparse itself would print two hundred flags before it says what is wrong."""

    def error(self, message):
        raise UserError(message)

    def parse_known_args(self, args=None, namespace=None):
        parsed, rest = super().parse_known_args(args, namespace)
        return argparse.Namespace(**expand_paths(vars(parsed))), rest


class _Parser(_OneSentence, HfArgumentParser):
    pass


class _PlainParser(_OneSentence, argparse.ArgumentParser):
    pass


def _read_recipe(path: str) -> tuple[dict, dict]:
    """The flags of train.py that a recipe sets, and its sampling settings."""
    flags, generation = read_recipe(path, {f.name for f in fields(TrainArguments) if f.init} - {"config"})
    return expand_paths(flags), generation


def _as_words(flags: dict) -> list[str]:
    """Flags as command-line words: {'bf16': True, 'report_to': ['a', 'b']} -> --bf16=true --report_to a b."""
    words = []
    for key, value in flags.items():
        if isinstance(value, list):
            words += [f"--{key}", *value]
        elif value is not None:
            words.append(f"--{key}={json.dumps(value) if isinstance(value, dict | bool) else value}")
    return words


def _apply_recipe(parser: "_Parser", path: str, recipe: dict) -> list[str]:
    """The recipe's flags as command-line words or, what words cannot say, as the parser's defaults. UserError where a
    value isn't one of its flag."""
    types = get_type_hints(TrainArguments)  # the parser changes those of the fields
    for name, value in recipe.items():
        action, takes = parser._option_string_actions[f"--{name}"], {types[name], *get_args(types[name])}
        takes |= {get_origin(kind) for kind in takes}
        if value is None and NoneType not in takes:
            raise UserError(f"--config {path}: {name} is empty; give it a value, or leave it out")
        if isinstance(value, list) and list not in takes:
            raise UserError(f"--config {path}: {name} takes one value, not a list")
        if isinstance(value, dict) and dict not in takes:
            raise UserError(f"--config {path}: {name} takes one value, not a block of keys")
        if action.type is string_to_bool and str(value).lower() in ("on", "off"):
            recipe[name] = str(value.lower() == "on")
    # Words cannot say null, nor several values of a flag that takes one or several.
    as_defaults = {name: value for name, value in recipe.items() if value is None or isinstance(value, list)}
    parser.set_defaults(**as_defaults)
    words = _as_words({name: value for name, value in recipe.items() if name not in as_defaults})
    try:
        parser.parse_known_args(words)
    except UserError as error:
        message = re.sub(r"^argument --(\w+)\S*:", r"\1:", str(error))
        raise UserError(f"--config {path}: {message}") from None
    return words


def _said(words: list[str]) -> set[str]:
    """The flags among a command line's words: `--output-dir=x` as `__output_dir`."""
    return {word.split("=")[0].replace("-", "_") for word in words if word.startswith("--")}


def _evaluation_flags(model_name_or_path: str, words: list[str]) -> tuple[list[str], list[str]]:
    """Flags of `--eval_only` (before, after) what the command line says: the texts that a run held out, by its own
    record, and nothing written but where the command line itself asks for it."""
    texts = (find_run(model_name_or_path) or {}).get("texts", {})
    after = ["--eval_strategy", "no", "--save_strategy", "no", "--report_to", "none"]
    return _as_words(texts), after if "__output_dir" in _said(words) else [*after, "--output_dir", ""]


def _hardware_flags(words: list[str], use_cpu: bool) -> list[str]:
    """bf16 where the device has it, fp16 where it has not, fp32 on the CPU, and beside a GPU a process that has the
    next batch ready, unless the user has said so."""
    said = _said(words)
    if use_cpu or not has_gpu():
        return [] if "__use_cpu" in said else ["--use_cpu", "true"]
    flags = [] if "__dataloader_num_workers" in said else ["--dataloader_num_workers", "1"]
    if not said & {"__bf16", "__fp16"}:
        flags += ["--bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "--fp16", "true"]
    return flags


def parse_train_args(argv: list[str] | None = None, must_fit: bool = False) -> TrainArguments:
    """Command line and recipe -> arguments. UserError says in one sentence what is wrong.

    Args:
        argv: words after the program's name; None takes them from the command line.
        must_fit: whether a run that would not fit this machine is an error, before devices are touched and operators
            compiled.
    """
    words = sys.argv[1:] if argv is None else list(argv)
    parser = _Parser(TrainArguments, allow_abbrev=False, description="Fine-tune GPT-Neo on short texts.")
    if sum(word.partition("=")[0] == "--config" for word in words) > 1:
        raise UserError("--config is given twice; name one recipe, and put what differs on the command line")
    recipe_words, generation = [], {}
    if path := parser.parse_known_args(words)[0].config:
        recipe, generation = _read_recipe(path)
        recipe_words = _apply_recipe(parser, path, recipe)
        generation.pop("num_samples", None)  # generate.py's alone: no setting of a model
    asked, _ = parser.parse_known_args(recipe_words + words)
    before, after = _evaluation_flags(asked.model_name_or_path, words) if asked.eval_only else ([], [])
    words = recipe_words + before + words + after
    words = [word.replace(f"--{NAMES_OF_RECOMPUTING[0]}", f"--{RECOMPUTING}") for word in words]
    _, unknown = parser.parse_known_args(words)
    if unknown:
        name = unknown[0].partition("=")[0]  # the value may be a secret
        raise UserError(f"unknown argument {name!r}{nearest(name, parser._option_string_actions)}")
    chose_precision = bool(_said(words) & {"__bf16", "__fp16"})
    words += _hardware_flags(words, asked.use_cpu)
    asked = parser.parse_known_args(words)[0]
    check_numbers(asked)  # the plan divides by some of them
    forecast, choices = (None, []) if asked.eval_only else _plan(asked, must_fit, chose_precision)
    try:
        (args,) = parser.parse_args_into_dataclasses(words + choices, look_for_args_file=False)
    except ValueError as error:  # TrainingArguments checks flags by themselves and beside each other
        if isinstance(error, UserError) or not _is_raised_in("transformers", error):
            raise
        raise UserError(str(error)) from error
    args.generation, args.forecast = SAMPLING_DEFAULTS | generation, forecast
    args.command = redact_command(["train.py", *(sys.argv[1:] if argv is None else argv)])
    return args


def _is_raised_in(package: str, error: Exception) -> bool:
    """Whether it is this package's own code that raises an exception: anywhere else it is a bug."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return frame.f_globals.get("__name__", "").partition(".")[0] == package


def _plan(args: argparse.Namespace, must_fit: bool, chose_precision: bool) -> tuple[Plan | None, list[str]]:
    """The run's plan, and flags for what was 'auto'."""
    if not chose_precision:  # --plan_device_memory may stand for a GPU that this machine does not have
        args.bf16 = args.fp16 = None
    args.tokens_per_device_batch = _count_or_auto(args.tokens_per_device_batch, "tokens_per_device_batch")
    flags = ("deepspeed", "tokens_per_device_batch")
    is_auto = [flag for flag in flags if getattr(args, flag) == "auto"]
    if is_auto:  # decided once: what is free differs from process to process, and from moment to moment
        vars(args).update(run_on_main_process(_choose, args, is_auto))
        args.deepspeed = find_ds_config(args.deepspeed)
    forecast = plan_run(args, must_fit)
    return forecast, [word for flag in is_auto for word in (f"--{flag}", str(getattr(args, flag)))]


def _choose(args: argparse.Namespace, is_auto: list[str]) -> dict:
    """What the flags that are 'auto' stand for on this machine."""
    chosen = argparse.Namespace(**vars(args))
    plan_run(chosen, must_fit=False)
    choices = {flag: getattr(chosen, flag) for flag in is_auto}
    if "deepspeed" in choices:  # on another machine the project may lie elsewhere
        choices["deepspeed"] = str(Path(choices["deepspeed"]).relative_to(ROOT))
    return choices
