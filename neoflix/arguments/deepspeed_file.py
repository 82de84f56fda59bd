"""DeepSpeed's JSON file: read it, and refuse what DeepSpeed and Trainer let through silently.

Nested misspellings, batch sizes that contradict the command line and unknown stages are refused by them
already, with their own words.
"""

import difflib
import json
import os
import shutil
import sysconfig
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


_BATCH_KEYS = ("gradient_accumulation_steps", "train_micro_batch_size_per_gpu", "train_batch_size")


# Blocks whose further keys DeepSpeed ignores; those of the others it refuses itself.
OPEN_BLOCKS = {
    "aio": ("block_size", "queue_depth", "intra_op_parallelism", "single_submit", "overlap_events", "use_gds"),
    "data_types": ("grad_accum_dtype", "param_dtype", "buffer_dtype", "keep_in_fp32_modules"),
    "optimizer": ("type", "params", "legacy_fusion"),
}


def find_ds_config(source: dict | str | Path | None) -> dict | str | Path | None:
    """The file itself where `source` names one of ours, from wherever train.py is called; else what was handed over."""
    if isinstance(source, str | Path) and not is_json(source) and not Path(source).exists():
        return str(ROOT / source) if (ROOT / source).is_file() else source
    return source


def is_json(source) -> bool:
    return str(source).lstrip().startswith("{")


def read_ds_config(source: str | Path) -> dict:
    """Reads and checks a DeepSpeed file, or the JSON itself; UserError names what is wrong and the way out."""
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
    for place, known in (("", TOP_LEVEL_KEYS), *OPEN_BLOCKS.items()):
        for key in config.get(place, {}) if place else config:
            if key not in known:
                near = difflib.get_close_matches(key, known, n=1)
                hint = f"did you mean {near[0]!r}?" if near else "remove it"
                where = f" in {place!r}" if place else ""
                raise UserError(
                    f"--deepspeed {path}: DeepSpeed knows no key {key!r}{where} and would ignore it; {hint}"
                )
    if "scheduler" in config:
        raise UserError(
            f"--deepspeed {path}: --lr_scheduler_type and --warmup_steps set the schedule, and a 'scheduler' in the "
            "file would leave them without an effect; remove it"
        )
    check_zero(config.get("zero_optimization", {}), path)
    return config


def check_zero(zero: dict, path: str | Path) -> None:
    """UserError for what DeepSpeed 0.19.8 would ignore, or spoil the model with."""
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
    if optimizer_device == "nvme" and not zero.get("stage3_gather_16bit_weights_on_model_save"):
        raise UserError(
            f"--deepspeed {path}: with the optimizer on NVMe a checkpoint's shards do not hold the weights; "
            'set "stage3_gather_16bit_weights_on_model_save": true'
        )
    if "zenflow" in zero:
        raise UserError(
            f"--deepspeed {path}: ZenFlow of DeepSpeed 0.19.8 transposes the weights it takes over, and the model is "
            "spoilt before its first step; remove zenflow"
        )


def follow_arguments(config: dict) -> dict:
    """The DeepSpeed file with "auto" (the value of the flag) where it doesn't set what a flag sets.

    DeepSpeed's own default would win otherwise, without a word: no clipping, one batch a step, its own betas.
    """
    config = {"gradient_clipping": "auto", **dict.fromkeys(_BATCH_KEYS, "auto"), **config}
    optimizer = config.get("optimizer")
    if optimizer and optimizer.get("type", "").lower() in ("adam", "adamw"):
        params = dict.fromkeys(("lr", "betas", "eps", "weight_decay"), "auto") | optimizer.get("params", {})
        config["optimizer"] = {**optimizer, "params": params}
    return config


# What both a DeepSpeed file and a flag set.
_SHARED_KEYS = (
    *("optimizer.params.lr", "optimizer.params.betas", "optimizer.params.eps", "optimizer.params.weight_decay"),
    *("gradient_clipping", "bf16.enabled", "fp16.enabled", *_BATCH_KEYS),
)


def set_values(config: dict) -> dict:
    """What a DeepSpeed file sets by itself of all that flags set too: neither left out nor "auto"."""
    values = {}
    for key in _SHARED_KEYS:
        found = config
        for name in key.split("."):
            found = found.get(name) if isinstance(found, dict) else None
        if found not in (None, "auto"):
            values[key] = found
    return values


def check_agreement(config: dict, args) -> None:
    """UserError where the DeepSpeed file sets another value than a flag does."""
    batch, steps = args.per_device_train_batch_size, args.gradient_accumulation_steps
    flags = {
        "optimizer.params.lr": ("--learning_rate", args.learning_rate),
        "optimizer.params.betas": ("--adam_beta1 and --adam_beta2 are", [args.adam_beta1, args.adam_beta2]),
        "optimizer.params.eps": ("--adam_epsilon", args.adam_epsilon),
        "optimizer.params.weight_decay": ("--weight_decay", args.weight_decay),
        "gradient_clipping": ("--max_grad_norm", args.max_grad_norm),
        "gradient_accumulation_steps": ("--gradient_accumulation_steps", steps),
        "train_micro_batch_size_per_gpu": ("--per_device_train_batch_size", batch),
        "train_batch_size": ("the texts of a step are", batch * steps * int(os.environ.get("WORLD_SIZE", "1"))),
        "bf16.enabled": ("--bf16", args.bf16),
        "fp16.enabled": ("--fp16", args.fp16),
    }
    for key, found in set_values(config).items():
        flag, value = flags[key]
        if found != value:
            raise UserError(
                f'--deepspeed {args.deepspeed}: {key} is {found}, but {flag} {value}; write "auto" in the file to '
                "let the flag decide"
            )


def check_compiler(config: dict) -> None:
    """DeepSpeed compiles its CPU Adam on first use; UserError says what to install for that."""
    offload = config.get("zero_optimization", {}).get("offload_optimizer", {})
    if offload.get("device") not in ("cpu", "nvme"):
        return
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler) is None and shutil.which("g++") is None:
        raise UserError(
            "DeepSpeed compiles its CPU Adam on first use and found no C++ compiler: install one "
            "(Debian, Ubuntu: apt install g++; Fedora: dnf install gcc-c++)"
        )
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        raise UserError(
            "DeepSpeed compiles its CPU Adam on first use and found no Python headers: install them "
            "(Debian, Ubuntu: apt install python3-dev; Fedora: dnf install python3-devel)"
        )
