"""DeepSpeed's JSON file: reads it, and refuses what DeepSpeed and Trainer ignore silently.

DeepSpeed itself refuses misspelled keys in most blocks, and unknown stages.
"""

import difflib
import json
import os
from pathlib import Path

from neoflix.runtime.errors import UserError
from neoflix.runtime.files import ROOT

# Every top-level key that deepspeed 0.19 reads (deepspeed/runtime/config.py and the files it calls).
TOP_LEVEL_KEYS = frozenset(
    """
    activation_checkpointing aio amp autotuning bf16 bfloat16 checkpoint checkpoint_writer comms_logger
    communication_data_type compile compression_training csv_monitor comet curriculum_learning data_efficiency
    data_types dataloader_drop_last datastates_ckpt disable_allgather disable_python_gc dump_state elasticity
    expert_parallel flops_profiler fp16 gradient_accumulation_steps gradient_allreduce_op gradient_clipping
    gradient_predivide_factor hybrid_engine log_level managed_gradient_accumulation memory_breakdown nebula
    optimizer pipeline prescale_gradients progressive_layer_drop quantize_training scheduler
    seq_parallel_communication_data_type sequence_parallel_size sparse_attention sparse_gradients steps_per_print
    tensor_parallel tensorboard timers torch_autocast train_batch_size train_micro_batch_size_per_gpu
    use_data_before_expert_parallelism vocabulary_size wall_clock_breakdown wandb weight_quantization
    zero_allow_untested_optimizer zero_force_ds_cpu_optimizer zero_optimization
    """.split()
)

COMPACT_ADAMW = "CompactAdamW"  # our own optimizer (training/compact_adamw.py), as the file's optimizer type
TWO_PASSES = "two_passes"  # its parameter "in_backward": clips exactly, by the norm that a pass before has measured

_ADAM_PARAMS = ("lr", "betas", "eps", "weight_decay")
_BATCH_KEYS = ("gradient_accumulation_steps", "train_micro_batch_size_per_gpu", "train_batch_size")

# Blocks in which DeepSpeed ignores unknown keys. It refuses them in all other blocks.
OPEN_BLOCKS = {
    "aio": ("block_size", "queue_depth", "intra_op_parallelism", "single_submit", "overlap_events", "use_gds"),
    "data_types": ("grad_accum_dtype", "param_dtype", "buffer_dtype", "keep_in_fp32_modules"),
    "optimizer": ("type", "params", "legacy_fusion"),
}


def find_ds_config(source: dict | str | Path | None) -> dict | str | Path | None:
    """The path of a file of ours that `source` names, whatever the working directory; otherwise `source` itself."""
    if isinstance(source, str | Path) and not is_json(source) and not Path(source).exists():
        return str(ROOT / source) if (ROOT / source).is_file() else source
    return source


def is_json(source) -> bool:
    """Whether `--deepspeed` is JSON itself, and not the path of a file."""
    return str(source).lstrip().startswith("{")


