"""Flags that are refused: those of Hugging Face's that this project does not use, and those without an effect.

Every `TrainingArguments` field either works or is listed in `REFUSED` with the reason; tests/arguments/test_refusals.py
goes through all of them. A flag is refused if its value is not its default. Imports no torch.
"""

from dataclasses import MISSING, fields

from neoflix.arguments.values import as_typed
from neoflix.runtime.errors import UserError

_NO_PREDICTIONS = "evaluation computes the loss and keeps no predictions; leave it out"

_NOT_DDP = "DeepSpeed replaces DistributedDataParallel; leave it out"

_HUB = "the run is uploaded once, at its end, to the main branch; leave it out"

REFUSED = {
    # Data
    "remove_unused_columns": "batches use all columns of the tokenized texts; leave it out",
    "label_names": "the labels are the tokens; leave it out",
    "length_column_name": "lengths are counted from the tokenized texts; leave it out",
    "dataloader_drop_last": "the last batch is filled up and never incomplete; leave it out",
    "dataloader_in_order": "the order of the batches must depend on the seed alone; leave it out",
    "accelerator_config": "it would change the texts of a step; leave it out",
    "ignore_data_skip": "a resumed run always continues with the next texts; leave it out",
    # Learning
    "auto_find_batch_size": "a run keeps its batch size; use --tokens_per_device_batch auto for the largest that fits",
    "label_smoothing_factor": "the loss is the plain cross-entropy of each token; leave it out",
    "neftune_noise_alpha": "its noise depends on the length of a row, and a row packs many texts; leave it out",
    "use_liger_kernel": "Liger has no kernels for GPT-Neo, and our loss saves the same memory; leave it out",
    "liger_kernel_config": "Liger has no kernels for GPT-Neo; leave it out",
    "use_cache": "training uses no cache of keys and values; leave it out",
    "bf16_full_eval": "evaluation uses the precision of training; use --bf16",
    "fp16_full_eval": "evaluation uses the precision of training; use --fp16",
    # Evaluation
    "eval_do_concat_batches": _NO_PREDICTIONS,
    "eval_use_gather_object": _NO_PREDICTIONS,
    "eval_accumulation_steps": _NO_PREDICTIONS,
    "include_for_metrics": _NO_PREDICTIONS,
    "batch_eval_metrics": _NO_PREDICTIONS,
    "do_eval": "use --eval_strategy to evaluate while training, or --eval_only to evaluate without training",
    "do_predict": "use generate.py to sample from the model",
    # Checkpoints
    "save_only_model": "a checkpoint without its optimizer cannot be resumed; leave it out",
    "save_on_each_node": "all nodes write into one shared folder; leave it out",
    "enable_jit_checkpoint": "a run always saves a checkpoint when it is asked to stop; leave it out",
    # Devices
    "fsdp": "DeepSpeed shards the model (ZeRO); choose a file with --deepspeed",
    "fsdp_config": "DeepSpeed shards the model (ZeRO); choose a file with --deepspeed",
    "parallelism_config": "DeepSpeed shards the model (ZeRO); choose a file with --deepspeed",
    "ddp_find_unused_parameters": _NOT_DDP,
    "ddp_bucket_cap_mb": _NOT_DDP,
    "ddp_broadcast_buffers": _NOT_DDP,
    "ddp_static_graph": _NOT_DDP,
    "ddp_backend": "DeepSpeed chooses the backend for the device; leave it out",
    # The hub
    "hub_strategy": _HUB,
    "hub_always_push": _HUB,
    "hub_revision": _HUB,
}

# Flags without an effect unless another flag is set: (whether it is set, what is missing or in the way).
_TRACKIO = (lambda flags: "trackio" in (flags.report_to or ""), "without --report_to trackio")
_WORKERS = (lambda flags: flags.dataloader_num_workers > 0, "without --dataloader_num_workers 1 or more")
_RECOMPUTING = (
    lambda flags: flags.activation_checkpointing or flags.gradient_checkpointing,
    "without --activation_checkpointing true",
)
_EVALUATION = (lambda flags: flags.eval_strategy != "no", "with --eval_strategy no")
_LORA = (lambda flags: flags.lora, "without --lora true")
_PUSH = (lambda flags: flags.push_to_hub, "without --push_to_hub true")
_TUNE = (lambda flags: flags.tune, "without --tune")
_PLAN = (lambda flags: flags.plan, "without --plan")

NEEDS = {
    "eval_steps": (lambda flags: flags.eval_strategy == "steps", "without --eval_strategy steps"),
    "save_steps": (lambda flags: flags.save_strategy == "steps", "without --save_strategy steps"),
    "eval_delay": _EVALUATION,
    "load_best_model_at_end": _EVALUATION,
    "train_sampling_strategy": (lambda flags: flags.tokens_per_device_batch is None, "with --tokens_per_device_batch"),
    "activation_checkpointing_kwargs": _RECOMPUTING,
    "gradient_checkpointing_kwargs": _RECOMPUTING,
    "dataloader_persistent_workers": _WORKERS,
    "dataloader_prefetch_factor": _WORKERS,
    "dataloader_multiprocessing_context": _WORKERS,
    "project": _TRACKIO,
    "trackio_space_id": _TRACKIO,
    "trackio_bucket_id": _TRACKIO,
    "trackio_static_space_id": _TRACKIO,
    "lora_rank": _LORA,
    "lora_alpha": _LORA,
    "hub_model_id": _PUSH,
    "hub_private_repo": _PUSH,
    "tune_rates": _TUNE,
    "tune_steps": _TUNE,
    "plan_device_memory": _PLAN,
    "plan_host_memory": _PLAN,
}


def changed_flags(flags, flags_class: type) -> dict:
    """The flags of a dataclass that do not have their default."""
    known = [f for f in fields(flags_class) if f.init]
    defaults = {f.name: f.default_factory() if f.default is MISSING else f.default for f in known}
    return {name: getattr(flags, name) for name, default in defaults.items() if getattr(flags, name) != default}


def check_flags(flags, flags_class: type) -> None:
    """Raises UserError for a flag of a dataclass that is refused, or has no effect because of the other flags."""
    for name, value in changed_flags(flags, flags_class).items():
        typed = as_typed(name, value)
        if name in REFUSED:
            raise UserError(f"{typed}: {REFUSED[name]}")
        has_effect, missing = NEEDS.get(name, (None, None))
        if has_effect and not has_effect(flags):
            raise UserError(f"{typed}: has no effect {missing}; change that, or leave the flag out")
