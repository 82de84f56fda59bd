"""The command line of `generate.py`."""

import argparse
import importlib.util
import itertools
import os
import sys
from collections.abc import Iterable
from dataclasses import fields

from neoflix.arguments.command_line import SWITCH, Parser
from neoflix.arguments.paths import expand_paths
from neoflix.arguments.recipes import check_keys, read_recipe
from neoflix.arguments.sampling import SAMPLING_DEFAULTS, SAMPLING_RULES, check_sampling
from neoflix.arguments.train_flags import TrainFlags
from neoflix.runtime.errors import UserError

DEFAULT_SWEEP_FOLDER = "samples-sweep"
WEB_NUM_SAMPLES = 3
# Without a meaning on a page that writes, judges and streams one prompt's texts by itself.
NOT_WITH_WEB = ("sweep", "novel", "output", "judge", "judged_file", "stream", "fields_file", "base_model")


def parse_generate_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parses `generate.py`'s command line.

    Besides the flags themselves, the result has:
        sampling: seed, batch size and sampling settings, as keyword arguments of `Sampler.sample`. A setting that was
            not given is None: the model's own is used.
        judge: whether to judge the new samples (`--judge` alone).
        judged_file: the samples to judge instead of new ones (`--judge FILE`), or None.
        sweep: the settings to compare, or None.
        output: the file for the samples, or None to print them; with `sweep`, the folder for its files.
        seed: with `web` None if it was not given: the page takes a new one each time.

    Raises:
        UserError: if a value is not valid, or if two flags contradict each other.
    """
    args = make_parser().parse_args(argv)
    args.fields = parse_fields(args.fields or [])
    args.sweep = parse_sweep(args.sweep) if args.sweep else None
    args.judged_file = args.judge if isinstance(args.judge, str) else None
    args.judge = args.judge is True
    _fill_in_defaults(args)
    _check(args)
    if args.sweep and args.output is None:
        args.output = DEFAULT_SWEEP_FOLDER
    args.sampling = {name: getattr(args, name) for name in ("seed", "batch_size", *SAMPLING_DEFAULTS)}
    return args


def make_parser() -> Parser:
    """The parser of `generate.py`, whose help shows the most used flags first."""
    parser = Parser(
        prog="generate.py",
        usage="python generate.py [--model_dir DIR] [--prompt TEXT] [--FLAG VALUE ...]",
        description="Sample new texts from a fine-tuned model.",
        add_help=False,
    )
    add = parser.add_argument_group("most used").add_argument
    add("--model_dir", "--output_dir", metavar="DIR", help="a run's folder, or one of its checkpoints (results)")
    add("--prompt", metavar="TEXT", default="", help="beginning of each text, or a file with one prompt per line")
    fields_help = "columns of the prompt, for a model trained with a template: title='The Last Ferry' type=Movie"
    add("--fields", nargs="+", metavar="NAME=VALUE", help=fields_help)
    add("--num_samples", type=int, metavar="N", help="texts for each prompt (20; with --fields_file 1)")
    add("--output", metavar="FILE", help="JSONL file to write, one text per line; the same command continues it")
    add("--seed", type=int, metavar="N", help="a seed gives the same texts for any batch size (42)")
    for name, default in SAMPLING_DEFAULTS.items():
        kind = {int: "N", float: "X"}[type(default)]
        add(f"--{name}", type=type(default), metavar=kind, help="by default as saved with the model")
    web_help = "open a page in the browser to try the model on; the other flags are its first settings"
    add("--web", **SWITCH, default=False, metavar="true|false", help=web_help)
    add = parser.add_argument_group("input and output").add_argument
    add("--config", metavar="FILE", help="a recipe: samples its run with the settings of its 'generation' section")
    add("--fields_file", metavar="FILE", help="a table with a prompt in each row (CSV, TSV, JSONL or Parquet)")
    slots_help = "texts that are sampled at the same time; auto (the default): as many as make the device faster"
    add("--batch_size", type=_number_or_auto, metavar="N|auto", help=slots_help)
    int8_help = "compute with 8-bit integers on a CPU, which is faster and rounds (false)"
    add("--int8", **SWITCH, default=False, metavar="true|false", help=int8_help)
    add("--stream", **SWITCH, default=False, metavar="true|false", help="print each text while it is written")
    add("--web_port", type=int, metavar="N", help="port of the page, on this machine only (7860 or the next free one)")
    pickle_help = "load weights from a pickle (pytorch_model.bin) if there is no safetensors file"
    add("--allow_pickle", **SWITCH, default=False, metavar="true|false", help=pickle_help)
    add = parser.add_argument_group("judging").add_argument
    add("--judge", nargs="?", const=True, metavar="FILE", help="judge the new samples, or those of a JSONL file")
    novel_help = "replace copies and near-duplicates of training texts by new samples"
    add("--novel", **SWITCH, default=False, metavar="true|false", help=novel_help)
    sweep_help = "sample and judge each combination: temperature=0.7,1.0 top_p=0.9,1.0; --output is a folder"
    add("--sweep", nargs="+", metavar="SETTING=A,B", help=sweep_help)
    add("--dataset", metavar="FILE", help="training texts to judge by, as for train.py (those of the run)")
    add("--text_column", metavar="NAME", help="column with the texts (as in the run, or description)")
    add("--validation_fraction", type=float, metavar="X", help="fraction that was held out (as in the run, or 0.1)")
    base_help = "hub name or folder of the model that gives the samples' perplexity; 'none': no perplexity (the run's)"
    add("--base_model", metavar="MODEL", help=base_help)
    parser.add_argument_group("help").add_argument("-h", "--help", action="help", help="show these flags and exit")
    return parser


def _number_or_auto(word: str) -> int | None:
    """'8' -> 8, 'auto' -> None"""
    try:
        return None if word == "auto" else int(word)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{word} is neither a number nor auto") from None


def _fill_in_defaults(args: argparse.Namespace) -> None:
    """The recipe's values, then the defaults, for flags that were not given."""
    recipe, generation = _read_recipe(args.config) if args.config else ({}, {})
    num_samples, seed = (WEB_NUM_SAMPLES, None) if args.web else (20, 42)
    defaults = {"num_samples": num_samples, "seed": seed, "model_dir": recipe.get("output_dir", "results")} | generation
    if args.fields_file:
        defaults["num_samples"] = 1
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)


