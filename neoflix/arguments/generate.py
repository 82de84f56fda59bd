"""The command line of `generate.py`."""

import argparse
import itertools
from dataclasses import fields

from neoflix.arguments.command_line import SWITCH, Parser
from neoflix.arguments.paths import expand_paths
from neoflix.arguments.recipes import check_keys, read_recipe
from neoflix.arguments.sampling import SAMPLING_DEFAULTS, SAMPLING_RULES, check_sampling
from neoflix.arguments.train_flags import TrainFlags
from neoflix.runtime.errors import UserError


def parse_generate_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags of `generate.py`. Sampling flags that are not given are None: the model's own settings apply.

    Raises:
        UserError: a flag has a value that cannot be used, or contradicts another one.
    """
    args = make_parser().parse_args(argv)
    recipe, generation = _read_recipe(args.config) if args.config else ({}, {})
    args.fields = parse_fields(args.fields or [])
    if args.prompt and (args.fields or args.fields_file):
        raise UserError("--prompt and --fields: both begin a text; use one of them")
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
    add("--seed", type=int, metavar="N", default=42, help="a seed gives the same texts for any batch size (42)")
    for name, default in SAMPLING_DEFAULTS.items():
        kind = {int: "N", float: "X"}[type(default)]
        add(f"--{name}", type=type(default), metavar=kind, help="by default as saved with the model")
    add = parser.add_argument_group("input and output").add_argument
    add("--config", metavar="FILE", help="a recipe: samples its run with the settings of its 'generation' section")
    add("--fields_file", metavar="FILE", help="a table with a prompt in each row (CSV, TSV, JSONL or Parquet)")
    add("--batch_size", type=int, metavar="N", default=20, help="texts that are sampled at the same time (20)")
    add("--stream", **SWITCH, default=False, metavar="true|false", help="print each text while it is written")
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


def check_judging(args: argparse.Namespace) -> None:
    """Raises UserError for flags that contradict each other, and for an invalid --validation_fraction."""
    if isinstance(args.judge, str) and (args.sweep or args.novel or args.output):
        other = "--sweep" if args.sweep else "--novel" if args.novel else "--output"
        raise UserError(f"--judge {args.judge}: judges that file and samples nothing; leave out {other}, or the file")
    if args.sweep and args.novel:
        raise UserError("--sweep and --novel: a sweep judges all samples of a setting; leave out --novel")
    if args.stream and (args.sweep or args.novel):
        other = "--sweep" if args.sweep else "--novel"
        raise UserError(f"--stream and {other}: a text is judged before it is shown; leave one of them out")
    if args.validation_fraction is not None and not 0 <= args.validation_fraction < 1:
        raise UserError(f"--validation_fraction {args.validation_fraction}: must be at least 0 and below 1")
    if args.sweep and args.output is None:
        args.output = "samples-sweep"
