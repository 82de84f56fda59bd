"""Whether a start of `train.py` begins a new run, resumes the run in its folder, or finds it finished.

Within a run, a setting may change only where `--override_resumed` names it, or where it makes the run longer. The run's
record lists each change with its step (`changes`).
"""

import json
from pathlib import Path
from typing import NamedTuple

from neoflix.checkpoints.find import find_resume_point, list_checkpoints
from neoflix.checkpoints.manifest import find_corruption, read_manifest
from neoflix.checkpoints.names import RESULTS_FILE, RUN_FILE, STATE_FILE
from neoflix.checkpoints.runs import read_run
from neoflix.checkpoints.same_run import (
    SCHEDULE,
    explain_refusal,
    find_differences,
    has_free_schedule,
    makes_longer,
    show,
)
from neoflix.runtime.errors import UserError

PATIENCE_REMEDY = (
    "To go on, raise --early_stopping_patience (0: never stop early) and add --override_resumed early_stopping_patience"
)


class Start(NamedTuple):
    """What a start of `train.py` does with the run in its folder."""

    run: dict  # the record, from this start's first step on
    checkpoint: str | None = None  # to resume from
    from_step: int = 0
    changes: tuple[dict, ...] = ()  # settings that this start changes: `from_step`, `setting`, `was`, `now`
    is_finished: bool = False  # the run is complete with these settings; there is nothing to do


def find_start(
    output_dir: str, resume_from_checkpoint: str | None, run: dict, override: list[str] | None, report=print
) -> Start:
    """Finds out whether a start continues the run in its folder, from which checkpoint, and what it changes. One
    process.

    Args:
        run: the record of this start, by `describe_run`.
        override: settings that may differ from the run's.
        report: called with each sentence for the user.

    Raises:
        UserError: where the start differs from the run in any other setting, or where nothing can be resumed.
    """
    is_complete = Path(output_dir, RESULTS_FILE).is_file()
    before = read_run(output_dir)
    if is_complete and before and not find_differences(before, run):
        report(f"{output_dir} already holds this run, finished. {_explain_remedy(output_dir)}")
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
        report(f"{Path(checkpoint).parent} has no {RUN_FILE}, so {checkpoint} is not compared with these settings")
        return Start(run, checkpoint, step)
    if run["arguments"].keys() - before["arguments"].keys():
        report(f"{RUN_FILE} is from an earlier version, which recorded fewer settings; only those are compared")
    return _resume(before, run, checkpoint, step, override, output_dir, report)


def _resume(before: dict, run: dict, checkpoint: str, step: int, override, output_dir: str, report) -> Start:
    before = rewind(before, step)
    differences = find_differences(before, run)
    allowed = {name.removeprefix("--").replace("-", "_") for name in override or []}
    allowed |= {each.setting for each in differences if makes_longer(each)}
    allowed -= set() if has_free_schedule(before, run) else set(SCHEDULE)
    if refused := [each for each in differences if each.setting not in allowed]:
        raise UserError(explain_refusal(checkpoint, before, run, refused, step))
    if differences and (later := _find_later(output_dir, step)):
        raise UserError(
            f"{checkpoint}: with another {differences[0].setting}, the later {later.name} in {output_dir} would no "
            "longer belong to this run; choose another --output_dir"
        )
    changes = [{"from_step": step, **each._asdict()} for each in differences]
    for each in differences:
        report(f"From step {step} on: --{each.setting} {show(each.now)} (was {show(each.was)})")
    arguments = before["arguments"] | {each.setting: each.now for each in differences}
    record = before | {"texts": run["texts"], "arguments": arguments, "changes": [*before["changes"], *changes]}
    return Start(record, checkpoint, step, tuple(changes))


def _find_later(output_dir: str, step: int) -> Path | None:
    """The newest complete checkpoint after a step; None without one.

    A damaged or misplaced checkpoint does not count, because nothing resumes from it. It is replaced when the run
    reaches its step again.
    """
    for checkpoint in reversed(list_checkpoints(Path(output_dir))):
        if read_manifest(checkpoint)["step"] > step and find_corruption(checkpoint, checksums=True) is None:
            return checkpoint
    return None


def rewind(run: dict, step: int) -> dict:
    """The record as it was after `step` steps, with later changes undone."""
    changes, arguments = run.get("changes", []), dict(run["arguments"])
    for change in reversed(changes):
        if change["from_step"] >= step:
            arguments[change["setting"]] = change["was"]
    kept = [change for change in changes if change["from_step"] < step]
    return run | {"arguments": arguments, "changes": kept}


def check_progress(start: Start, step: int, max_steps: int) -> None:
    """UserError for a start that changes settings of a run but took no step, so that they had no effect."""
    if not start.changes or step > start.from_step:
        return
    names = ", ".join(f"--{change['setting']}" for change in start.changes)
    run = Path(start.checkpoint).parent
    if step < max_steps:
        raise UserError(f"{run}: {names} had no effect on this run. {_explain_early_stop(step)} {PATIENCE_REMEDY}")
    raise UserError(
        f"{run}: {names} had no effect, because the run is complete at step {step}; raise --num_train_epochs (or "
        "--max_steps) too"
    )


def _explain_remedy(output_dir: str) -> str:
    """How a finished run can go on."""
    state = json.loads(Path(output_dir, STATE_FILE).read_text()) if Path(output_dir, STATE_FILE).is_file() else {}
    step, most = state.get("global_step", 0), state.get("max_steps", 0)
    if step < most:
        return f"{_explain_early_stop(step)} {PATIENCE_REMEDY}."
    return "To train it for longer, raise --num_train_epochs (or --max_steps)."


def _explain_early_stop(step: int) -> str:
    return f"It ended early, at step {step}, because the held-out loss had stopped falling (--early_stopping_patience)."
