"""Hugging Face's flags: those that this project refuses, and the values that no run can use.

Every `TrainingArguments` field either works or is listed in `REFUSED` with the reason; `tests/arguments/test_flags.py`
goes through all of them. A flag is refused where it is set to something else than its default.
"""

import json
import math
import tempfile
from dataclasses import MISSING, fields
from pathlib import Path

from neoflix.arguments.recipes import nearest
from neoflix.runtime.errors import UserError

_NO_PREDICTIONS = "evaluation keeps no predictions, only the loss; leave it out"


_NOT_DDP = "DeepSpeed takes the place of DistributedDataParallel; leave it out"


_HUB = (
    "a run isn't uploaded while it trains, where a failed upload could end it; upload the finished one with "
    "`hf upload NAME {output_dir} --exclude 'checkpoint-*'`"
)


REFUSED = {
    # Data
    "remove_unused_columns": "batches are made of all columns of the tokenized texts; leave it out",
    "label_names": "the labels are the tokens themselves; leave it out",
    "length_column_name": "lengths are those of the tokenized texts; leave it out",
    "dataloader_drop_last": "batches are filled up, so that none is incomplete; leave it out",
    "dataloader_in_order": "the order of the batches must depend on the seed alone; leave it out",
    "accelerator_config": "it would change which texts a step reads; leave it out",
    "ignore_data_skip": "a resumed run reads the texts that it hasn't read yet; leave it out",
    # Learning
    "auto_find_batch_size": "a run keeps its batch size; use --tokens_per_device_batch auto for the largest that fits",
    "label_smoothing_factor": "the loss is the plain cross-entropy of each token; leave it out",
    "neftune_noise_alpha": "its noise depends on the length of a row, and a row holds many packed texts; leave it out",
    "use_liger_kernel": "Liger has no kernels for GPT-Neo, and the loss saves its memory already; leave it out",
    "liger_kernel_config": "Liger has no kernels for GPT-Neo; leave it out",
    "use_cache": "training never reads a cache of keys and values; leave it out",
    "bf16_full_eval": "a model is evaluated in the precision that it trains in; use --bf16",
    "fp16_full_eval": "a model is evaluated in the precision that it trains in; use --fp16",
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
    "enable_jit_checkpoint": "a run that is told to stop saves a checkpoint already; leave it out",
    # Devices
    "fsdp": "DeepSpeed shards the model (ZeRO); choose a file by --deepspeed",
    "fsdp_config": "DeepSpeed shards the model (ZeRO); choose a file by --deepspeed",
    "parallelism_config": "DeepSpeed shards the model (ZeRO); choose a file by --deepspeed",
    "ddp_find_unused_parameters": _NOT_DDP,
    "ddp_bucket_cap_mb": _NOT_DDP,
    "ddp_broadcast_buffers": _NOT_DDP,
    "ddp_static_graph": _NOT_DDP,
    "ddp_backend": "DeepSpeed chooses it by the device; leave it out",
    # The hub
    "push_to_hub": _HUB,
    "hub_model_id": _HUB,
    "hub_strategy": _HUB,
    "hub_private_repo": _HUB,
    "hub_always_push": _HUB,
    "hub_revision": _HUB,
}


# Flags without an effect unless another one is set: (whether it has one, what is missing or in the way).
_TRACKIO = (lambda args: "trackio" in (args.report_to or ""), "without --report_to trackio")


_WORKERS = (lambda args: args.dataloader_num_workers > 0, "without --dataloader_num_workers 1 or more")


_RECOMPUTING = (
    lambda args: getattr(args, "activation_checkpointing", None) or args.gradient_checkpointing,
    "without --activation_checkpointing true",
)


_EVALUATION = (lambda args: args.eval_strategy != "no", "with --eval_strategy no")


_LORA = (lambda args: args.lora, "without --lora true")


_PLAN = (lambda args: args.plan, "without --plan")


NEEDS = {
    "eval_steps": (lambda args: args.eval_strategy == "steps", "without --eval_strategy steps"),
    "save_steps": (lambda args: args.save_strategy == "steps", "without --save_strategy steps"),
    "eval_delay": _EVALUATION,
    "load_best_model_at_end": _EVALUATION,
    "train_sampling_strategy": (lambda args: args.tokens_per_device_batch is None, "with --tokens_per_device_batch"),
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
    "plan_device_memory": _PLAN,
    "plan_host_memory": _PLAN,
}


_POSITIVE = (lambda v: 0 < v < math.inf, "above 0")


_NOT_NEGATIVE = (lambda v: 0 <= v < math.inf, "0 or more")


_AT_LEAST_1 = (lambda v: v >= 1, "1 or more")


_FRACTION = (lambda v: 0 <= v < 1, "at least 0 and below 1")


_SEED = (lambda v: 0 <= v < 2**32, "at least 0 and below 2**32")


# What an evaluation measures; of each of them less is better.
METRICS = [f"{prefix}{metric}" for prefix in ("eval_", "") for metric in ("loss", "perplexity", "bits_per_char")]


