"""Arguments: what can be said on the command line or in a recipe, the defaults, and every check of them.

A recipe is a YAML file whose keys are `train.py`'s flags, plus an optional `generation:` section with
`generate.py`'s sampling flags. The command line wins over the recipe, the recipe over the defaults.
"""

import argparse
import itertools
import json
import os
import re
import sys
import traceback
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import NoneType
from typing import get_args, get_origin, get_type_hints

import torch
from transformers import HfArgumentParser, TrainingArguments
from transformers.hf_argparser import string_to_bool
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations

from neoflix.checkpoint import RUN_FILE, check_complete, list_checkpoints
from neoflix.console import say
from neoflix.distributed import ask_main_process
from neoflix.ds_config import (
    ROOT,
    build_operators,
    check_agreement,
    check_compiler,
    find_ds_config,
    follow_arguments,
    is_json,
    leave_out_shared_memory,
    read_ds_config,
)
from neoflix.errors import UserError
from neoflix.flags import check_flags, check_numbers, check_words, check_writable
from neoflix.machine import has_gpu
from neoflix.optimizer import check_optimizer, check_schedule
from neoflix.output_dir import check_output_dir
from neoflix.paths import expand_paths
from neoflix.plan import LORA_RANK, Plan, plan_run
from neoflix.recipes import SAMPLING_DEFAULTS, SAMPLING_RULES, check_sampling, nearest, read_recipe
from neoflix.redaction import is_secret, redact, redact_command
from neoflix.runs import check_overrides, find_run, read_run, read_texts_per_step
from neoflix.template import Template

# Recomputing activations: --activation_checkpointing, which transformers before 5.23 knows by its older name alone.
NAMES_OF_RECOMPUTING = ("activation_checkpointing", "gradient_checkpointing")
RECOMPUTING = next(name for name in NAMES_OF_RECOMPUTING if name in TrainingArguments.__dataclass_fields__)
PACKAGES = {"azure_ml": "azureml-core", "neptune": "neptune-client"}  # whose names are not what --report_to says


def _option(default, text: str):
    return field(default=default, metadata={"help": text})


