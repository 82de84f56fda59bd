"""Checks of train.py's flags that need no torch. Nothing is written."""

import argparse
import math
import tempfile
from pathlib import Path

from neoflix.arguments.deepspeed_file import read_ds_config
from neoflix.arguments.hub_flags import check_push
from neoflix.arguments.refusals import check_flags
from neoflix.arguments.train_flags import TrainFlags
from neoflix.arguments.values import check_numbers
from neoflix.checkpoints.find import check_complete, list_checkpoints
from neoflix.checkpoints.names import RUN_FILE
from neoflix.checkpoints.output_dir import check_output_dir
from neoflix.checkpoints.runs import read_run
from neoflix.checkpoints.same_run import check_overrides
from neoflix.data.template import Template
from neoflix.runtime.errors import UserError


def check_train_flags(flags: argparse.Namespace) -> None:
    """Raises UserError if the flags of `TrainFlags` have values that no run can use, or contradict each other."""
    check_numbers(flags)
    check_template(flags)
    if flags.tokens_per_device_batch not in (None, "auto") and flags.tokens_per_device_batch < 2:
        raise UserError(f"--tokens_per_device_batch {flags.tokens_per_device_batch}: must be 2 or more")
    if flags.bf16 and flags.fp16:
        raise UserError("--bf16 true and --fp16 true: use one of them")
    check_overrides(flags.override_resumed)
    check_push(flags)
    if flags.eval_only:
        check_evaluation(flags)
        return
    if flags.lora and flags.model_name_or_path == "demo":
        raise UserError("--lora true: must have a pretrained model, and 'demo' starts from random weights")
    check_flags(flags, TrainFlags)
    if flags.tune:
        check_tune(flags)
    if not (flags.output_dir or "").strip():
        raise UserError("--output_dir is empty; name the run's folder")
    check_writable(flags.output_dir)
    check_output_dir(flags.output_dir, flags.model_name_or_path)
    if flags.deepspeed != "auto":
        read_ds_config(flags.deepspeed)


def check_template(flags: argparse.Namespace) -> None:
    """Raises UserError if the template is malformed or contradicts --text_column."""
    if flags.template is None:
        if flags.loss_on_prompt:
            raise UserError("--loss_on_prompt: there is no prompt without --template; leave it out, or add a template")
        return
    target = Template(flags.template).text_field
    if flags.text_column not in (None, target):
        raise UserError(
            f"--text_column {flags.text_column}: the target is {{{target}}}, the last column of --template; leave "
            "--text_column out, or end the template with that column"
        )


def check_tune(flags: argparse.Namespace) -> None:
    """Raises UserError if --tune has nothing to compare, or a rate is not a number above 0."""
    if flags.plan:
        raise UserError("--tune prints the plan too; leave --plan out, or --tune for the plan alone")
    if flags.validation_fraction == 0:
        raise UserError("--validation_fraction 0: no text is held out, and --tune compares held-out losses")
    if flags.save_strategy == "no":
        raise UserError("--save_strategy no: --tune continues its runs from checkpoints; leave it out")
    for rate in flags.tune_rates or []:
        try:
            is_valid = 0 < float(rate) < math.inf
        except ValueError:
            is_valid = False
        if not is_valid:
            raise UserError(f"--tune_rates {rate}: must be a number above 0")


def check_writable(folder: str) -> None:
    """Raises UserError unless `folder`, or the nearest folder above it that exists, can be written to."""
    existing = Path(folder).absolute()
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir():
        raise UserError(f"--output_dir {folder}: {existing} is a file; name a folder")
    try:
        tempfile.TemporaryFile(dir=existing).close()
    except OSError as error:
        raise UserError(f"--output_dir {folder}: cannot write in {existing} ({error.strerror})") from error


def check_evaluation(flags: argparse.Namespace) -> None:
    """Raises UserError if --eval_only has no texts, or would write to a run's folder."""
    if flags.validation_fraction == 0:
        raise UserError("--validation_fraction 0: no text is held out, and --eval_only has nothing to evaluate on")
    for name in ("plan", "tune"):
        if getattr(flags, name):
            raise UserError(f"--{name} is for training; with --eval_only, leave it out")
    if not flags.output_dir:
        return
    check_writable(flags.output_dir)
    folder = Path(flags.output_dir).absolute()
    if run := next((path for path in (folder, *folder.parents) if read_run(path)), None):
        raise UserError(
            f"--output_dir {flags.output_dir}: {run} is a run's folder (it has a {RUN_FILE}), and --eval_only does not "
            "write there; name another folder, or leave the flag out"
        )


def find_checkpoint(output_dir: str, resume_from_checkpoint: str | None) -> str | None:
    """The checkpoint that --resume_from_checkpoint names, or None for the run's newest.

    Hugging Face's words `true`, `latest` and `last` mean the newest one, and `false` a run that must be new.

    Raises:
        UserError: there is no such checkpoint, or one that must not be there.
    """
    word = str(resume_from_checkpoint).lower()
    has_checkpoint = bool(list_checkpoints(Path(output_dir)))
    if word in ("true", "latest", "last") and not has_checkpoint:
        raise UserError(
            f"--resume_from_checkpoint {resume_from_checkpoint}: {output_dir} holds no complete checkpoint; leave the "
            "flag out to start there"
        )
    if word == "false" and has_checkpoint:
        raise UserError(
            f"--resume_from_checkpoint {resume_from_checkpoint}: {output_dir} holds a run's checkpoints; choose "
            "another --output_dir to start a new run"
        )
    if word in ("true", "latest", "last", "false", "none", ""):
        return None
    check_complete(resume_from_checkpoint)
    return resume_from_checkpoint
