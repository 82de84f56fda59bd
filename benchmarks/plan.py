"""Forecast and measured peak of host memory, side by side: real runs of train.py on the CPU.

    python benchmarks/plan.py --output benchmarks/results/plan-cpu.jsonl
    python benchmarks/plan.py --only 38M-offload 38M-cpu-2
    python benchmarks/plan.py --again benchmarks/results/plan-cpu.jsonl    # new forecasts for runs already measured

Each configuration is a whole run with the `deepspeed` launcher: evaluation, two steps, a checkpoint, evaluation. The
models have random weights and GPT-Neo's vocabulary, so that embedding and head have their real share; the texts are
the sample catalogue's. Each run gives one line of JSON with everything that a new forecast needs:
tests/planning/test_forecast.py compares the formulas with the measured peaks.

On a machine with a GPU the same command compares device memory too.
"""

import argparse
import csv
import json
import os
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import GPT2TokenizerFast, GPTNeoConfig, GPTNeoForCausalLM

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from machine import run_job, write_line

from neoflix.arguments.reader import read_train_flags
from neoflix.model.shape import Shape
from neoflix.planning.forecast import Plan, forecast
from neoflix.planning.lengths import Texts
from neoflix.planning.plan_run import plan_run
from neoflix.planning.settings import Settings
from neoflix.runtime.hardware import Machine

PLAIN = {
    "optimizer": {
        "type": "AdamW",
        "params": {
            **dict.fromkeys(("lr", "betas", "eps", "weight_decay"), "auto"),
            **{"torch_adam": True, "fused": True},
        },
    },
    "bf16": {"enabled": "auto"},
    **dict.fromkeys(
        ("gradient_clipping", "gradient_accumulation_steps", "train_micro_batch_size_per_gpu", "train_batch_size"),
        "auto",
    ),
}
ZERO_3 = json.dumps(
    PLAIN | {"zero_optimization": {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True}},
    separators=(",", ":"),
)


class Configuration(NamedTuple):
    size: str
    deepspeed: str
    num_processes: int = 1
    words: tuple[str, ...] = ()
    texts: int = 4  # a process takes at once


LORA = ("--lora", "true")
BF16 = ("--bf16", "true")
ONE_CARD = "ds_configs/one_card.json"
SIZES = {"38M": (4, 512), "51M": (8, 512), "124M": (12, 768)}  # layers, width
CONFIGURATIONS = {
    "38M-cpu": Configuration("38M", "ds_configs/cpu.json"),
    "38M-offload": Configuration("38M", "ds_config.json"),
    "38M-offload-accumulated": Configuration("38M", "ds_config.json", 1, ("--gradient_accumulation_steps", "2")),
    "38M-offload-bf16": Configuration("38M", "ds_config.json", 1, BF16, 2),
    "38M-cpu-bf16": Configuration("38M", "ds_configs/cpu.json", 1, BF16, 2),
    "38M-zero2": Configuration("38M", "ds_configs/no_offload.json"),
    "38M-zero1": Configuration("38M", "ds_configs/multi_gpu_zero1.json"),
    "38M-zero3-offload": Configuration("38M", "ds_configs/zero3_offload.json"),
    "38M-cpu-2": Configuration("38M", "ds_configs/cpu.json", 2),
    "38M-offload-2": Configuration("38M", "ds_config.json", 2),
    "38M-zero2-2": Configuration("38M", "ds_configs/multi_gpu.json", 2),
    "38M-zero3-offload-2": Configuration("38M", "ds_configs/zero3_offload.json", 2),
    "51M-zero3": Configuration("51M", ZERO_3),
    "51M-cpu-64-texts": Configuration("51M", "ds_configs/cpu.json", 1, (), 32),
    "51M-cpu-64-texts-recomputed": Configuration(
        "51M", "ds_configs/cpu.json", 1, ("--activation_checkpointing", "true"), 32
    ),
    "38M-zero2-lora": Configuration("38M", "ds_configs/no_offload.json", 1, LORA),
    "38M-offload-lora": Configuration("38M", "ds_config.json", 1, LORA),
    "51M-cpu-64-texts-lora": Configuration("51M", "ds_configs/cpu.json", 1, LORA, 32),
    "124M-cpu-lora": Configuration("124M", "ds_configs/cpu.json", 1, LORA),
    "124M-cpu-bf16-lora": Configuration("124M", "ds_configs/cpu.json", 1, (*LORA, *BF16), 2),
    "124M-cpu": Configuration("124M", "ds_configs/cpu.json"),
    "124M-offload": Configuration("124M", "ds_config.json"),
    "124M-zero2": Configuration("124M", "ds_configs/no_offload.json"),
    "124M-zero2-lora": Configuration("124M", "ds_configs/no_offload.json", 1, LORA),
    "38M-zero3-offload-lora": Configuration("38M", "ds_configs/zero3_offload.json", 1, LORA),
    "124M-zero3-offload": Configuration("124M", "ds_configs/zero3_offload.json"),
    "38M-one-card": Configuration("38M", ONE_CARD, 1, BF16),
    "38M-one-card-accumulated": Configuration("38M", ONE_CARD, 1, (*BF16, "--gradient_accumulation_steps", "2")),
    "38M-one-card-2": Configuration("38M", ONE_CARD, 2, BF16),
    "51M-one-card": Configuration("51M", ONE_CARD, 1, BF16),
    "51M-one-card-recomputed": Configuration("51M", ONE_CARD, 1, (*BF16, "--activation_checkpointing", "6")),
    "124M-one-card": Configuration("124M", ONE_CARD, 1, BF16),
    "38M-one-small-card": Configuration("38M", "ds_configs/one_small_card.json", 1, BF16),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=CONFIGURATIONS, default=list(CONFIGURATIONS))
    parser.add_argument("--output", help="JSON lines file to append to")
    parser.add_argument("--again", metavar="FILE", help="runs nothing; replaces the forecasts in a file")
    args = parser.parse_args()
    if args.again:
        forecast_again(Path(args.again))
        return
    with tempfile.TemporaryDirectory() as folder:
        for name in args.only:
            figures = compare(name, CONFIGURATIONS[name], Path(folder))
            write_line(figures, args.output)
            ratio = figures["forecast_host_bytes"] / figures["measured_host_bytes"]
            print(
                f"{name}: host {figures['measured_host_bytes'] / 2**30:.2f} GiB, forecast {ratio:.3f} of it", flush=True
            )


