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


def read_ds_config(source: str | Path) -> dict:
    """Reads and checks a DeepSpeed file, or the JSON itself; ValueError names what is wrong and the way out."""
    is_json = str(source).lstrip().startswith("{")
    path = "{...}" if is_json else source
    try:
        config = json.loads(source if is_json else Path(source).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"--deepspeed {path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise ValueError(f"--deepspeed {path}: not valid JSON ({error})") from error
    if not isinstance(config, dict):
        raise ValueError(f"--deepspeed {path}: should hold one JSON object, {{...}}")
    for key in config:
        if key not in TOP_LEVEL_KEYS:
            near = difflib.get_close_matches(key, TOP_LEVEL_KEYS, n=1)
            hint = f"did you mean {near[0]!r}?" if near else "remove it"
            raise ValueError(f"--deepspeed {path}: DeepSpeed knows no key {key!r} and would ignore it; {hint}")
    check_zero(config.get("zero_optimization", {}), path)
    return config


def check_zero(zero: dict, path: str | Path) -> None:
    """ValueError for what DeepSpeed 0.19.8 would ignore, or spoil the model with."""
    stage, optimizer_device = zero.get("stage", 0), zero.get("offload_optimizer", {}).get("device")
    if "offload_param" in zero and stage != 3:
        raise ValueError(
            f"--deepspeed {path}: offload_param works with ZeRO stage 3 only and would be ignored at stage "
            f'{stage}; set "stage": 3 or remove offload_param'
        )
    if optimizer_device == "nvme" and stage != 3:
        raise ValueError(
            f"--deepspeed {path}: at ZeRO stage {stage} DeepSpeed keeps the optimizer in host memory, not on NVMe; "
            'set "stage": 3 (see ds_configs/nvme.json) or "device": "cpu"'
        )
    if "zenflow" in zero:
        raise ValueError(
            f"--deepspeed {path}: ZenFlow of DeepSpeed 0.19.8 transposes the weights it takes over, and the model is "
            "spoilt before its first step; remove zenflow"
        )


def check_compiler(config: dict) -> None:
    """DeepSpeed compiles its CPU Adam on first use; ValueError says what to install for that."""
    offload = config.get("zero_optimization", {}).get("offload_optimizer", {})
    if offload.get("device") not in ("cpu", "nvme"):
        return
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler) is None and shutil.which("g++") is None:
        raise ValueError(
            "DeepSpeed compiles its CPU Adam on first use and found no C++ compiler: install one "
            "(Debian, Ubuntu: apt install g++; Fedora: dnf install gcc-c++)"
        )
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        raise ValueError(
            "DeepSpeed compiles its CPU Adam on first use and found no Python headers: install them "
            "(Debian, Ubuntu: apt install python3-dev; Fedora: dnf install python3-devel)"
        )
