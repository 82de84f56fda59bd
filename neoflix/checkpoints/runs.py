"""A run's record: what the model is trained with, whether a start continues that run, and what it changes.

`run.json` lies in the run's folder. It is written once a start has taken its first step, so a start that fails before
that changes nothing. Every setting that changes what the model learns is recorded and compared; a setting may change
within a run only where `--override_resumed` names it, or where it makes the run longer, and `changes` says from which
step.
"""

import hashlib
import json
import re
from pathlib import Path
from typing import NamedTuple

from neoflix.checkpoints.find import find_resume_point, list_numbered
from neoflix.checkpoints.manifest import find_corruption, read_manifest
from neoflix.checkpoints.names import RESULTS_FILE, RUN_FILE, STATE_FILE
from neoflix.checkpoints.same_run import (
    DEEPSPEED_NOT_COMPARED,
    NOT_COMPARED,
    OPTIMIZER_NOT_COMPARED,
    PATIENCE_WAY_ON,
    RECORDED_ELSEWHERE,
    SCHEDULE,
    ZERO_COMPARED,
    _has_free_schedule,
    _makes_longer,
    _number,
    _refusal,
    _show,
    _way_on,
    explain_early_stop,
    find_differences,
)
from neoflix.runtime.errors import UserError
from neoflix.runtime.files import write_json


class Start(NamedTuple):
    """How a start of `train.py` stands to the run in its folder."""

    run: dict  # the record, from this start's first step on
    checkpoint: str | None = None  # to resume from
    from_step: int = 0
    changes: tuple[dict, ...] = ()  # settings that this start changes: `from_step`, `setting`, `was`, `now`
    is_finished: bool = False  # this very run, with these settings, is complete: nothing to do


def describe_run(args, model, tokenizer, train_tokens, validation_tokens) -> dict:
    """A run's record: model, tokenizer, texts (by hash), and every setting that changes what is learned."""
    architecture = ("model_type", "hidden_size", "num_layers", "num_hidden_layers", "vocab_size")
    backend = tokenizer.backend_tokenizer.to_str().encode()
    arguments = json.loads(args.to_json_string())
    deepspeed = getattr(args.hf_deepspeed_config, "config", {})
    return {
        "model": args.model_name_or_path,
        "architecture": {key: getattr(model.config, key) for key in architecture if hasattr(model.config, key)},
        "tokenizer": hashlib.sha256(backend).hexdigest()[:16],
        "data": train_tokens.name,
        "held_out": validation_tokens.name,
        "num_training_texts": len(train_tokens.dataset),
        "texts": describe_texts(args),
        "texts_per_step": args.texts_per_step,
        "lora": args.lora_settings,
        "arguments": {key: arguments[key] for key in arguments if key not in NOT_COMPARED | RECORDED_ELSEWHERE},
        "deepspeed": describe_deepspeed(deepspeed),
        "changes": [],
    }


def describe_texts(args) -> dict:
    """The flags that decide which texts are held out, for later evaluations of the run."""
    file = Path(args.dataset).expanduser()
    flags = ("text_column", "template", "loss_on_prompt", "validation_fraction", "max_length")
    texts = {key: getattr(args, key) for key in flags}
    return {"dataset": str(file.resolve()) if file.exists() else args.dataset, **texts}


def describe_deepspeed(config: dict) -> dict:
    """What changes learning in DeepSpeed's file, "auto" filled in: {"optimizer.type": "AdamW", ...}."""
    kept = {key: value for key, value in config.items() if key not in DEEPSPEED_NOT_COMPARED}
    half = [name for name in ("fp16", "bf16", "bfloat16", "amp") if kept.get(name, {}).get("enabled")]
    kept = {key: value for key, value in kept.items() if key not in ("fp16", "bf16", "bfloat16", "amp") or key in half}
    if not half and kept.get("data_types") == {"grad_accum_dtype": "fp32"}:  # as without it
        del kept["data_types"]
    zero = kept.pop("zero_optimization", {})
    kept["zero_optimization"] = {key: zero[key] for key in ZERO_COMPARED if key in zero}
    if "optimizer" in kept:
        params = kept["optimizer"].get("params", {})
        params = {key: value for key, value in params.items() if key not in OPTIMIZER_NOT_COMPARED}
        kept["optimizer"] = kept["optimizer"] | {"params": params}
    return _flatten(kept)


def _flatten(config: dict, prefix: str = "") -> dict:
    """{"a": {"b": 1}} -> {"a.b": 1}"""
    flat = {}
    for key, value in config.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def read_run(folder: str | Path) -> dict | None:
    """A run's record, or None where no run has taken a step."""
    path = Path(folder, RUN_FILE)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error}); restore it, or choose another --output_dir") from error


def find_run(folder: str | Path) -> dict | None:
    """The record of the run that a folder belongs to, as the run's folder or one of its checkpoints; None otherwise."""
    folder = Path(folder).resolve()
    is_checkpoint = re.fullmatch(r"checkpoint-\d+", folder.name)
    return read_run(folder) or (read_run(folder.parent) if is_checkpoint else None)


