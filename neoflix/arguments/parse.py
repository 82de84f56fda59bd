"""Reads all of train.py's flags: ours, by `reader.py`, and Hugging Face's, by its own parser."""

import argparse
import sys
from dataclasses import fields

from transformers import HfArgumentParser

from neoflix.arguments.command_line import OneSentence, read_recipe_values
from neoflix.arguments.deepspeed_file import read_ds_config
from neoflix.arguments.device import follow_hardware
from neoflix.arguments.optimization import check_optimizer, check_schedule
from neoflix.arguments.reader import read_train_flags
from neoflix.arguments.recipes import check_keys, nearest
from neoflix.arguments.refusals import check_flags
from neoflix.arguments.training import TrainArguments
from neoflix.arguments.values import check_numbers
from neoflix.arguments.words import check_report_to, check_words, read_objects
from neoflix.runtime.errors import UserError


class _Parser(OneSentence, HfArgumentParser):
    pass


def read_all_flags(argv: list[str] | None = None) -> argparse.Namespace:
    """Every flag of `TrainArguments`, from recipe and command line, checked; no arguments are made of them yet.

    --help and --help-all print the flags and exit.

    Args:
        argv: words after the program's name; None reads the command line.

    Raises:
        UserError: a flag is unknown, refused, or has a value that no run can use.
    """
    flags = read_train_flags(argv)
    parser = _Parser(TrainArguments, prog="train.py", usage="deepspeed train.py [--FLAG VALUE ...]", allow_abbrev=False)
    if getattr(flags, "help_all", False):
        parser.print_help()
        sys.exit()
    names = {f.name for f in fields(TrainArguments) if f.init}
    parser.set_defaults(**{name: value for name, value in vars(flags).items() if name in names})
    if flags.other_recipe:
        check_keys(flags.config, flags.other_recipe, names - {"config"})
        parser.set_defaults(**read_recipe_values(parser, TrainArguments, flags.config, flags.other_recipe))
    others, unknown = parser.parse_known_args(flags.others)
    if unknown:
        name = unknown[0].partition("=")[0]  # the value may be a secret
        raise UserError(f"unknown argument {name!r}{nearest(name, parser._option_string_actions)}")
    vars(flags).update(vars(others))
    follow_hardware(flags)
    vars(flags).update(read_objects(flags))
    _check_all(flags)
    return flags


def _check_all(flags: argparse.Namespace) -> None:
    check_numbers(flags)
    if flags.tune:
        raise UserError("--tune starts its runs itself: use python train.py --tune, without a launcher")
    check_words(flags)
    check_report_to(flags.report_to)
    if flags.eval_only:
        return
    check_flags(flags, TrainArguments)
    check_schedule(flags)
    if flags.deepspeed != "auto":
        check_optimizer(flags, read_ds_config(flags.deepspeed))
