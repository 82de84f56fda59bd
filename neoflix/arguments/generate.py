"""The command line of `generate.py`."""

import argparse
import itertools

from transformers.hf_argparser import string_to_bool

from neoflix.arguments.parse import (
    _PlainParser,
    _read_recipe,
)
from neoflix.arguments.sampling import SAMPLING_DEFAULTS, SAMPLING_RULES, check_sampling
from neoflix.runtime.errors import UserError


def parse_generate_args(argv: list[str] | None = None) -> argparse.Namespace:
    """`generate.py`'s command line. Sampling flags left unsaid are None: the model's own settings hold."""
    parser = _PlainParser(prog="generate.py", description="Sample new texts from a fine-tuned model.")
    add = parser.add_argument
    add("--model_dir", "--output_dir", help="a run's folder, or one checkpoint of it (default: results)")
    yes_or_no = {"type": string_to_bool, "nargs": "?", "const": True, "default": False}
    add("--allow_pickle", **yes_or_no, help="take weights from a pickle (pytorch_model.bin) if need be")
    add("--prompt", default="", help="how each text begins, or a file with one such beginning a line")
    given = "what is known of the text, for a model with a template: title='The Last Ferry' listed_in=Thrillers"
    add("--fields", nargs="+", metavar="NAME=VALUE", help=given)
    add("--fields_file", help="a table with such fields: a text for each row (CSV, TSV, JSONL or Parquet)")
    add("--num_samples", type=int, help="how many texts, for each prompt (default: 20; of a file of fields: 1)")
    add("--seed", type=int, default=42, help="sample i of a seed is the same text in any batch size")
    add("--batch_size", type=int, default=20, help="how many texts grow side by side")
    add("--output", help="JSONL file to write, a line a text, as they come; the same command goes on with it")
    add("--stream", **yes_or_no, help="print each text as it is written")
    add("--config", help="a recipe: its run is the default folder, its 'generation' section sets the flags below")
    add("--judge", nargs="?", const=True, help="judge the samples just made or, with a JSONL file, those in it")
    add("--novel", **yes_or_no, help="drop copies and near twins of training texts, and draw others")
    sweep = "sample and judge every combination: temperature=0.7,1.0 top_p=0.9,1.0; --output is a folder then"
    add("--sweep", nargs="+", metavar="SETTING=A,B", help=sweep)
    add("--dataset", help="training texts to judge against: as for train.py (default: those the run learnt from)")
    add("--text_column", help="the column that holds them (default: the run's, or description)")
    add("--validation_fraction", type=float, help="share held out of training (default: the run's, or 0.1)")
    add(
        "--base_model",
        help="hub name or folder: its perplexity of the samples; 'none': leave it out (default: the run's)",
    )
    for name, default in SAMPLING_DEFAULTS.items():
        add(f"--{name}", type=type(default), help="default: what the model was saved with")
    args = parser.parse_args(argv)
    recipe, generation = _read_recipe(args.config) if args.config else ({}, {})
    args.fields = parse_fields(args.fields or [])
    if args.prompt and (args.fields or args.fields_file):
        raise UserError("--prompt begins the text as it stands, --fields by the model's template: give one of them")
    defaults = {"num_samples": 20, "model_dir": recipe.get("output_dir", "results")} | generation
    if args.fields_file:
        defaults["num_samples"] = 1
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    for name in SAMPLING_RULES:
        if (value := getattr(args, name)) is not None:
            check_sampling(f"--{name} {value}", name, value)
    args.sweep = parse_sweep(args.sweep) if args.sweep else None
    check_judging(args)
    return args


def parse_fields(words: list[str]) -> dict[str, str]:
    """['title=The Last Ferry', 'type='] -> {'title': 'The Last Ferry', 'type': ''}"""
    fields = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or not name or name in fields:
            raise UserError(
                f"--fields {word}: must be NAME=VALUE, each name once, with quotes where there is space: "
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
            raise UserError(f"--sweep {word}: {name!r} is no sampling setting; there are {known}, as in top_p=0.9,1.0")
        if name in axes:
            raise UserError(f"--sweep {word}: {name} was given before; put its values in one list")
        number = type(SAMPLING_DEFAULTS[name])
        try:
            axes[name] = list(dict.fromkeys(map(number, values.split(","))))
        except ValueError:
            kind = "whole numbers" if number is int else "numbers"
            raise UserError(f"--sweep {word}: must be {name}= and {kind} with commas between") from None
        for value in axes[name]:
            check_sampling(f"--sweep {name}={value}", name, value)
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def check_judging(args: argparse.Namespace) -> None:
    """Raises UserError for flags that contradict each other, and for an impossible --validation_fraction."""
    if isinstance(args.judge, str) and (args.sweep or args.novel or args.output):
        other = "--sweep" if args.sweep else "--novel" if args.novel else "--output"
        raise UserError(f"--judge {args.judge}: judges that file and samples nothing; leave out {other} or the file")
    if args.sweep and args.novel:
        raise UserError("--sweep shows what each setting brings by itself; leave out --novel")
    if args.stream and (args.sweep or args.novel):
        other = "--sweep" if args.sweep else "--novel"
        raise UserError(f"--stream shows each text before it can be judged; leave it out, or {other}")
    if args.validation_fraction is not None and not 0 <= args.validation_fraction < 1:
        raise UserError(f"--validation_fraction {args.validation_fraction}: must be at least 0 and below 1")
    if args.sweep and args.output is None:
        args.output = "samples-sweep"