@dataclass
class TrainArguments(TrainingArguments):
    """Hugging Face's `TrainingArguments` with our defaults, and the few flags they have no word for."""

    config: str | None = _option(None, "Recipe: a YAML file of flags; the command line wins over it.")
    model_name_or_path: str = _option(
        "EleutherAI/gpt-neo-2.7B", "Hub name or folder of a causal language model; 'demo' builds a small one."
    )
    allow_pickle: bool = _option(False, "Take weights from a pickle (pytorch_model.bin) where there is no safetensors.")
    dataset: str = _option(
        "netflix",
        "'netflix', 'sample', a CSV, TSV, JSONL, JSON, Parquet or .txt file, a folder of .txt files, or hf:NAME.",
    )
    text_column: str | None = _option(
        None, "Column of the texts; default: 'description', 'text', or the only one that looks like texts."
    )
    template: str | None = _option(
        None, "Other columns in front of each text: '{title} | {listed_in}: {description}'; the last one is learnt."
    )
    loss_on_prompt: bool = _option(False, "Learn to write those columns too.")
    validation_fraction: float = _option(0.1, "Share of the texts held out, chosen by a hash of each text.")
    max_length: int | None = _option(None, "Longest text in tokens, both special ones counted; default: the window.")
    early_stopping_patience: int = _option(2, "Stop after this many evaluations without a better loss; 0: never.")
    override_resumed: list[str] | None = _option(
        None, "Settings that may differ from those of the run that is resumed: learning_rate weight_decay ..."
    )
    on_full_disk: str = _option("stop", "When a checkpoint cannot be written: 'stop', or 'go_on' without it.")
    cache_dir: str | None = _option(None, "Where token caches lie; default: beside Hugging Face's data set cache.")
    lora: bool = _option(False, "Freeze the model and train small adapters beside it (LoRA): little host memory.")
    lora_rank: int = _option(LORA_RANK, "With --lora: width of an adapter.")
    lora_alpha: float | None = _option(None, "With --lora: adapters count alpha / rank times; default: 2 x rank.")
    eval_only: bool = _option(False, "Measure the model on the held-out texts and end; a run's own texts, if unsaid.")
    sample_prompts: list[str] = field(
        default_factory=lambda: [""],
        metadata={"help": "How the texts begin that are written at every evaluation; one or several."},
    )
    num_progress_samples: int = _option(4, "Texts written at every evaluation, for each of these; 0: none.")
    plan: bool = _option(False, "Say what the run will take and whether it fits, and end.")
    plan_must_fit: bool = _option(True, "Refuse a run that by its plan does not fit; false: warn, and try.")
    plan_device_memory: str | None = _option(None, "With --plan: plan for a GPU of this size, such as 24GiB.")
    plan_host_memory: str | None = _option(None, "With --plan: plan for a host with so much memory free.")

    output_dir: str | None = _option("results", "The run's folder: checkpoints, best model, results, curves.")
    deepspeed: dict | str | None = _option(
        str(ROOT / "ds_config.json"), "DeepSpeed's file; 'auto': the fastest of ours that fits."
    )
    per_device_train_batch_size: int = _option(64, "Texts a device takes at once.")
    tokens_per_device_batch: int | str | None = _option(
        None, "Instead of a count of texts: the most tokens a device takes at once, in even batches; or 'auto'."
    )
    per_device_eval_batch_size: int = _option(32, "Texts a device evaluates at once.")
    gradient_accumulation_steps: int = _option(1, "Batches added up before an optimizer step.")
    learning_rate: float = _option(5e-5, "Peak learning rate.")
    lr_scheduler_type: str = _option("cosine", "How the learning rate falls after the warm-up.")
    warmup_steps: float = _option(0.05, "Warm-up: steps, or below 1 a share of all steps.")
    weight_decay: float = _option(0.01, "AdamW's weight decay.")
    num_train_epochs: float = _option(5.0, "Epochs at the most; early stopping may end it sooner.")
    eval_strategy: str = _option("epoch", "When to evaluate.")
    eval_on_start: bool = _option(True, "Evaluate the untouched model first: the figure to beat.")
    save_strategy: str = _option("epoch", "When to save a checkpoint.")
    save_total_limit: int | None = _option(2, "Checkpoints kept: the newest and the best are never deleted.")
    metric_for_best_model: str | None = _option("eval_loss", "What decides which model is best.")
    greater_is_better: bool | None = _option(False, "Whether more of that is better.")
    logging_steps: float = _option(10, "Steps between two lines of the log.")
    logging_nan_inf_filter: bool = _option(False, "Hide losses that are no number; asks the GPU at every batch.")
    logging_first_step: bool = _option(True, "Log the first step too.")
    report_to: None | str | list[str] = _option("tensorboard", "Where curves go.")
    restore_callback_states_from_checkpoint: bool = _option(True, "Resume early stopping's count as well.")
    remove_unused_columns: bool = _option(False, "Always false: batches are made of all columns of the texts.")
    seed: int = _option(42, "Seeds weights, shuffling and dropout.")

    generation: dict = field(default_factory=dict, init=False)
    command = ""  # what was typed, by parse_train_args; no field either
    forecast = None  # the run's Plan, by parse_train_args; no field: it is no argument

    def __post_init__(self):
        self.tokens_per_device_batch = _count_or_auto(self.tokens_per_device_batch, "tokens_per_device_batch")
        if self.eval_only:
            self.deepspeed = None
            self.check()
            super().__post_init__()
            return
        self.deepspeed = find_ds_config(self.deepspeed)
        self.check()
        self.keep_texts_per_step()
        leave_out_shared_memory()
        config = read_ds_config(self.deepspeed)
        check_agreement(config, self)
        build_operators(config)
        source, self.deepspeed = self.deepspeed, follow_arguments(config)
        super().__post_init__()
        self.deepspeed = config if is_json(source) else source

    def to_dict(self) -> dict:
        """As curves' programs and a run's record keep the arguments: without secrets."""
        return redact(super().to_dict())

    def __getstate__(self) -> dict:
        """What is pickled, as `training_args.bin` in each checkpoint is: without secrets."""
        parsed = ("hf_deepspeed_config", "deepspeed_plugin", "forecast")  # they hold the DeepSpeed file once more
        plain = {name: value for name, value in vars(self).items() if not (is_secret(name) or name in parsed)}
        return {name: redact(value) if isinstance(value, str | dict) else value for name, value in plain.items()}

    @property
    def weight_dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.bf16 else torch.float16 if self.fp16 else torch.float32

    @property
    def text_template(self) -> Template | None:
        return Template(self.template, self.loss_on_prompt) if self.template else None

    @property
    def lora_settings(self) -> dict | None:
        """What `lora.add_adapters` takes; None where the whole model learns."""
        alpha = 2.0 * self.lora_rank if self.lora_alpha is None else self.lora_alpha
        return {"rank": self.lora_rank, "alpha": alpha} if self.lora else None

    @property
    def texts_per_step(self) -> int:
        """Fewest texts of a step: those of all its batches or, where these are counted in tokens, one for each."""
        texts_per_batch = 1 if self.tokens_per_device_batch else self.train_batch_size
        return texts_per_batch * self.gradient_accumulation_steps * self.world_size

    def keep_texts_per_step(self) -> None:
        """A run that goes on with another number of processes keeps the texts of its steps: each process takes its
        share, in as many batches as that needs. UserError where the shares would not be even."""
        texts_per_step = read_texts_per_step(self.output_dir, self.resume_from_checkpoint)
        if texts_per_step is None:
            return
        num_processes = int(os.environ.get("WORLD_SIZE", "1"))
        share, rest = divmod(texts_per_step, num_processes)
        if rest:
            counts = [str(n) for n in range(1, texts_per_step + 1) if texts_per_step % n == 0]
            raise UserError(
                f"{self.output_dir}: its run takes {texts_per_step} texts a step, and {num_processes} processes cannot "
                f"share them evenly; use {', '.join(counts)} processes, or start anew in another --output_dir"
            )
        batch = 1 if self.tokens_per_device_batch else min(self.per_device_train_batch_size, share)
        while share % batch:
            batch -= 1
        kept = {"gradient_accumulation_steps": share // batch}
        if self.tokens_per_device_batch is None:
            kept["per_device_train_batch_size"] = batch
        changes = [f"--{name} {value}" for name, value in kept.items() if getattr(self, name) != value]
        for name, value in kept.items():
            setattr(self, name, value)
        if changes:
            say(f"The run keeps its {texts_per_step} texts a step on {num_processes} process(es): {' '.join(changes)}")

    def check(self) -> None:
        """Refuses values that no run can use; before devices and process groups are touched."""
        check_numbers(self)
        check_words(self)
        self.check_template()
        if self.tokens_per_device_batch not in (None, "auto") and self.tokens_per_device_batch < 2:
            raise UserError(f"--tokens_per_device_batch {self.tokens_per_device_batch}: must be 2 or more")
        if self.lora and self.model_name_or_path == "demo" and not self.eval_only:
            raise UserError("--lora needs a pretrained model, and 'demo' starts from random weights")
        check_report_to(self.report_to)
        check_overrides(self.override_resumed)
        if self.eval_only:
            self.check_evaluation()
            return
        check_flags(self)
        if self.validation_fraction == 0:  # nothing to evaluate on
            self.eval_strategy, self.eval_on_start, self.metric_for_best_model = "no", False, None
        if not (self.output_dir or "").strip():
            raise UserError("--output_dir is empty; name the run's folder")
        check_writable(self.output_dir)
        check_output_dir(self.output_dir, self.model_name_or_path)
        self.check_resume()
        config = read_ds_config(self.deepspeed)
        check_schedule(self)
        check_optimizer(self, config)
        check_compiler(config)
        self.load_best_model_at_end = False  # Trainer would load it once more; a run keeps its best model in any case

    def check_resume(self) -> None:
        """Turns Hugging Face's words for `--resume_from_checkpoint` into ours, by which None is the newest one."""
        word = str(self.resume_from_checkpoint).lower()
        has_checkpoint = bool(list_checkpoints(Path(self.output_dir)))
        if word in ("true", "latest", "last") and not has_checkpoint:
            raise UserError(
                f"--resume_from_checkpoint {self.resume_from_checkpoint}: {self.output_dir} holds no complete "
                "checkpoint; leave the flag out to start there"
            )
        if word == "false" and has_checkpoint:
            raise UserError(
                f"--resume_from_checkpoint {self.resume_from_checkpoint}: {self.output_dir} holds a run's checkpoints; "
                "choose another --output_dir to start anew"
            )
        if word in ("true", "latest", "last", "false", ""):
            self.resume_from_checkpoint = None
        elif self.resume_from_checkpoint:
            check_complete(self.resume_from_checkpoint)

    def check_template(self) -> None:
        """Raises UserError if the template is malformed or contradicts --text_column."""
        if self.template is None:
            if self.loss_on_prompt:
                raise UserError("--loss_on_prompt: without --template there is no prompt; leave it out, or give one")
            return
        learnt = Template(self.template).text_field
        if self.text_column not in (None, learnt):
            raise UserError(
                f"--text_column {self.text_column}: the template ends with {{{learnt}}}, which is learnt; leave the "
                "flag out, or end the template with that column"
            )

    def check_evaluation(self) -> None:
        """UserError where there is nothing to evaluate on, or a run's folder would be written to."""
        if self.validation_fraction == 0:
            raise UserError("--validation_fraction 0: no text is held out, and --eval_only has nothing to measure on")
        if self.plan:
            raise UserError("--plan forecasts training; with --eval_only, leave it out")
        if not self.output_dir:
            return
        check_writable(self.output_dir)
        folder = Path(self.output_dir).absolute()
        if run := next((path for path in (folder, *folder.parents) if read_run(path)), None):
            raise UserError(
                f"--output_dir {self.output_dir}: {run} is a run's folder (it has a {RUN_FILE}), which --eval_only "
                "leaves alone; name another one, or none"
            )


def check_report_to(report_to: str | list[str] | None) -> None:
    """UserError where curves are to go to what transformers does not know, or to what is not installed."""
    names = [report_to] if isinstance(report_to, str) else report_to or []
    if names in (["all"], ["none"]):
        return
    for name in names:
        if name not in INTEGRATION_TO_CALLBACK:
            known = ["none", "all", *sorted(INTEGRATION_TO_CALLBACK)]
            raise UserError(f"--report_to {name}: must be of {', '.join(known)}{nearest(name, known)}")
        if name not in {*get_available_reporting_integrations(), "flyte"}:
            raise UserError(
                f"--report_to {name}: its package is not installed; `pip install {PACKAGES.get(name, name)}`, or take "
                "--report_to tensorboard or none"
            )


def _count_or_auto(value: int | str | None, flag: str) -> int | str | None:
    """A flag's number, which a command line hands over as a word. UserError for any other word than 'auto'."""
    try:
        return value if value in (None, "auto") else int(value)
    except ValueError:
        raise UserError(f"--{flag} {value}: must be a number of tokens, or auto") from None


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
        vars(args).update(ask_main_process(_choose, args, is_auto))
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


def parse_export_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line of `python -m neoflix.export`."""
    parser = _PlainParser(prog="python -m neoflix.export", description="Rewrite a model for other engines.")
    add = parser.add_argument
    layouts = (
        "gpt2: GPT-2's, exact up to GPT-Neo's window of 256 tokens; merged: the model's own, LoRA's adapters merged"
    )
    add("--to", choices=["gpt2", "merged"], required=True, help=layouts)
    add("--dtype", choices=["float32", "float16", "bfloat16"], help="of the weights (default: as they were saved)")
    yes_or_no = {"type": string_to_bool, "nargs": "?", "const": True, "default": False}
    add("--allow_pickle", **yes_or_no, help="take weights from a pickle (pytorch_model.bin) if need be")
    add("run", metavar="RUN", help="a run's folder, or one checkpoint of it")
    add("out", metavar="OUT", help="the folder to write; must not exist yet, or be empty")
    return parser.parse_args(argv)


def parse_report_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line of `python -m neoflix.report`."""
    parser = _PlainParser(prog="python -m neoflix.report", description="Write a run's report, or compare several runs.")
    add = parser.add_argument
    add("--output", help="HTML file to write (default: report.html in the run's folder; of several: comparison.html)")
    add("runs", metavar="RUN", nargs="+", help="a run's folder, finished or not; several are compared in one page")
    return parser.parse_args(argv)


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
