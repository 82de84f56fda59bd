"""Checkpoints: written whole or not at all, and the best model put at the top of the run's folder."""

import dataclasses
import math
import shutil
from pathlib import Path

from transformers import Trainer
from transformers.trainer_callback import ExportableState

from neoflix.checkpoints.find import forecast_bytes, list_checkpoints
from neoflix.checkpoints.manifest import Files, find_corruption, num_bytes, read_manifest, write_manifest
from neoflix.checkpoints.names import LATEST_FILE, STATE_FILE
from neoflix.checkpoints.ownership import read_list, temporary
from neoflix.checkpoints.run_folder import check_held
from neoflix.checkpoints.storage import check_space, commit, export_best, prune
from neoflix.model.folder import has_weights
from neoflix.model.lora import has_adapters
from neoflix.runtime.console import is_main_process, say
from neoflix.runtime.errors import UserError
from neoflix.runtime.files import write_json
from neoflix.runtime.processes import gather, run_on_main_process
from neoflix.training.deepspeed import num_elements, save_engine


def save_checkpoint(trainer: Trainer) -> None:
    """Writes `checkpoint-N`, whole or not at all, then deletes those beyond `--save_total_limit`. Collective.

    Earlier checkpoints are not touched before this one is complete.

    Raises:
        UserError: in every process, where the checkpoint cannot be written.
    """
    args, step = trainer.args, trainer.state.global_step
    run = Path(args.output_dir)
    unfinished = temporary(run, f"checkpoint-{step}", ".part")
    run_on_main_process(check_held, run)
    try:
        run_on_main_process(make_folder, unfinished, trainer.model, args.uses_compact_adamw)
        _write_checkpoint(trainer, unfinished)
    except UserError as error:
        run_on_main_process(lambda: shutil.rmtree(unfinished, ignore_errors=True))
        raise UserError(
            f"{error}. The run's earlier checkpoints are whole; the same command resumes from the newest"
        ) from None
    run_on_main_process(lambda: prune(run, args.save_total_limit, find_best_step(args, trainer.state)))


def make_folder(unfinished: Path, model, is_compact: bool) -> None:
    """Makes an empty folder for a checkpoint; UserError where the disk has no room for it. One process."""
    needed = checkpoint_bytes(unfinished.parent, model, is_compact)
    check_space(unfinished.parent, needed, "the next checkpoint takes")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)


def _write_checkpoint(trainer: Trainer, folder: Path) -> None:
    files, engine = Files(folder), trainer.model_wrapped
    with files.remembering_errors():
        trainer.save_model(str(folder), _internal_call=True)
    # LoRA's frozen base is not part of a checkpoint; it stays where it was loaded from.
    save_engine(engine, folder, files.save, exclude_frozen_parameters=has_adapters(trainer.model))
    with files.remembering_errors():
        trainer._save_rng_state(str(folder))
        if is_main_process():
            files.save(trainer.lr_scheduler.state_dict(), folder / "scheduler.pt")
            (folder / LATEST_FILE).write_text(f"global_step{engine.global_steps}")
            _save_state(trainer, folder)
    errors = [error for error in gather(files.error) if error]
    entries = {name: entry for part in gather(files.entries) for name, entry in part.items()}
    run_on_main_process(_complete_checkpoint, trainer, folder, errors, entries)


def _save_state(trainer: Trainer, folder: Path) -> None:
    for stateful in (*trainer.callback_handler.callbacks, trainer.control):
        if isinstance(stateful, ExportableState):
            trainer.state.stateful_callbacks[type(stateful).__name__] = stateful.state()
    write_json(folder / STATE_FILE, dataclasses.asdict(trainer.state))