def _read_recipe(path: str) -> tuple[dict, dict]:
    """The flags of train.py that a recipe sets, and its sampling settings."""
    flags, generation = read_recipe(path)
    known = {f.name for f in fields(TrainFlags)} - {"config"}
    if not flags.keys() <= known:
        from neoflix.arguments.training import TrainArguments  # seconds, and needed for few recipes

        check_keys(path, flags, {f.name for f in fields(TrainArguments) if f.init} - {"config"})
    return expand_paths(flags), generation


def parse_fields(words: list[str]) -> dict[str, str]:
    """['title=The Last Ferry', 'type='] -> {'title': 'The Last Ferry', 'type': ''}"""
    fields = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or not name or name in fields:
            raise UserError(
                f"--fields {word}: must be NAME=VALUE, each name once, with quotes around spaces: "
                "--fields title='The Last Ferry'"
            )
        fields[name] = value
    return fields


def parse_sweep(words: list[str]) -> list[dict]:
    """['temperature=0.7,1.0', 'top_p=0.9,1.0'] -> the four combinations, each as settings for `Sampler.sample`."""
    axes: dict[str, list] = {}
    for word in words:
        name, _, values = word.partition("=")
        if name not in SAMPLING_DEFAULTS:
            known = ", ".join(SAMPLING_DEFAULTS)
            raise UserError(f"--sweep {word}: {name!r} must be one of {known}, as in top_p=0.9,1.0")
        if name in axes:
            raise UserError(f"--sweep {word}: {name} is given twice; put its values in one list")
        number = type(SAMPLING_DEFAULTS[name])
        try:
            axes[name] = list(dict.fromkeys(map(number, values.split(","))))
        except ValueError:
            kind = "whole numbers" if number is int else "numbers"
            raise UserError(f"--sweep {word}: must be {name}= and {kind}, separated by commas") from None
        for value in axes[name]:
            check_sampling(f"--sweep {name}={value}", name, value)
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def _check(args: argparse.Namespace) -> None:
    """Raises UserError for a value that is not valid, and for flags that contradict each other."""
    for name in SAMPLING_RULES:
        if (value := getattr(args, name)) is not None:
            check_sampling(f"--{name} {value}", name, value)
    if args.validation_fraction is not None and not 0 <= args.validation_fraction < 1:
        raise UserError(f"--validation_fraction {args.validation_fraction}: must be at least 0 and below 1")
    if args.prompt and (args.fields or args.fields_file):
        raise UserError("--prompt begins the text itself, --fields fills in the model's template: use one of them")
    if args.judged_file and (other := _first_given(args, ("sweep", "novel", "output"))):
        raise UserError(
            f"--judge {args.judged_file}: judges that file and samples nothing; leave out {other} or the file"
        )
    _check_web(args)
    if args.sweep and args.novel:
        raise UserError("--sweep compares settings as they are; leave out --novel")
    if args.stream and (other := _first_given(args, ("sweep", "novel"))):
        raise UserError(f"--stream prints each text before it can be judged; leave out --stream or {other}")


def _check_web(args: argparse.Namespace) -> None:
    if not args.web:
        if args.web_port is not None:
            raise UserError(f"--web_port {args.web_port}: is the port of the page; use --web too")
        return
    if other := _first_given(args, NOT_WITH_WEB):
        raise UserError(
            f"--web: the page writes and marks texts by itself; leave out {other.replace('judged_file', 'judge')}"
        )
    if os.path.isfile(args.prompt):
        raise UserError(f"--web: the page has one prompt; give its words instead of the file --prompt {args.prompt}")
    if args.web_port is not None and not 1 <= args.web_port <= 65535:
        raise UserError(f"--web_port {args.web_port}: must be 1 to 65535")
    if importlib.util.find_spec("gradio") is None:
        raise UserError(f"--web: needs Gradio; install it with {sys.executable} -m pip install -r requirements-web.txt")


def _first_given(args: argparse.Namespace, names: Iterable[str]) -> str | None:
    return next((f"--{name}" for name in names if getattr(args, name)), None)