def read_ds_config(source: str | Path) -> dict:
    """Reads and checks a DeepSpeed file, or JSON itself. UserError names the key and the way out."""
    source = find_ds_config(source)
    path = "{...}" if is_json(source) else source
    try:
        config = json.loads(source if is_json(source) else Path(source).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--deepspeed {path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise UserError(f"--deepspeed {path}: not valid JSON ({error})") from error
    if not isinstance(config, dict):
        raise UserError(f"--deepspeed {path}: must hold one JSON object, {{...}}")
    _check_keys(config, path)
    if "scheduler" in config:
        raise UserError(
            f"--deepspeed {path}: a 'scheduler' in the file would override --lr_scheduler_type and --warmup_steps; "
            "remove it"
        )
    _check_zero(config.get("zero_optimization", {}), path)
    if is_compact(config):
        _check_compact(config, path)
    return config


def is_compact(config: dict) -> bool:
    """Whether a DeepSpeed file asks for `CompactAdamW`."""
    return config.get("optimizer", {}).get("type") == COMPACT_ADAMW


def updates_in_backward(config: dict) -> bool | str:
    """Whether it is to update parameters during the backward pass: TWO_PASSES for the second of two."""
    return is_compact(config) and config["optimizer"].get("params", {}).get("in_backward", False)


def _check_compact(config: dict, path: str | Path) -> None:
    """Raises UserError for settings under which DeepSpeed would wrap the optimizer in one with fp32 weights."""
    stage = config.get("zero_optimization", {}).get("stage", 0)
    if stage:
        raise UserError(
            f"--deepspeed {path}: {COMPACT_ADAMW} works without ZeRO only, because ZeRO keeps fp32 weights of its own; "
            'set "stage": 0, or another optimizer'
        )
    for block in ("bf16", "fp16"):
        if block in config:
            raise UserError(
                f"--deepspeed {path}: with {COMPACT_ADAMW} the flag --bf16 decides; remove the block {block!r}, with "
                "which DeepSpeed would keep fp32 weights"
            )
    if unknown := set(config["optimizer"].get("params", {})) - {*_ADAM_PARAMS, "in_backward"}:
        raise UserError(f"--deepspeed {path}: {COMPACT_ADAMW} has no parameter {min(unknown)!r}; remove it")
    if (value := updates_in_backward(config)) not in (False, True, TWO_PASSES):
        raise UserError(f'--deepspeed {path}: "in_backward" is {value!r}; it must be false, true or "{TWO_PASSES}"')


def _check_keys(config: dict, path: str | Path) -> None:
    for block, known in (("", TOP_LEVEL_KEYS), *OPEN_BLOCKS.items()):
        for key in config.get(block, {}) if block else config:
            if key not in known:
                near = difflib.get_close_matches(key, known, n=1)
                hint = f"did you mean {near[0]!r}?" if near else "remove it"
                where = f" in {block!r}" if block else ""
                raise UserError(f"--deepspeed {path}: DeepSpeed has no key {key!r}{where} and would ignore it; {hint}")


def _check_zero(zero: dict, path: str | Path) -> None:
    """Raises UserError for settings that DeepSpeed 0.19.8 ignores, that break the model, or that we do not support."""
    stage, optimizer_device = zero.get("stage", 0), zero.get("offload_optimizer", {}).get("device")
    if "offload_param" in zero and stage != 3:
        raise UserError(
            f"--deepspeed {path}: offload_param works with ZeRO stage 3 only and would be ignored at stage "
            f'{stage}; set "stage": 3 or remove offload_param'
        )
    if optimizer_device == "nvme" and stage != 3:
        raise UserError(
            f"--deepspeed {path}: at ZeRO stage {stage} DeepSpeed keeps the optimizer in host memory, not on NVMe; "
            'set "stage": 3 (see ds_configs/nvme.json) or "device": "cpu"'
        )
    if stage == 3 and zero.get("stage3_gather_16bit_weights_on_model_save") is False:
        raise UserError(
            f'--deepspeed {path}: with "stage3_gather_16bit_weights_on_model_save": false a checkpoint has no whole '
            "weights; set it to true, or remove it"
        )
    if "zenflow" in zero:
        raise UserError(
            f"--deepspeed {path}: ZenFlow of DeepSpeed 0.19.8 transposes the model's weights, which breaks the model; "
            "remove zenflow"
        )


def follow_arguments(config: dict) -> dict:
    """The DeepSpeed file with "auto", the flag's value, for every setting of a flag that the file leaves out.

    Otherwise DeepSpeed would silently use its own default: no clipping, one batch per step, its own betas. It does not
    know `CompactAdamW`, which Trainer hands to it instead.
    """
    config = {"gradient_clipping": "auto", **dict.fromkeys(_BATCH_KEYS, "auto"), **config}
    if is_compact(config):
        del config["optimizer"]
    optimizer = config.get("optimizer")
    if optimizer and optimizer.get("type", "").lower() in ("adam", "adamw"):
        params = dict.fromkeys(_ADAM_PARAMS, "auto") | optimizer.get("params", {})
        config["optimizer"] = {**optimizer, "params": params}
    return config


# Settings that both a DeepSpeed file and a flag have.
_SHARED_KEYS = (
    *("optimizer.params.lr", "optimizer.params.betas", "optimizer.params.eps", "optimizer.params.weight_decay"),
    *("gradient_clipping", "bf16.enabled", "fp16.enabled", *_BATCH_KEYS),
)


def set_values(config: dict) -> dict:
    """The settings of flags that a DeepSpeed file has too, without those that are "auto"."""
    values = {}
    for key in _SHARED_KEYS:
        found = config
        for name in key.split("."):
            found = found.get(name) if isinstance(found, dict) else None
        if found not in (None, "auto"):
            values[key] = found
    return values


def check_agreement(config: dict, flags) -> None:
    """Raises UserError if the DeepSpeed file and a flag have different values. A flag of None has no value yet."""
    if not (values := set_values(config)):
        return
    batch, steps = flags.per_device_train_batch_size, flags.gradient_accumulation_steps
    flag_of = {
        "optimizer.params.lr": ("--learning_rate", flags.learning_rate),
        "optimizer.params.betas": ("--adam_beta1 and --adam_beta2 are", [flags.adam_beta1, flags.adam_beta2]),
        "optimizer.params.eps": ("--adam_epsilon", flags.adam_epsilon),
        "optimizer.params.weight_decay": ("--weight_decay", flags.weight_decay),
        "gradient_clipping": ("--max_grad_norm", flags.max_grad_norm),
        "gradient_accumulation_steps": ("--gradient_accumulation_steps", steps),
        "train_micro_batch_size_per_gpu": ("--per_device_train_batch_size", batch),
        "train_batch_size": ("a step has these texts:", batch * steps * int(os.environ.get("WORLD_SIZE", "1"))),
        "bf16.enabled": ("--bf16", flags.bf16),
        "fp16.enabled": ("--fp16", flags.fp16),
    }
    for key, found in values.items():
        flag, value = flag_of[key]
        if value is not None and found != value:
            raise UserError(
                f'--deepspeed {flags.deepspeed}: {key} is {found}, but {flag} {value}; write "auto" in the file to '
                "let the flag decide"
            )