def compare(name: str, configuration: Configuration, folder: Path) -> dict:
    """Runs a configuration and returns measured and forecast memory."""
    size, deepspeed, num_processes, more, texts = configuration
    catalogue = folder / "titles.csv"
    if not catalogue.is_file():
        lines = (ROOT / "data" / "sample_titles.csv").read_text(encoding="utf-8").splitlines(keepends=True)
        catalogue.write_text("".join(lines[:150]), encoding="utf-8")
    model = build_folder(folder / size, *SIZES[size])
    run = folder / name
    words = ["--model_name_or_path", str(model), "--dataset", str(catalogue), "--validation_fraction", "0.05"]
    words += ["--output_dir", str(run), "--cache_dir", str(folder / "cache"), "--deepspeed", deepspeed]
    words += ["--per_device_train_batch_size", str(texts), "--per_device_eval_batch_size", "4", "--max_steps", "2"]
    words += ["--report_to", "none", "--disable_tqdm", "true", *more]
    run_job(str(ROOT / "train.py"), words, num_processes)
    results = json.loads((run / "all_results.json").read_text())
    found = forecast_in(words, num_processes)
    figures = {
        "configuration": name,
        "measured_host_bytes": results["train_peak_host_bytes"],
        "measured_device_bytes": results["train_peak_device_bytes"],
        "forecast_host_bytes": found.host_bytes,
        "forecast_device_bytes": found.allocated_bytes if found.machine.has_gpu else 0,
        "shape": asdict(found.shape),
        "texts": asdict(found.texts),
        "settings": asdict(found.settings),
    }
    return figures


def forecast_again(file: Path) -> None:
    """Replaces the forecasts in a file of measured runs, and prints both as a table."""
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    for line in lines:
        shape, texts = Shape(**line["shape"]), Texts(**line["texts"])
        found = forecast(shape, texts, Settings(**line["settings"]), Machine(2**50, None, 2))
        line["forecast_host_bytes"], measured = found.host_bytes, line["measured_host_bytes"]
        figures = f"{measured / 2**30:.2f} | {found.host_bytes / 2**30:.2f} | {found.host_bytes / measured - 1:+.1%}"
        print(f"| {line['configuration']} | {figures} |")
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def forecast_in(words: list[str], num_processes: int) -> Plan:
    """The forecast of train.py for these flags, in as many processes."""
    before = {name: os.environ.get(name) for name in ("WORLD_SIZE", "LOCAL_SIZE")}
    os.environ |= dict.fromkeys(before, str(num_processes))
    try:
        return plan_run(read_train_flags(words))
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def build_folder(folder: Path, num_layers: int, width: int) -> Path:
    """Saves a model like those on the hub: random weights, GPT-Neo's vocabulary size, a small tokenizer."""
    if folder.is_dir():
        return folder
    with open(ROOT / "data" / "sample_titles.csv", encoding="utf-8", newline="") as file:
        titles = [row["description"] for row in csv.DictReader(file)]
    folder.mkdir()
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(titles, 2000, show_progress=False, special_tokens=["<|endoftext|>"])
    bpe.save_model(str(folder))
    GPT2TokenizerFast.from_pretrained(folder).save_pretrained(folder)
    config = GPTNeoConfig(
        vocab_size=50257,
        hidden_size=width,
        num_layers=num_layers,
        num_heads=width // 64,
        attention_types=[[["global", "local"], num_layers // 2]],
        resid_dropout=0.0,
        embed_dropout=0.0,
        attention_dropout=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )
    torch.manual_seed(0)
    GPTNeoForCausalLM(config).save_pretrained(folder)
    return folder


if __name__ == "__main__":
    main()
