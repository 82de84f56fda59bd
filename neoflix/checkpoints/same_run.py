"""Whether a start continues the same run: which settings may differ, and how a difference is reported."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from neoflix.checkpoints.names import STATE_FILE
from neoflix.runtime.errors import UserError

# Arguments that do not change what is learned: paths, logs, speed, memory, rounding. Any other is compared.
NOT_COMPARED = frozenset(
    """
    output_dir config cache_dir command plan plan_must_fit plan_device_memory plan_host_memory allow_pickle
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


class Difference(NamedTuple):
    setting: str
    was: Any
    now: Any


def check_overrides(names: list[str] | None) -> None:
    """UserError for a name in `--override_resumed` that no run can change."""
    for name in names or []:
        if name.removeprefix("--").replace("-", "_") not in OVERRIDABLE:
            raise UserError(
                f"--override_resumed {name}: this setting cannot change within a run; those that can are "
                f"{', '.join(OVERRIDABLE)}"
            )


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
