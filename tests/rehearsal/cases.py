"""What is rehearsed: every recipe, every DeepSpeed file, both sizes of card, one process and two.

Cases with a `setup` compare the plan's memory with the device's, phase by phase. Their texts all have 32 tokens, so
that a batch has as many tokens as the plan assumes.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from standin import Card

ROOT = Path(__file__).resolve().parents[2]
NVME = "runs/rehearsal/nvme"  # a folder, from ROOT

RTX_3090 = Card()
RTX_2080_TI = Card("NVIDIA GeForce RTX 2080 Ti", 11264, 11012, 75)  # no bf16, no flash attention
A100 = Card("NVIDIA A100-SXM4-80GB", 81920, 81050, 80, nvlinks=12)
TWO_A100 = Card(A100.name, A100.mib, A100.torch_mib, A100.capability, count=2, nvlinks=12)

SIZES = ("125M", "1.3B", "2.7B")
SETUPS = {  # by name in the table: flags
    "no_offload": ("--deepspeed", "ds_configs/no_offload.json"),
    "no_offload, recomputed": ("--deepspeed", "ds_configs/no_offload.json", "--activation_checkpointing", "true"),
    "no_offload, LoRA": ("--deepspeed", "ds_configs/no_offload.json", "--lora", "true"),
    "one_card": ("--deepspeed", "ds_configs/one_card.json"),
    "one_card, 6 layers recomputed": ("--deepspeed", "ds_configs/one_card.json", "--activation_checkpointing", "6"),
    "one_small_card, recomputed": (
        *("--deepspeed", "ds_configs/one_small_card.json"),
        *("--activation_checkpointing", "true"),
    ),
    "ds_config": ("--deepspeed", "ds_config.json"),
    "ds_config, recomputed": ("--deepspeed", "ds_config.json", "--activation_checkpointing", "true"),
    "ds_config, accumulated": ("--deepspeed", "ds_config.json", "--gradient_accumulation_steps", "2"),
    "zero3_offload": ("--deepspeed", "ds_configs/zero3_offload.json"),
    "multi_gpu": ("--deepspeed", "ds_configs/multi_gpu.json"),
    "multi_gpu_zero1": ("--deepspeed", "ds_configs/multi_gpu_zero1.json"),
}
COMPARED = ("--per_device_train_batch_size", "64", "--per_device_eval_batch_size", "16", "--plan_must_fit", "false")
COMPARED += ("--max_steps", "3", "--save_strategy", "no", "--logging_steps", "1000")  # the third step logs nothing


@dataclass(frozen=True)
class Case:
    """A command on a card.

    Attributes:
        size: of the model, SIZES or "demo".
        flags: of the script, without model, texts and folder.
        after: name of the case whose run's folder this one goes on with.
        setup: name in SETUPS, if the case compares memory with the plan.
        needs: a file without which the case is skipped.
    """

    name: str
    size: str
    flags: tuple[str, ...] = ()
    card: Card = RTX_3090
    script: str = "train.py"
    num_processes: int = 1
    after: str = ""
    setup: str = ""
    needs: str = ""


def all_cases() -> list[Case]:
    return [*roads(), *comparisons()]


def comparisons() -> list[Case]:
    return [
        Case(f"{size} {setup}", size, (*flags, *COMPARED), A100, setup=setup)
        for size in SIZES
        for setup, flags in SETUPS.items()
    ]


def nvme_config() -> str:
    """ds_configs/nvme.json with a folder of this machine."""
    config = json.loads((ROOT / "ds_configs/nvme.json").read_text())
    config["zero_optimization"]["offload_optimizer"]["nvme_path"] = NVME
    return json.dumps(config)


def roads() -> list[Case]:
    """A user's commands: whole runs of 125M, and three steps of the larger models."""
    toolkit = "/usr/local/cuda/lib64/libcudart.so"  # DeepSpeed links its NVMe operator with it
    few_steps = ("--max_steps", "3", "--save_strategy", "no", "--logging_steps", "1000", "--plan_must_fit", "false")
    often = ("--eval_strategy", "steps", "--eval_steps", "2", "--save_strategy", "steps", "--save_steps", "2")
    small_batches = ("--max_steps", "4", "--per_device_train_batch_size", "16")
    return [
        Case("own-csv", "demo", ("--config", "recipes/own-csv.yaml", "--max_steps", "3")),
        Case("125M, NVMe", "125M", ("--deepspeed", nvme_config(), *few_steps), needs=toolkit),
        Case("demo", "demo", ("--config", "recipes/demo.yaml", "--max_steps", "4")),
        Case(
            "125M, checkpoint",
            "125M",
            ("--config", "recipes/gpt-neo-125m.yaml", "--max_steps", "4", *often),
        ),
        Case(
            "125M, resumed",
            "125M",
            ("--config", "recipes/gpt-neo-125m.yaml", "--max_steps", "6", *often),
            after="125M, checkpoint",
        ),
        Case("125M, evaluation", "125M", ("--eval_only",), after="125M, checkpoint"),
        Case("125M, samples", "125M", ("--num_samples", "24"), script="generate.py", after="125M, checkpoint"),
        Case(
            "125M, samples with a penalty",
            "125M",
            ("--num_samples", "24", "--repetition_penalty", "1.2", "--top_p", "1", "--top_k", "0"),
            script="generate.py",
            after="125M, checkpoint",
        ),
        Case("125M, tokens", "125M", ("--deepspeed", "auto", "--tokens_per_device_batch", "1024", "--max_steps", "4")),
        Case(
            "125M, fp16 on Turing", "125M", ("--deepspeed", "ds_configs/no_offload.json", *small_batches), RTX_2080_TI
        ),
        Case(
            "125M, two cards",
            "125M",
            ("--deepspeed", "auto", *small_batches, *often),
            TWO_A100,
            num_processes=2,
        ),
        Case(
            "125M, two cards, ZeRO-3",
            "125M",
            ("--deepspeed", "ds_configs/zero3_offload.json", *small_batches),
            TWO_A100,
            num_processes=2,
        ),
        Case("gpu.sh", "125M", card=A100, script="benchmarks/gpu.sh"),
        Case("article", "1.3B", ("--config", "recipes/article.yaml", *few_steps)),
        Case("gpt-neo-1.3b", "1.3B", ("--config", "recipes/gpt-neo-1.3b.yaml", *few_steps)),
        Case("gpt-neo-2.7b", "2.7B", ("--config", "recipes/gpt-neo-2.7b.yaml", *few_steps)),
        Case("gpt-neo-2.7b-one-card", "2.7B", ("--config", "recipes/gpt-neo-2.7b-one-card.yaml", *few_steps)),
        Case("gpt-neo-2.7b-lora", "2.7B", ("--config", "recipes/gpt-neo-2.7b-lora.yaml", *few_steps)),
    ]