def _complete_checkpoint(trainer: Trainer, folder: Path, errors: list[str], entries: dict) -> None:
    step = trainer.state.global_step
    facts = {
        "run": read_list(folder.parent)["id"],
        "step": step,
        "best_step": find_best_step(trainer.args, trainer.state, step),
        "num_processes": trainer.args.world_size,
        "zero_stage": trainer.model_wrapped.zero_optimization_stage(),
        "optimizer_groups": len(trainer.optimizer.param_groups),
    }
    try:
        if errors:
            raise OSError(0, errors[0])
        write_manifest(folder, facts, entries)
        commit(folder)
    except OSError as error:
        raise UserError(f"{folder.parent / f'checkpoint-{step}'} could not be written ({error.strerror})") from error


def checkpoint_bytes(run: Path, model, is_compact: bool) -> int:
    """The size of a run's next checkpoint: that of the last one or, before there is one, a forecast."""
    if earlier := list_checkpoints(run):
        return num_bytes(earlier[-1])
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    return forecast_bytes(sum(map(num_elements, weights)), weights[0].element_size(), is_compact)


def check_space_for_all(args, model) -> None:
    """UserError where the disk cannot hold all checkpoints that the run keeps at the same time."""
    run = Path(args.output_dir)
    if args.save_strategy == "no":
        return
    num_kept = (args.save_total_limit or 1) + 1  # a new one is complete before an old one is deleted
    num_missing = max(num_kept - len(list_checkpoints(run)), 1)
    size = checkpoint_bytes(run, model, args.uses_compact_adamw)
    check_space(run, num_missing * size, f"{num_kept} checkpoints side by side need another")


def rank_steps(args, state) -> list[int]:
    """The steps at which the model was evaluated, the best first."""
    if args.metric_for_best_model is None:
        return []
    metric = "eval_" + args.metric_for_best_model.removeprefix("eval_")
    scores = {line["step"]: line[metric] for line in state.log_history if metric in line}
    scores = {step: score for step, score in scores.items() if step > 0 and math.isfinite(score)}
    return sorted(scores, key=scores.get, reverse=bool(args.greater_is_better))


def find_best_step(args, state, *more_steps: int) -> int | None:
    """The step of the best evaluated model among the run's complete checkpoints and `more_steps`."""
    saved = {read_manifest(path)["step"] for path in list_checkpoints(Path(args.output_dir))} | {*more_steps}
    return next((step for step in rank_steps(args, state) if step in saved), None)


def choose_best(args, state) -> tuple[int, Path | None]:
    """The best evaluated model that is still there, as its step and its checkpoint, every file of which is read.

    The checkpoint is None for the model in memory: where it is the best one and was not saved, or where no evaluated
    checkpoint is left.
    """
    checkpoints = {read_manifest(path)["step"]: path for path in list_checkpoints(Path(args.output_dir))}
    last = state.global_step
    for step in [*rank_steps(args, state), last]:
        if step == last and step not in checkpoints:
            break
        if step not in checkpoints:
            continue
        damage = find_corruption(checkpoints[step], checksums=True)
        if damage is None and not has_weights(checkpoints[step]):
            damage = "an earlier version saved it without model.safetensors"
        if damage is None:
            return step, checkpoints[step]
        say(f"warning: {checkpoints[step]} is not used as the best model: {damage}")
    return last, None


def save_best(trainer: Trainer) -> int:
    """Puts the best evaluated model at the top of the run's folder, with the run's history, and returns its step. The
    best model is the last one where no texts are held out. Collective."""
    run = Path(trainer.args.output_dir)
    step, checkpoint = run_on_main_process(choose_best, trainer.args, trainer.state)
    if checkpoint is None:
        model = temporary(run, "model", ".part")
        trainer.save_model(str(model))
        run_on_main_process(_export, model, run)
        run_on_main_process(shutil.rmtree, model)
    else:
        run_on_main_process(_export, checkpoint, run)
    run_on_main_process(write_json, run / STATE_FILE, dataclasses.asdict(trainer.state))
    return step


def _export(folder: Path, run: Path) -> None:
    check_held(run)
    export_best(folder, run)
