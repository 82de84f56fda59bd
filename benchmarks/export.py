"""Sampling with this project and with CTranslate2 from `python -m neoflix.export`: same weights, same CPU cores.

    python benchmarks/export.py                        # GPT-Neo-125M's shape with random weights
    python benchmarks/export.py --architecture small

CTranslate2 (`pip install -r requirements-dev.txt`) runs the export in fp32 and int8; this project runs the GPT-Neo
that was exported, in fp32 and with `--int8`. The sides take turns, so that other work on the machine affects all; on a
busy machine only the ratios count. A turn goes from the prompt (a start token) to decoded texts, greedy (top_k 1) or
sampled (temperature 0.8, top_p 0.95, as `python generate.py`). No text ends early, and every turn's tokens are counted.
The last line is JSON; --output also appends it to a file.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import GPT2TokenizerFast

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import ctranslate2
from architectures import ARCHITECTURES, build_model, spread_logits
from ctranslate2_engine import CTranslate2Engine
from machine import write_line

from neoflix.arguments.sampling import SAMPLING_DEFAULTS
from neoflix.export import export_gpt2
from neoflix.model.vocabulary import set_token_ids
from neoflix.runtime.environment import tune_malloc
from neoflix.sampling.sampler import Sampler

WAYS = {"greedy": {"top_k": 1}, "sampled": {"temperature": 0.8, "top_k": 0, "top_p": 0.95}}
END = 0  # `<|endoftext|>`


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    tune_malloc()  # as generate.py does
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        write_run(args.architecture, Path(folder, "run"))
        export_gpt2(str(Path(folder, "run")), str(Path(folder, "gpt2")))
        ctranslate2.converters.TransformersConverter(str(Path(folder, "gpt2"))).convert(
            str(Path(folder, "ctranslate2"))
        )
        sides = build_sides(Path(folder), args, stack)
        batches = {}
        print(f"{'texts at a time':<18}{'way':<10}{'side':<20}{'tokens/s':>10}{'ratio':>8}", flush=True)
        for num_texts in args.batch_sizes:
            for way, settings in WAYS.items():
                seconds = take_turns(sides, num_texts, settings, args)
                batches[f"{num_texts} {way}"] = figures = summarise(seconds, num_texts * args.max_new_tokens)
                print_rows(num_texts, way, figures)
    figures = {"architecture": args.architecture, "max_new_tokens": args.max_new_tokens, "threads": args.threads}
    figures |= {"turns": args.turns, "ctranslate2": version("ctranslate2"), "batches": batches}
    write_line(figures, args.output)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architecture", choices=ARCHITECTURES, default="125M")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 20], help="texts written at a time")
    parser.add_argument("--max_new_tokens", type=int, default=64, help="each text's length")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU cores of each side")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--output", help="JSON lines file to append to")
    return parser.parse_args()


def write_run(architecture: str, folder: Path) -> None:
    """A model as a run saves it, with a tokenizer of as many tokens as the model has rows."""
    torch.manual_seed(0)
    model = build_model(architecture, torch.float32, "cpu", "ours")
    spread_logits(model)
    # The end token's logit becomes -100, far below all others: no side ever draws it.
    with torch.no_grad():
        model.transformer.ln_f.weight[0] = 0.0
        model.transformer.ln_f.bias[0] = 10.0
        model.transformer.wte.weight[END] = 0.0
        model.transformer.wte.weight[END, 0] = -10.0
    rows = model.config.vocab_size
    with tempfile.TemporaryDirectory() as vocabulary:
        bpe = ByteLevelBPETokenizer()
        bpe.train_from_iterator(["a"], 260, show_progress=False, special_tokens=["<|endoftext|>"])
        bpe.save_model(vocabulary)
        tokenizer = GPT2TokenizerFast.from_pretrained(vocabulary)
    assert tokenizer.eos_token_id == END
    tokenizer.add_tokens([f"word{i}" for i in range(rows - len(tokenizer) - 2)])
    tokenizer.add_special_tokens({"bos_token": "<|startoftext|>", "pad_token": "<|pad|>"})
    set_token_ids(model, tokenizer, SAMPLING_DEFAULTS)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def build_sides(folder: Path, args: argparse.Namespace, stack: ExitStack) -> dict[str, Callable]:
    """Functions (number of texts, settings) that sample so many at once and return the number of tokens. The stack ends
    what they leave running."""
    sides = {}
    for name, int8 in (("ours", False), ("ours int8", True)):
        sampler = Sampler.load(folder / "run", device="cpu", int8=int8)
        sides[name] = partial(sample_with_ours, sampler, args.max_new_tokens)
    for compute_type in ("float32", "int8"):
        engine = CTranslate2Engine(folder / "gpt2", folder / "ctranslate2", compute_type, args.threads)
        stack.callback(engine.close)
        sides[f"ctranslate2 {compute_type}"] = partial(engine.write, args.max_new_tokens)
    return sides


def sample_with_ours(sampler: Sampler, num_tokens: int, num_texts: int, settings: dict) -> int:
    """Samples as `python generate.py` does."""
    settings = settings | {"max_new_tokens": num_tokens}
    samples = sampler.sample([""], num_samples=num_texts, seed=42, batch_size=num_texts, **settings)
    return sum(sample.num_tokens for sample in samples)


def take_turns(sides: dict[str, Callable], num_texts: int, settings: dict, args: argparse.Namespace) -> dict:
    """{side: seconds of each turn}, after one turn of warm-up."""
    seconds = {name: [] for name in sides}
    for _ in range(args.turns + 1):
        for name, sample in sides.items():
            began = time.perf_counter()
            written = sample(num_texts, settings)
            seconds[name].append(time.perf_counter() - began)
            if written != num_texts * args.max_new_tokens:
                sys.exit(f"error: {name} wrote {written:,} tokens, not {num_texts} times {args.max_new_tokens}")
    return {name: timed[1:] for name, timed in seconds.items()}


def summarise(seconds: dict[str, list[float]], num_tokens: int) -> dict:
    """Medians over the turns; `ratio` is the speed relative to ours, turn by turn."""
    figures = {}
    for name, timed in seconds.items():
        ratios = [ours / theirs for ours, theirs in zip(seconds["ours"], timed, strict=True)]
        figures[name] = {
            "tokens_per_second": num_tokens / statistics.median(timed),
            "ratio": statistics.median(ratios),
            "ratio_min": min(ratios),
            "ratio_max": max(ratios),
        }
    return figures


def print_rows(num_texts: int, way: str, figures: dict) -> None:
    for name, side in figures.items():
        row = f"{num_texts:<18}{way:<10}{name:<20}{side['tokens_per_second']:>10,.1f}{side['ratio']:>8.2f}"
        print(row + f"  ({side['ratio_min']:.2f}-{side['ratio_max']:.2f})", flush=True)


if __name__ == "__main__":
    main()
