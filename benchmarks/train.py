"""The article's training recipe and this project's, side by side: same texts, same model, same device.

    python benchmarks/train.py                        # a small GPT-Neo with the real vocabulary's size, on this machine
    python benchmarks/train.py --architecture 2.7B    # random weights: speed and memory do not care

Each side runs as its own `deepspeed` job, the two in turn (article, ours, article, ours, ...), so that what else
the machine does falls on both. Tokens are random numbers; texts have the real descriptions' lengths. Real tokens
are those of texts: what a side pads costs it time and earns it nothing. The last line is JSON; with --output it is
also appended to a file.
"""

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import torch
import transformers
from datasets import Dataset
from transformers import GPTNeoConfig, GPTNeoForCausalLM, Trainer, TrainerCallback, TrainingArguments

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from neoflix.attention import ATTENTION_NAME, register_attention  # noqa: E402
from neoflix.data import PackedCollator  # noqa: E402
from neoflix.distributed import prepare_environment  # noqa: E402
from neoflix.trainer import peak_host_bytes  # noqa: E402

# (layers, width, heads); "small" is what two CPU cores train in seconds
ARCHITECTURES = {
    "small": (4, 256, 4),
    "125M": (12, 768, 12),
    "1.3B": (24, 2048, 16),
    "2.7B": (32, 2560, 20),
}
VOCAB_SIZE = 50_304  # 50,257, three special tokens, rounded up to a multiple of 64
PADDED_LENGTH = 62  # the article pads every text to the longest
WARM_UP_STEPS = 2

# The article's DeepSpeed file (its 2.7B variant), but for the precision, which the device decides for both sides.
ARTICLE_DS_CONFIG = {
    "bf16": {"enabled": "auto"},
    "optimizer": {
        "type": "AdamW",
        "params": {"lr": 5e-5, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.0},
    },
    "zero_optimization": {
        "stage": 2,
        "allgather_partitions": True,
        "allgather_bucket_size": 500000000,
        "overlap_comm": True,
        "reduce_scatter": True,
        "reduce_bucket_size": 500000000,
        "contiguous_gradients": True,
        "offload_optimizer": {"device": "cpu"},
    },
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "steps_per_print": 1000000000,
}


def main() -> None:
    args = parse_args()
    if args.side:
        measure_one_side(args)
        return
    runs = {"article": [], "ours": []}
    for turn in range(args.turns):
        for side in runs:
            runs[side].append(run_side(args, side))
            figures = runs[side][-1]
            print(f"turn {turn + 1}, {side}: {figures['real_tokens_per_second']:,.0f} real tokens/s", flush=True)
    report(args, runs)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architecture", choices=ARCHITECTURES, default="small")
    parser.add_argument("--texts_per_step", type=int, default=15, help="the article's batch")
    parser.add_argument("--steps", type=int, default=12, help=f"steps a turn, the first {WARM_UP_STEPS} not counted")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--deepspeed", default=str(ROOT / "ds_config.json"), help="our side's DeepSpeed file")
    parser.add_argument("--device_memory_fraction", type=float, default=1.0, help="e.g. 0.17 makes 24 GB of 141 GB")
    parser.add_argument("--output", help="JSON lines file to append to")
    parser.add_argument("--side", choices=["article", "ours"], help=argparse.SUPPRESS)
    parser.add_argument("--figures", help=argparse.SUPPRESS)
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)
    return parser.parse_args()


def run_side(args: argparse.Namespace, side: str) -> dict:
    """Runs one side in a job of its own and returns its figures."""
    with tempfile.TemporaryDirectory() as folder:
        figures = Path(folder, "figures.json")
        command = [str(Path(sys.executable).with_name("deepspeed")), "--quiet", "--num_accelerators", "1"]
        command += ["--master_port", str(random.randint(20_000, 30_000)), __file__, "--side", side]
        command += ["--figures", str(figures)]
        for name in ("architecture", "texts_per_step", "steps", "deepspeed", "device_memory_fraction"):
            command += [f"--{name}", str(getattr(args, name))]
        env = {"DS_ACCELERATOR": "cuda" if torch.cuda.is_available() else "cpu"}
        env["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", str(len(os.sched_getaffinity(0))))
        done = subprocess.run(command, env={**os.environ, **env}, capture_output=True, text=True, check=False)
        if not figures.is_file():
            sys.exit(f"error: the {side} side failed:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
        return json.loads(figures.read_text())


class Clock(TrainerCallback):
    """Seconds of each optimizer step, from the end of the one before."""

    def __init__(self):
        self.ends = []

    def on_step_end(self, args, state, control, **kwargs):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())


