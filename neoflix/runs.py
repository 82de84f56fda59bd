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
from typing import Any, NamedTuple

from neoflix.checkpoint import RESULTS_FILE, RUN_FILE, STATE_FILE, find_resume_point, list_numbered
from neoflix.errors import UserError
from neoflix.manifest import find_damage, read_manifest, write_json

# Arguments that do not change what is learned: paths, logs, speed, memory, rounding. Any other is compared.
NOT_COMPARED = frozenset(
    """
    output_dir config cache_dir command plan plan_must_fit plan_device_memory plan_host_memory on_full_disk allow_pickle
    eval_only do_train do_eval do_predict resume_from_checkpoint override_resumed overwrite_output_dir local_rank
    logging_dir logging_strategy logging_steps logging_first_step logging_nan_inf_filter log_level log_level_replica
    log_on_each_node include_num_input_tokens_seen include_tokens_per_second include_for_metrics disable_tqdm debug
    report_to run_name project trackio_space_id trackio_bucket_id trackio_static_space_id skip_memory_metrics
    push_to_hub hub_token hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision
    sample_prompts num_progress_samples generation use_cache
    eval_on_start per_device_eval_batch_size eval_accumulation_steps eval_do_concat_batches eval_use_gather_object
    prediction_loss_only batch_eval_metrics
    save_total_limit save_only_model save_on_each_node save_safetensors enable_jit_checkpoint load_best_model_at_end
    restore_callback_states_from_checkpoint
    dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor
    dataloader_multiprocessing_context dataloader_in_order remove_unused_columns
    activation_checkpointing activation_checkpointing_kwargs gradient_checkpointing gradient_checkpointing_kwargs
    torch_compile torch_compile_backend torch_compile_mode torch_empty_cache_steps use_liger_kernel
    liger_kernel_config tf32 full_determinism use_cpu ddp_find_unused_parameters ddp_bucket_cap_mb
    ddp_broadcast_buffers ddp_static_graph ddp_backend ddp_timeout
    """.split()
)
# Recorded under names of their own: the model, the texts, LoRA, DeepSpeed's file, and the texts a step.
RECORDED_ELSEWHERE = frozenset(
    """
    model_name_or_path dataset text_column template loss_on_prompt validation_fraction max_length lora lora_rank
    lora_alpha deepspeed per_device_train_batch_size gradient_accumulation_steps auto_find_batch_size
    """.split()
)
SCHEDULE = ("learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps")
LENGTH = ("num_train_epochs", "max_steps")
OVERRIDABLE = (
    *SCHEDULE,
    *LENGTH,
    *("weight_decay", "max_grad_norm", "early_stopping_patience"),
    *("eval_strategy", "eval_steps", "eval_delay", "save_strategy", "save_steps"),
)
STATEFUL_SCHEDULES = ("reduce_lr_on_plateau", "greedy")  # their state is the rate itself: no new one can be set

# Blocks of DeepSpeed's file that do not change what is learned.
DEEPSPEED_NOT_COMPARED = frozenset(
    """
    activation_checkpointing aio autotuning checkpoint checkpoint_writer comms_logger csv_monitor comet
    datastates_ckpt disable_allgather disable_python_gc dump_state elasticity compile flops_profiler
    gradient_accumulation_steps gradient_clipping log_level memory_breakdown nebula steps_per_print tensorboard timers
    train_batch_size train_micro_batch_size_per_gpu use_data_before_expert_parallelism vocabulary_size
    wall_clock_breakdown wandb zero_allow_untested_optimizer zero_force_ds_cpu_optimizer
    """.split()
)
ZERO_COMPARED = ("zero_quantized_weights", "zero_quantized_gradients", "zero_quantized_nontrainable_weights", "zenflow")
# Values that Trainer fills in from the arguments, and choices between implementations of one optimizer.
OPTIMIZER_NOT_COMPARED = ("lr", "betas", "eps", "weight_decay", "torch_adam", "fused")


class Start(NamedTuple):
    """How a start of `train.py` stands to the run in its folder."""

    run: dict  # the record, from this start's first step on
    checkpoint: str | None = None  # to resume from
    from_step: int = 0
    changes: tuple[dict, ...] = ()  # settings that this start changes: `from_step`, `setting`, `was`, `now`
    is_finished: bool = False  # this very run, with these settings, is complete: nothing to do


class Difference(NamedTuple):
    setting: str
    was: Any
    now: Any