# What a number must be. No torch here: `--plan` asks too.
NUMBER_RULES = {
    "validation_fraction": _FRACTION,
    "max_length": (lambda v: v >= 3, "3 or more (two are special tokens)"),
    "early_stopping_patience": _NOT_NEGATIVE,
    "lora_rank": _POSITIVE,
    "lora_alpha": _POSITIVE,
    "num_progress_samples": (lambda v: v >= 0, "0 (none) or more"),
    "per_device_train_batch_size": _AT_LEAST_1,
    "per_device_eval_batch_size": _AT_LEAST_1,
    "gradient_accumulation_steps": _AT_LEAST_1,
    "num_train_epochs": _POSITIVE,
    "max_steps": (lambda v: v == -1 or v >= 1, "1 or more (-1: as many as --num_train_epochs takes)"),
    "learning_rate": _POSITIVE,
    "warmup_steps": _NOT_NEGATIVE,
    "weight_decay": _NOT_NEGATIVE,
    "adam_beta1": _FRACTION,
    "adam_beta2": _FRACTION,
    "adam_epsilon": _POSITIVE,
    "max_grad_norm": (lambda v: 0 <= v < math.inf, "0 (no clipping) or more"),
    "logging_steps": _POSITIVE,
    "eval_steps": _POSITIVE,
    "save_steps": _POSITIVE,
    "eval_delay": _NOT_NEGATIVE,
    "save_total_limit": (lambda v: v >= 1, "1 or more (in a recipe, null keeps all checkpoints)"),
    "seed": _SEED,
    "data_seed": _SEED,
    "dataloader_num_workers": _NOT_NEGATIVE,
    "dataloader_prefetch_factor": _AT_LEAST_1,
    "torch_empty_cache_steps": _AT_LEAST_1,
    "ddp_timeout": _AT_LEAST_1,
}


def changed_flags(args) -> dict:
    """The flags that are set to something else than their default."""
    defaults = {f.name: f.default_factory() if f.default is MISSING else f.default for f in fields(args) if f.init}
    return {name: getattr(args, name) for name, default in defaults.items() if getattr(args, name) != default}


def check_flags(args) -> None:
    """UserError for a flag that has no effect here, or another one than it promises."""
    for name, value in changed_flags(args).items():
        said = _said(name, value)
        if name in REFUSED:
            raise UserError(f"{said}: {REFUSED[name].format(output_dir=args.output_dir)}")
        has_effect, missing = NEEDS.get(name, (None, None))
        if has_effect and not has_effect(args):
            raise UserError(f"{said}: has no effect {missing}; change that, or leave the flag out")


def check_numbers(args) -> None:
    """UserError for a number that no run can use. Flags that `args` doesn't have are passed over."""
    for name, (holds, rule) in NUMBER_RULES.items():
        value = getattr(args, name, None)
        if value is not None and not holds(value):
            raise UserError(f"{_said(name, value)}: must be {rule}")


def _said(name: str, value) -> str:
    """A flag as a user would type it."""
    shown = str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else value
    return f"--{name} {shown}"


def check_writable(folder: str) -> None:
    """UserError unless `folder`, or the nearest folder above it that exists, can be written to."""
    existing = Path(folder).absolute()
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir():
        raise UserError(f"--output_dir {folder}: {existing} is a file; name a folder")
    try:
        tempfile.TemporaryFile(dir=existing).close()
    except OSError as error:
        raise UserError(f"--output_dir {folder}: cannot write in {existing} ({error.strerror})") from error


def check_words(args) -> None:
    """UserError for a word that its flag doesn't know, and for JSON that isn't an object."""
    # Not at the top: a plan reads the tables above without torch.
    from transformers.trainer_utils import IntervalStrategy, SaveStrategy, SchedulerType
    from transformers.training_args import OptimizerNames

    words = {
        "on_full_disk": ("stop", "go_on"),
        "eval_strategy": IntervalStrategy,
        "logging_strategy": IntervalStrategy,
        "save_strategy": SaveStrategy,
        "lr_scheduler_type": SchedulerType,
        "optim": OptimizerNames,
        "debug": ("", "underflow_overflow"),
        "metric_for_best_model": METRICS,
        "torch_compile_mode": _compile_words("mode") if args.torch_compile_mode else (),
        "torch_compile_backend": _compile_words("backend") if args.torch_compile_backend else (),
    }
    for name, known in words.items():
        value, known = getattr(args, name), [getattr(word, "value", word) for word in known]
        for word in value if isinstance(value, list) else [value]:
            if getattr(word, "value", word) not in (None, *known):
                raise UserError(
                    f"--{name} {word}: must be one of {', '.join(filter(None, known))}{nearest(word, known)}"
                )
    for name in ("lr_scheduler_kwargs", "activation_checkpointing_kwargs", "gradient_checkpointing_kwargs"):
        if hasattr(args, name):
            setattr(args, name, _read_object(name, getattr(args, name)))
    if args.greater_is_better and args.metric_for_best_model:
        raise UserError(f"--greater_is_better true: a lower {args.metric_for_best_model} is better; leave it out")
    args.greater_is_better = False


def _compile_words(which: str) -> list[str]:
    """What torch.compile knows as a mode or a backend, of the backends those that accelerate passes on."""
    from accelerate.utils import DynamoBackend
    from torch._dynamo import list_backends
    from torch._inductor import list_mode_options

    if which == "mode":
        return list(list_mode_options())
    return sorted({backend.value.lower() for backend in DynamoBackend} & set(list_backends(None)))


def _read_object(name: str, value: str | dict | None) -> dict | None:
    """A flag's JSON object."""
    if value is None or isinstance(value, dict):
        return value
    try:
        read = json.loads(value)
    except ValueError:
        read = None
    if not isinstance(read, dict):
        raise UserError(f"--{name} {value}: must be a JSON object, such as '{{\"num_cycles\": 2}}'")
    return read