def measure_one_side(args: argparse.Namespace) -> None:
    prepare_environment()
    transformers.set_seed(0)
    if torch.cuda.is_available():
        torch.cuda.set_per_process_memory_fraction(args.device_memory_fraction)
    use_cpu = not torch.cuda.is_available()
    with tempfile.TemporaryDirectory() as folder:
        training = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=args.texts_per_step,
            max_steps=args.steps,
            learning_rate=5e-5,
            bf16=not use_cpu,
            use_cpu=use_cpu,
            deepspeed=ARTICLE_DS_CONFIG if args.side == "article" else args.deepspeed,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        texts = draw_texts(args.texts_per_step * args.steps)
        model = build_model(args.architecture, args.side, torch.float32 if use_cpu else torch.bfloat16)
        clock = Clock()
        trainer = Trainer(
            model=model,
            args=training,
            train_dataset=Dataset.from_dict({"input_ids": texts}),
            data_collator=PackedCollator() if args.side == "ours" else pad_to_the_longest,
            callbacks=[clock],
        )
        trainer.train()
    seconds = clock.ends[-1] - clock.ends[WARM_UP_STEPS - 1]
    num_steps = args.steps - WARM_UP_STEPS
    tokens_per_step = sum(map(len, texts)) / args.steps
    figures = {
        "real_tokens_per_second": tokens_per_step * num_steps / seconds,
        "seconds_per_step": seconds / num_steps,
        "real_tokens_per_step": tokens_per_step,
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "peak_host_gib": peak_host_bytes() / 2**30,
    }
    if not use_cpu:
        figures["peak_device_allocated_gib"] = torch.cuda.max_memory_allocated() / 2**30
        figures["peak_device_reserved_gib"] = torch.cuda.max_memory_reserved() / 2**30
    Path(args.figures).write_text(json.dumps(figures))


def draw_texts(num_texts: int) -> list[list[int]]:
    """Random tokens with the lengths of the Netflix descriptions: 14 to 62, mean 31.8, 99th percentile 42."""
    rng = random.Random(0)
    lengths = [min(max(round(rng.gauss(31.8, 4.4)), 14), PADDED_LENGTH) for _ in range(num_texts)]
    return [[rng.randrange(50_257) for _ in range(length)] for length in lengths]


def pad_to_the_longest(examples: list[dict]) -> dict:
    """The article's batch: every text padded to the data set's longest, and padding is a label too."""
    pad = VOCAB_SIZE - 1
    rows = [example["input_ids"] + [pad] * (PADDED_LENGTH - len(example["input_ids"])) for example in examples]
    input_ids = torch.tensor(rows)
    return {"input_ids": input_ids, "attention_mask": (input_ids != pad).long(), "labels": input_ids.clone()}


def build_model(architecture: str, side: str, dtype: torch.dtype) -> GPTNeoForCausalLM:
    num_layers, hidden_size, num_heads = ARCHITECTURES[architecture]
    config = GPTNeoConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=hidden_size,
        num_layers=num_layers,
        num_heads=num_heads,
        attention_types=[[["global", "local"], num_layers // 2]],
    )
    register_attention()
    implementation = ATTENTION_NAME if side == "ours" else "eager"
    return GPTNeoForCausalLM._from_config(config, attn_implementation=implementation, dtype=dtype)


def report(args: argparse.Namespace, runs: dict[str, list[dict]]) -> None:
    """Prints a table of medians and one JSON line."""
    sides = {
        side: {name: statistics.median(run[name] for run in figures) for name in figures[0]}
        for side, figures in runs.items()
    }
    ratios = [o["real_tokens_per_second"] / a["real_tokens_per_second"] for a, o in zip(*runs.values(), strict=True)]
    print(f"\n{'':28}{'article':>12}{'ours':>12}")
    for name in sides["ours"]:
        print(f"{name:28}{sides['article'][name]:>12,.2f}{sides['ours'][name]:>12,.2f}")
    print(
        f"{'ratio of real tokens/s':28}{'':12}{statistics.median(ratios):>12.2f}  ({min(ratios):.2f}-{max(ratios):.2f})"
    )
    line = {
        "benchmark": "train",
        "command": " ".join(["python", "benchmarks/train.py", *sys.argv[1:]]),
        "hardware": hardware(),
        "versions": {name: version(name) for name in ("torch", "transformers", "deepspeed", "accelerate")},
        "ratio": statistics.median(ratios),
        **sides,
    }
    print(json.dumps(line))
    if args.output:
        with open(args.output, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def hardware() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{len(os.sched_getaffinity(0))} CPU cores, {platform.machine()}"


if __name__ == "__main__":
    main()
