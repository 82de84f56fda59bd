"""A step of another architecture: its texts packed with this project's loss, or padded with transformers' loss.

    python benchmarks/packed.py --dataset netflix_titles.csv                # SmolLM2-135M
    python benchmarks/packed.py --dataset netflix_titles.csv --model FOLDER --texts 64

Forward and backward pass of the same texts, for all weights and for LoRA, on a CPU or GPU in the dtype given. The sides
take turns. The ratio is that of the process's CPU seconds on a CPU, which do not count other programs, and that of the
time on a GPU. The last line is JSON; --output also appends it to a file.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch
from transformers.loss.loss_utils import ForCausalLMLoss

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from held_out import encode
from machine import write_line

from neoflix.data.packing import PackedCollator, PaddedCollator
from neoflix.data.sources import read_examples
from neoflix.data.tokenizer import load_tokenizer
from neoflix.model.load import load_model
from neoflix.model.lora import has_adapters
from neoflix.model.packaged import find_packaged
from neoflix.model.vocabulary import keeps_texts_apart
from neoflix.runtime.environment import tune_malloc

WAYS = {"all weights": None, "LoRA": {"rank": 8, "alpha": 16.0}}


def main() -> None:
    args = parse_args()
    tune_malloc()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    folder = find_packaged(args.model)
    tokenizer = load_tokenizer(folder)
    figures = {"model": Path(folder).name, "texts": args.texts, "turns": args.turns}
    for way, lora in WAYS.items():
        model = load_model(folder, tokenizer, getattr(torch, args.dtype), {}, lora=lora).to(device).train()
        if not keeps_texts_apart(model):
            sys.exit(f"error: {args.model}: a {model.config.model_type} model cannot be packed")
        figures[way] = row = compare(model, make_batches(tokenizer, args, device), args.turns)
        print(f"{way:<12}" + "".join(f"  {name} {value:.4g}" for name, value in row.items()), flush=True)
    write_line(figures, args.output)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="smollm2, or a model's folder")
    parser.add_argument("--dataset", required=True, help="CSV file of the texts")
    parser.add_argument("--texts", type=int, default=32, help="texts of a step")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--output", help="JSON lines file to append to")
    return parser.parse_args()


def make_batches(tokenizer, args: argparse.Namespace, device: str) -> dict[str, dict]:
    """The same texts as one packed row, and padded to the longest."""
    texts = [example.whole for example in read_examples(Path(args.dataset))[: args.texts]]
    rows = [{"input_ids": encode(text, tokenizer), "prompt_length": 1} for text in texts]
    batches = {"padded": PaddedCollator(tokenizer.pad_token_id)(rows), "packed": PackedCollator()(rows)}
    return {
        side: {name: x.to(device) if torch.is_tensor(x) else x for name, x in batch.items()}
        for side, batch in batches.items()
    }


def compare(model, batches: dict[str, dict], turns: int) -> dict:
    """Medians over the turns, after one turn of warm-up."""
    inner = model.get_base_model() if has_adapters(model) else model
    losses = {"padded": ForCausalLMLoss, "packed": inner.loss_function}
    seconds = {side: [] for side in batches}
    for _ in range(turns + 1):
        for side, batch in batches.items():
            inner.loss_function = losses[side]
            seconds[side].append(time_step(model, batch))
    ratios = [padded / packed for padded, packed in zip(seconds["padded"][1:], seconds["packed"][1:], strict=True)]
    figures = {f"{side}_seconds": statistics.median(timed[1:]) for side, timed in seconds.items()}
    return figures | {"ratio": statistics.median(ratios), "ratio_min": min(ratios), "ratio_max": max(ratios)}


def time_step(model, batch: dict) -> float:
    is_gpu = model.device.type == "cuda"
    clock = time.perf_counter if is_gpu else time.process_time
    model.zero_grad()
    began = clock()
    model(**batch).loss.backward()
    if is_gpu:
        torch.cuda.synchronize()
    return clock() - began


if __name__ == "__main__":
    main()
