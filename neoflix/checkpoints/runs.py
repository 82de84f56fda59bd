"""A run's record, `run.json`: what the model is trained with.

Every setting that changes what the model learns is recorded, and compared with those of a later start (`start.py`). The
record is written once a start has taken its first step, so a start that fails before that changes nothing.
"""

import hashlib
import json
import re
from pathlib import Path

from neoflix.checkpoints.find import list_numbered
from neoflix.checkpoints.names import RESULTS_FILE, RUN_FILE, STATE_FILE
from neoflix.runtime.errors import UserError
from neoflix.runtime.files import write_json

# Arguments that do not change what the model learns: paths, logs, speed, memory, rounding. All others are compared.
NOT_COMPARED = frozenset(
    """
    output_dir config cache_dir command plan plan_must_fit plan_device_memory plan_host_memory allow_pickle
    tune tune_rates tune_steps
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

# Recorded under other names: the model, the texts, LoRA, the DeepSpeed file, and the texts per step.
RECORDED_ELSEWHERE = frozenset(
    """
    model_name_or_path dataset text_column template loss_on_prompt validation_fraction max_length lora lora_rank
    lora_alpha deepspeed per_device_train_batch_size gradient_accumulation_steps auto_find_batch_size
    """.split()
)

# Keys of the DeepSpeed file that do not change what the model learns.
DEEPSPEED_NOT_COMPARED = frozenset(
    """
    activation_checkpointing aio autotuning checkpoint checkpoint_writer comms_logger csv_monitor comet
    datastates_ckpt disable_allgather disable_python_gc dump_state elasticity compile flops_profiler
    gradient_accumulation_steps gradient_clipping log_level memory_breakdown nebula steps_per_print tensorboard timers
    train_batch_size train_micro_batch_size_per_gpu use_data_before_expert_parallelism vocabulary_size
    wall_clock_breakdown wandb zero_allow_untested_optimizer zero_force_ds_cpu_optimizer
    """.split()
)

# Keys of `zero_optimization` that do.
ZERO_COMPARED = ("zero_quantized_weights", "zero_quantized_gradients", "zero_quantized_nontrainable_weights", "zenflow")

# Values that Trainer fills in from the arguments, and choices between implementations of one optimizer.
OPTIMIZER_NOT_COMPARED = ("lr", "betas", "eps", "weight_decay", "torch_adam", "fused")


def describe_run(args, model, tokenizer, train_tokens, validation_tokens) -> dict:
    """Makes a run's record: model, tokenizer, texts (by hash), and every setting that changes what the model learns."""
    architecture = ("model_type", "hidden_size", "num_layers", "num_hidden_layers", "vocab_size")
    backend = tokenizer.backend_tokenizer.to_str().encode()
    arguments = json.loads(args.to_json_string())
    deepspeed = getattr(args.hf_deepspeed_config, "config", {})
    if args.uses_compact_adamw:  # DeepSpeed does not know its name
        params = {"in_backward": args.updates_in_backward}
        deepspeed = deepspeed | {"optimizer": {"type": "CompactAdamW", "params": params}}
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
    """The settings of a DeepSpeed file that change what the model learns, with "auto" filled in, such as
    {"optimizer.type": "AdamW"}."""
    kept = {key: value for key, value in config.items() if key not in DEEPSPEED_NOT_COMPARED}
    half = [name for name in ("fp16", "bf16", "bfloat16", "amp") if kept.get(name, {}).get("enabled")]
    kept = {key: value for key, value in kept.items() if key not in ("fp16", "bf16", "bfloat16", "amp") or key in half}
    if not half and kept.get("data_types") == {"grad_accum_dtype": "fp32"}:  # no difference
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
    """Reads a run's record; None where no run has taken a step."""
    path = Path(folder, RUN_FILE)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error}); restore it, or choose another --output_dir") from error


def find_run(folder: str | Path) -> dict | None:
    """The record of the run whose folder, or one of whose checkpoints, a folder is; None for any other folder."""
    folder = Path(folder).resolve()
    is_checkpoint = re.fullmatch(r"checkpoint-\d+", folder.name)
    return read_run(folder) or (read_run(folder.parent) if is_checkpoint else None)


def read_texts_per_step(output_dir: str, resume_from_checkpoint: str | None) -> int | None:
    """Texts per step of the run that would be resumed; None where there is none to resume."""
    run = Path(resume_from_checkpoint).parent if resume_from_checkpoint else Path(output_dir)
    if list_numbered(run) or (run / RESULTS_FILE).is_file():
        return (read_run(run) or {}).get("texts_per_step")
    return None


def save_run(folder: str, run: dict) -> None:
    """Writes the record of a run that has taken a step. It is not finished any more, if it was."""
    for of_the_end in (RESULTS_FILE, STATE_FILE):
        Path(folder, of_the_end).unlink(missing_ok=True)
    write_json(Path(folder, RUN_FILE), run)


def save_results(output_dir: str, results: dict) -> None:
    """Writes a run's figures, which marks it as finished."""
    write_json(Path(output_dir, RESULTS_FILE), results)