def read_texts_per_step(output_dir: str, resume_from_checkpoint: str | None) -> int | None:
    """Texts a step of the run that is about to be resumed; None where none is."""
    run = Path(resume_from_checkpoint).parent if resume_from_checkpoint else Path(output_dir)
    if list_numbered(run) or (run / RESULTS_FILE).is_file():
        return (read_run(run) or {}).get("texts_per_step")
    return None


def save_run(folder: str, run: dict) -> None:
    """Records a run that has taken a step, and that it is not finished."""
    for of_the_end in (RESULTS_FILE, STATE_FILE):
        Path(folder, of_the_end).unlink(missing_ok=True)
    write_json(Path(folder, RUN_FILE), run)


def save_results(output_dir: str, results: dict) -> None:
    """Writes the run's figures; from then on it is finished."""
    write_json(Path(output_dir, RESULTS_FILE), results)


def find_start(
    output_dir: str, resume_from_checkpoint: str | None, run: dict, override: list[str] | None, report=print
) -> Start:
    """Whether a start continues the run in its folder, from which checkpoint, and what it changes. One process.

    Args:
        run: the record of this start, as `describe_run` makes it.
        override: settings that may differ from the run's.
        report: called with each sentence for the user.

    Raises:
        UserError: where the start differs from the run in any other setting, or where nothing can be resumed.
    """
    is_complete = Path(output_dir, RESULTS_FILE).is_file()
    before = read_run(output_dir)
    if is_complete and before and not find_differences(before, run):
        report(f"{output_dir} already holds this run, finished. {_way_on(output_dir)}")
        return Start(before, is_finished=True)
    checkpoint = find_resume_point(output_dir, resume_from_checkpoint, report)
    if checkpoint is None:
        if is_complete and before:
            raise UserError(
                f"{output_dir} holds a finished run with other settings and no complete checkpoint to resume; choose "
                "another --output_dir"
            )
        return Start(run)
    step = read_manifest(Path(checkpoint))["step"]
    before = read_run(Path(checkpoint).parent)
    if before is None:
        report(f"{Path(checkpoint).parent} has no {RUN_FILE}: whether {checkpoint} fits these settings is not checked")
        return Start(run, checkpoint, step)
    if run["arguments"].keys() - before["arguments"].keys():
        report(f"{RUN_FILE} is from an earlier version, which recorded fewer settings; only those are compared")
    return _resume(before, run, checkpoint, step, override, output_dir, report)


def _resume(before: dict, run: dict, checkpoint: str, step: int, override, output_dir: str, report) -> Start:
    before = rewind(before, step)
    differences = find_differences(before, run)
    allowed = {name.removeprefix("--").replace("-", "_") for name in override or []}
    allowed |= {each.setting for each in differences if _makes_longer(each)}
    allowed -= set() if _has_free_schedule(before, run) else set(SCHEDULE)
    if refused := [each for each in differences if each.setting not in allowed]:
        raise UserError(_refusal(checkpoint, before, run, refused, step))
    if differences and (later := _find_later(output_dir, step)):
        raise UserError(
            f"{checkpoint}: with another {differences[0].setting}, the later {later.name} in {output_dir} would no "
            "longer belong to this run; choose another --output_dir"
        )
    changes = [{"from_step": step, **each._asdict()} for each in differences]
    for each in differences:
        report(f"From step {step} on: --{each.setting} {_show(each.now)} (was {_show(each.was)})")
    arguments = before["arguments"] | {each.setting: each.now for each in differences}
    record = before | {"texts": run["texts"], "arguments": arguments, "changes": [*before["changes"], *changes]}
    return Start(record, checkpoint, step, tuple(changes))


def _find_later(output_dir: str, step: int) -> Path | None:
    """The newest complete checkpoint after a step; None without one.

    A damaged one does not count: it is passed over, and replaced when the run comes to its step again.
    """
    for checkpoint in reversed(list_numbered(Path(output_dir))):
        if _number(checkpoint) > step and find_corruption(checkpoint, checksums=True) is None:
            return checkpoint
    return None


def rewind(run: dict, step: int) -> dict:
    """The record as it was when the run had taken `step` steps: later changes undone."""
    changes, arguments = run.get("changes", []), dict(run["arguments"])
    for change in reversed(changes):
        if change["from_step"] >= step:
            arguments[change["setting"]] = change["was"]
    kept = [change for change in changes if change["from_step"] < step]
    return run | {"arguments": arguments, "changes": kept}


def check_progress(start: Start, step: int, max_steps: int) -> None:
    """UserError for a start that changes settings of a run and took no step: they had no effect."""
    if not start.changes or step > start.from_step:
        return
    names = ", ".join(f"--{change['setting']}" for change in start.changes)
    run = Path(start.checkpoint).parent
    if step < max_steps:
        raise UserError(f"{run}: {names} had no effect on this run. {explain_early_stop(step)} {PATIENCE_WAY_ON}")
    raise UserError(
        f"{run}: {names} had no effect, because the run is complete at step {step}; raise --num_train_epochs (or "
        "--max_steps) too"
    )