# ---- what a run is -----------------------------------------------------------------------------------------


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
        "data": str(train_tokens.split),
        "held_out": str(validation_tokens.split),
        "num_training_texts": len(train_tokens),
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


# ---- its file ----------------------------------------------------------------------------------------------


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


# ---- a start beside the run in its folder -------------------------------------------------------------------


def check_overrides(names: list[str] | None) -> None:
    """UserError for a name in `--override_resumed` that no run can change."""
    for name in names or []:
        if name.removeprefix("--").replace("-", "_") not in OVERRIDABLE:
            raise UserError(
                f"--override_resumed {name}: this setting cannot change within a run; those that can are "
                f"{', '.join(OVERRIDABLE)}"
            )


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
        if _number(checkpoint) > step and find_damage(checkpoint, checksums=True) is None:
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


def find_differences(before: dict, run: dict) -> list[Difference]:
    """Settings in which two records differ. What the earlier one does not know is not compared."""
    before = {"lora": None} | before
    keys = ("model", "architecture", "tokenizer", "data", "held_out", "lora", "texts_per_step")
    pairs = [(key, before[key], run[key]) for key in keys if key in before]
    for part, prefix in (("arguments", ""), ("deepspeed", "deepspeed ")):
        if part in before:
            was, now = before[part], run[part]
            names = was.keys() & now.keys() if part == "arguments" else was.keys() | now.keys()
            pairs += [(prefix + name, was.get(name), now.get(name)) for name in sorted(names)]
    if before["arguments"].get("max_steps", -1) > 0 and run["arguments"]["max_steps"] > 0:
        pairs = [pair for pair in pairs if pair[0] != "num_train_epochs"]  # --max_steps decides
    return [Difference(*pair) for pair in pairs if pair[1] != pair[2]]


def _makes_longer(difference: Difference) -> bool:
    name, was, now = difference
    return name in LENGTH and now > was > 0


def _has_free_schedule(before: dict, run: dict) -> bool:
    """Whether the learning rate is a function of the step, so that a new one can take over."""
    types = {side["arguments"].get("lr_scheduler_type") for side in (before, run)}
    return not types & set(STATEFUL_SCHEDULES) and "scheduler.type" not in run["deepspeed"]


def _refusal(checkpoint: str, before: dict, run: dict, refused: list[Difference], step: int) -> str:
    words = [_name_difference(each, before, run) for each in refused]
    sentence = (
        f"{checkpoint} belongs to a run with {', '.join(words)}; use the earlier settings, or choose another "
        "--output_dir"
    )
    free = OVERRIDABLE if _has_free_schedule(before, run) else set(OVERRIDABLE) - set(SCHEDULE)
    if all(each.setting in free for each in refused):
        names = " ".join(each.setting for each in refused)
        sentence += f", or add --override_resumed {names} to go on from step {step} with the new ones"
    return sentence


def _name_difference(difference: Difference, before: dict, run: dict) -> str:
    name, was, now = difference
    if name in ("architecture", "tokenizer"):
        return f"another {name}"
    if name in ("data", "held_out"):
        texts = "other training texts" if name == "data" else "other held-out texts"
        was, now = before.get("texts", {}), run["texts"]
        flags = [
            f"{key} was {_show(was[key])}, is now {_show(now[key])}"
            for key in now
            if was.get(key, now[key]) != now[key]
        ]
        return texts + (f" ({'; '.join(flags)})" if flags else "")
    return f"another {name} (was {_show(was)}, is now {_show(now)})"


def _show(value) -> str:
    return "unset" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _number(checkpoint: Path) -> int:
    return int(checkpoint.name.partition("-")[2])


def _way_on(output_dir: str) -> str:
    """How a finished run can go on."""
    state = json.loads(Path(output_dir, STATE_FILE).read_text()) if Path(output_dir, STATE_FILE).is_file() else {}
    step, most = state.get("global_step", 0), state.get("max_steps", 0)
    if step < most:
        return f"{explain_early_stop(step)} {PATIENCE_WAY_ON}."
    return "To train it for longer, raise --num_train_epochs (or --max_steps)."


PATIENCE_WAY_ON = (
    "To go on, raise --early_stopping_patience (0: never stop early) and add --override_resumed early_stopping_patience"
)


def explain_early_stop(step: int) -> str:
    return f"It ended early, at step {step}, because the held-out loss had stopped falling (--early_stopping_patience)."


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
