"""Reads train.py's recipe and command line without torch, and refuses what no run can use.

A recipe is a YAML file whose keys are `train.py`'s flags, plus an optional `generation:` section with `generate.py`'s
sampling flags. The command line wins over the recipe, and the recipe over the defaults.
"""

import argparse
import os
import sys
from dataclasses import MISSING, fields
from typing import get_type_hints

from neoflix.arguments.checks import check_train_flags, find_checkpoint
from neoflix.arguments.command_line import Parser, add_field, read_recipe_values, with_underscores
from neoflix.arguments.deepspeed_file import find_ds_config, read_ds_config, set_values
from neoflix.arguments.paths import expand_paths
from neoflix.arguments.recipes import read_recipe
from neoflix.arguments.sampling import SAMPLING_DEFAULTS
from neoflix.arguments.train_flags import GROUPS, PLAIN_VALUES, TrainFlags
from neoflix.checkpoints.runs import find_run, read_texts_per_step
from neoflix.runtime.console import say
from neoflix.runtime.errors import UserError
from neoflix.runtime.redaction import redact_command

DEFAULTS = {f.name: f.default_factory() if f.default is MISSING else f.default for f in fields(TrainFlags)}
NO_OUTPUT = {"eval_strategy": "no", "save_strategy": "no", "report_to": "none"}  # of --eval_only


def read_train_flags(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags of `TrainFlags`, read from recipe and command line and checked. --help prints them and exits.

    Args:
        argv: words after the program's name; None reads the command line.

    Returns:
        A namespace with the flags and four further attributes: `others`, the words of the command line that are not
        flags of `TrainFlags`; `other_recipe`, such flags of the recipe; `generation`, the recipe's sampling settings;
        `command`, the command line without secrets.

    Raises:
        UserError: a flag has a value that no run can use.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    words = with_underscores(argv)
    if sum(word.partition("=")[0] == "--config" for word in words) > 1:
        raise UserError("--config is given twice; name one recipe, and put what differs on the command line")
    parser = make_parser()
    typed, others = parser.parse_known_args(words)
    typed = vars(typed)
    recipe, other_recipe, generation = {}, {}, {}
    if path := typed.get("config"):
        keys, generation = read_recipe(path)
        keys = expand_paths(keys)
        other_recipe = {name: value for name, value in keys.items() if name not in DEFAULTS or name == "config"}
        ours = {name: value for name, value in keys.items() if name not in other_recipe}
        recipe = read_recipe_values(parser, TrainFlags, path, ours)
    values = DEFAULTS | recipe | typed
    if values["eval_only"]:
        values |= _texts_of_run(values["model_name_or_path"]) | typed | NO_OUTPUT
        values["output_dir"] = typed.get("output_dir", "")
    flags = argparse.Namespace(**values, others=others, other_recipe=other_recipe)
    flags.generation = SAMPLING_DEFAULTS | {name: generation[name] for name in generation if name != "num_samples"}
    flags.command = redact_command(["train.py", *argv])
    flags.deepspeed = None if flags.eval_only else find_ds_config(flags.deepspeed)
    check_train_flags(flags)
    if not flags.eval_only:
        flags.resume_from_checkpoint = find_checkpoint(flags.output_dir, flags.resume_from_checkpoint)
    return flags


def make_parser() -> Parser:
    """A parser of `TrainFlags`, whose help shows them by groups."""
    parser = Parser(
        prog="train.py",
        usage="deepspeed train.py [--config FILE] [--FLAG VALUE ...]",
        description="Fine-tune GPT-Neo on short texts. Without flags: GPT-Neo-2.7B on Netflix descriptions.",
        epilog="Every flag of Hugging Face's TrainingArguments works too, or is refused by name: see --help-all.",
        allow_abbrev=False,
        add_help=False,
    )
    flags, hints = {f.name: f for f in fields(TrainFlags)}, get_type_hints(TrainFlags)
    for title, names in GROUPS.items():
        group = parser.add_argument_group(title)
        for name in names.split():
            add_field(group, flags.pop(name), hints[name])
    for name, field in flags.items():  # for the launcher, and older names
        add_field(parser, field, hints[name], is_shown=False)
    group = parser.add_argument_group("help")
    group.add_argument("-h", "--help", action="help", help="Show these flags and exit.")
    every = "Show these flags and all of Hugging Face's, and exit."
    group.add_argument("--help-all", "--help_all", action="store_true", default=argparse.SUPPRESS, help=every)
    return parser


def _texts_of_run(model_name_or_path: str) -> dict:
    """The flags by which a model's run chose its held-out texts, by the run's record."""
    texts = (find_run(model_name_or_path) or {}).get("texts", {})
    return {name: value for name, value in texts.items() if value is not None}


def is_complete(flags: argparse.Namespace) -> bool:
    """Whether all flags are checked. Otherwise transformers has to check the others."""
    is_plain = all(getattr(flags, name) in values for name, values in PLAIN_VALUES.items())
    repeats_flags = flags.deepspeed != "auto" and set_values(read_ds_config(flags.deepspeed))
    return is_plain and not (flags.others or flags.other_recipe or repeats_flags)


def keep_texts_per_step(flags: argparse.Namespace) -> None:
    """Keeps the number of texts per step of the run that is resumed, whatever the number of processes: each process
    takes its share, in as many batches as needed. UserError if the texts cannot be shared evenly."""
    texts_per_step = read_texts_per_step(flags.output_dir, flags.resume_from_checkpoint)
    if texts_per_step is None:
        return
    num_processes = int(os.environ.get("WORLD_SIZE", "1"))
    share, rest = divmod(texts_per_step, num_processes)
    if rest:
        counts = [str(n) for n in range(1, texts_per_step + 1) if texts_per_step % n == 0]
        raise UserError(
            f"{flags.output_dir}: its run takes {texts_per_step} texts a step, and {num_processes} processes cannot "
            f"share them evenly; use {', '.join(counts)} processes, or start anew in another --output_dir"
        )
    batch = 1 if flags.tokens_per_device_batch else min(flags.per_device_train_batch_size, share)
    while share % batch:
        batch -= 1
    kept = {"gradient_accumulation_steps": share // batch}
    if flags.tokens_per_device_batch is None:
        kept["per_device_train_batch_size"] = batch
    changes = [f"--{name} {value}" for name, value in kept.items() if getattr(flags, name) != value]
    vars(flags).update(kept)
    if changes:
        say(f"The run keeps its {texts_per_step} texts a step on {num_processes} process(es): {' '.join(changes)}")
