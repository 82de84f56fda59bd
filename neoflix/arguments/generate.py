"""The command line of `generate.py`."""

import argparse
import itertools
from collections.abc import Iterable

from transformers.hf_argparser import string_to_bool

from neoflix.arguments.parse import (
    _PlainParser,
    _read_recipe,
)
from neoflix.arguments.sampling import SAMPLING_DEFAULTS, SAMPLING_RULES, check_sampling
from neoflix.runtime.errors import UserError

DEFAULT_SWEEP_FOLDER = "samples-sweep"


def parse_generate_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parses `generate.py`'s command line.

    Besides the flags themselves, the result has:
        sampling: seed, batch size and sampling settings, as keyword arguments of `Sampler.sample`. A setting that was
            not given is None: the model's own is used.
        judge: whether to judge the new samples (`--judge` alone).
        judged_file: the samples to judge instead of new ones (`--judge FILE`), or None.
        sweep: the settings to compare, or None.
        output: the file for the samples, or None to print them; with `sweep`, the folder for its files.

    Raises:
        UserError: if a value is not valid, or if two flags contradict each other.
    """
    args = _build_parser().parse_args(argv)
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


def _build_parser() -> argparse.ArgumentParser:
    parser = _PlainParser(prog="generate.py", description="Sample new texts from a fine-tuned model.")
    switch = {"type": string_to_bool, "nargs": "?", "const": True, "default": False}

    def add(*names: str, help: str, **options) -> None:
        parser.add_argument(*names, help=help, **options)

    add("--model_dir", "--output_dir", help="a run's folder, or one of its checkpoints (default: results)")
    add(
        "--allow_pickle",
        **switch,
        help="load weights from a pickle (pytorch_model.bin) if there is no safetensors file",
    )
    add("--prompt", default="", help="the beginning of each text, or a file with one beginning per line")
    fields = "the fields of the prompt, for a model with a template: title='The Last Ferry' listed_in=Thrillers"
    add("--fields", nargs="+", metavar="NAME=VALUE", help=fields)
    add("--fields_file", help="a table of fields (CSV, TSV, JSONL or Parquet): one prompt per row")
    add("--num_samples", type=int, help="number of texts per prompt (default: 20; with --fields_file: 1)")
    add("--seed", type=int, default=42, help="sample i of a seed is the same text for any batch size (default: 42)")
    add("--batch_size", type=int, default=20, help="number of texts to write at once (default: 20)")
    add("--output", help="JSONL file to write, one sample per line; the same command resumes an interrupted file")
    add("--stream", **switch, help="print each text while it is written")
    recipe = "a recipe: its output_dir is the default --model_dir, its 'generation' section sets the sampling flags"
    add("--config", help=recipe)
    add(
        "--judge",
        nargs="?",
        const=True,
        metavar="FILE",
        help="judge the new samples or, given a JSONL file, those in it",
    )
    add("--novel", **switch, help="replace samples that are duplicates or near duplicates of training texts")
    sweep = "sample and judge every combination: temperature=0.7,1.0 top_p=0.9,1.0; --output is a folder then"
    add("--sweep", nargs="+", metavar="SETTING=A,B", help=sweep)
    add("--dataset", help="training texts to judge against, as for train.py (default: those of the run)")
    add("--text_column", help="column of the training texts (default: the run's)")
    add("--validation_fraction", type=float, help="share held out of training (default: the run's, or 0.1)")
    base = "hub name or folder of the model that measures perplexity; 'none' skips it (default: the run's base model)"
    add("--base_model", help=base)
    for name, default in SAMPLING_DEFAULTS.items():
        add(f"--{name}", type=type(default), help="default: what the model was saved with")
    return parser


def _fill_in_defaults(args: argparse.Namespace) -> None:
    """The recipe's values, then the defaults, for flags that were not given."""
    recipe, generation = _read_recipe(args.config) if args.config else ({}, {})
    defaults = {"num_samples": 20, "model_dir": recipe.get("output_dir", "results")} | generation
    if args.fields_file:
        defaults["num_samples"] = 1
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)


def parse_fields(words: list[str]) -> dict[str, str]:
    """['title=The Last Ferry', 'type='] -> {'title': 'The Last Ferry', 'type': ''}"""
    fields = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or not name or name in fields:
            raise UserError(
                f"--fields {word}: must be NAME=VALUE, each name once; quote values with spaces, as in --fields "
                "title='The Last Ferry'"
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
            raise UserError(f"--sweep {word}: {name!r} is not a sampling setting; use one of {known}")
        if name in axes:
            raise UserError(f"--sweep {word}: {name} is given twice; put its values in one list")
        number = type(SAMPLING_DEFAULTS[name])
        try:
            axes[name] = list(dict.fromkeys(map(number, values.split(","))))
        except ValueError:
            kind = "whole numbers" if number is int else "numbers"
            raise UserError(f"--sweep {word}: must be {name}= followed by {kind}, separated by commas") from None
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
    if args.sweep and args.novel:
        raise UserError("--sweep compares settings as they are; leave out --novel")
    if args.stream and (other := _first_given(args, ("sweep", "novel"))):
        raise UserError(f"--stream prints each text before it can be judged; leave out --stream or {other}")


def _first_given(args: argparse.Namespace, names: Iterable[str]) -> str | None:
    return next((f"--{name}" for name in names if getattr(args, name)), None)
