"""Sampling with transformers' eager `generate` and with this project, in turn: same weights, same device.

    python benchmarks/generate.py                        # a small GPT-Neo with the real vocabulary's size
    python benchmarks/generate.py --architecture 2.7B    # random weights
    python benchmarks/generate.py --mixed_texts 1000     # also: refilled slots against batches that wait

The two take turns, so that other work on the machine affects both. A turn goes from the prompt (a start token) to
decoded texts, with the sampling settings of `python generate.py`. No text ends early, and every turn's tokens are
counted. The last line is JSON; --output also appends it to a file.

A step for one token must read every weight and the keys and values so far. The time this takes at the bandwidth of a
plain copy, divided by the step's time, is the share of the memory limit. A cache that holds the model (a server CPU's
may hold the small one) can raise it above 100%.
"""

import argparse
import random
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import GenerationConfig, GPTNeoForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from architectures import ARCHITECTURES, build_model, spread_logits
from machine import cap_device_memory, copy_bytes_per_second, write_line

from neoflix.arguments.sampling import SAMPLING_DEFAULTS
from neoflix.runtime.environment import tune_malloc
from neoflix.sampling.decoder import Text
from neoflix.sampling.inference import optimize_for_inference
from neoflix.sampling.sampler import Sampler

TOKENIZER_SIZE = 50_259  # GPT-Neo's tokens and two more special ones; the 45 rows beyond are padding


def main() -> None:
    args = parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    cap_device_memory(args.device_memory_gib)
    tune_malloc()  # as generate.py does; it is good for both sides
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    bandwidth = copy_bytes_per_second(device)
    torch.manual_seed(0)
    model = build_model(args.architecture, dtype, device, "ours")
    spread_logits(model)
    sampler = Sampler(model, build_tokenizer(model.config.vocab_size))
    sides = build_sides(sampler, args)
    optimize_for_inference(model, max(args.batch_sizes))  # as Sampler.load does

    batches = {}
    print_header()
    for batch_size in args.batch_sizes:
        seconds = take_turns(sides, batch_size, args.max_new_tokens, args.turns)
        limit = step_bytes(model, batch_size, args.max_new_tokens) / bandwidth
        batches[batch_size] = summarise(seconds, batch_size, args.max_new_tokens, limit)
        print_rows(batch_size, batches[batch_size])
    mixed = compare_refilling(sampler, args) if args.mixed_texts else {}
    figures = {
        "architecture": args.architecture,
        "parameters": model.num_parameters(),
        "dtype": str(dtype).removeprefix("torch."),
        "cpu_threads": torch.get_num_threads(),
        "max_new_tokens": args.max_new_tokens,
        "turns": args.turns,
        "copy_gb_per_second": bandwidth / 1e9,
        "batch_sizes": batches,
        **mixed,
    }
    print()
    write_line(figures, args.output)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architecture", choices=ARCHITECTURES, default="small")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 20], help="texts written at a time")
    parser.add_argument("--max_new_tokens", type=int, default=64, help="each text's length")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--mixed_texts", type=int, default=0, help="how many texts of 8 to 96 tokens; 0: none")
    parser.add_argument("--device_memory_gib", type=float, help="a share of the GPU's memory")
    parser.add_argument("--output", help="JSON lines file to append to")
    return parser.parse_args()


def build_sides(sampler: Sampler, args: argparse.Namespace) -> dict[str, Callable]:
    """Functions that sample so many texts at once and return the number of tokens."""
    model = sampler.model
    eager = build_model(args.architecture, model.dtype, model.device, "eager").eval()
    eager.load_state_dict(model.state_dict(), assign=True)  # the very same weights, in memory once
    settings = SAMPLING_DEFAULTS | {"max_new_tokens": args.max_new_tokens}
    return {
        "transformers": partial(sample_with_transformers, eager, sampler.tokenizer, settings),
        "ours": partial(sample_with_ours, sampler, settings),
    }


def build_tokenizer(vocab_size: int) -> PreTrainedTokenizerBase:
    """A tokenizer as large as the real one. The model has no row for the end token, so neither side can draw it, at no
    extra cost."""
    num_words = min(vocab_size, TOKENIZER_SIZE) - 3
    ids = {f"word{i}": i for i in range(num_words)} | {"bos": num_words, "pad": num_words + 1, "eos": vocab_size}
    words = Tokenizer(WordLevel(ids, unk_token="word0"))
    special = {"bos_token": "bos", "pad_token": "pad", "eos_token": "eos"}
    return PreTrainedTokenizerFast(tokenizer_object=words, padding_side="left", **special)


def sample_with_transformers(
    model: GPTNeoForCausalLM, tokenizer: PreTrainedTokenizerBase, settings: dict, num_texts: int
) -> int:
    """Samples with plain transformers: eager attention, a cache that grows."""
    prompt = torch.tensor([[tokenizer.bos_token_id]], device=model.device)
    output = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        generation_config=GenerationConfig(
            do_sample=True,
            num_return_sequences=num_texts,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            **settings,
        ),
    )
    tokenizer.batch_decode(output)
    return output[:, 1:].numel()


def sample_with_ours(sampler: Sampler, settings: dict, num_texts: int) -> int:
    """Samples as `python generate.py` does."""
    samples = sampler.sample(num_samples=num_texts, batch_size=num_texts, **settings)
    return sum(sample.num_tokens for sample in samples)


def take_turns(sides: dict[str, Callable], batch_size: int, num_tokens: int, turns: int) -> dict[str, list[float]]:
    """Seconds of each turn, after one turn of warm-up."""
    seconds = {name: [] for name in sides}
    for _ in range(turns + 1):
        for name, sample in sides.items():
            start = time.perf_counter()
            written = sample(batch_size)  # to the decoded text: nothing is left to be done on the device
            seconds[name].append(time.perf_counter() - start)
            if written != batch_size * num_tokens:
                sys.exit(f"error: {name} wrote {written:,} tokens, not {batch_size} times {num_tokens}")
    return {name: timed[1:] for name, timed in seconds.items()}


def compare_refilling(sampler: Sampler, args: argparse.Namespace) -> dict:
    """Texts of 8 to 96 tokens (uniform): 20 slots that are refilled, against the same decoder with batches of 20 that
    wait for their longest text."""
    rng = random.Random(0)
    limits = [rng.randint(8, 96) for _ in range(args.mixed_texts)]
    seconds = {"refilled": [], "batches": []}
    for _ in range(args.turns):
        for name, size in (("refilled", len(limits)), ("batches", 20)):
            start = time.perf_counter()
            for first in range(0, len(limits), size):
                grow(sampler, limits[first : first + size])
            seconds[name].append(time.perf_counter() - start)
    ratios = [theirs / ours for theirs, ours in zip(seconds["batches"], seconds["refilled"], strict=True)]
    figures = {name: sum(limits) / statistics.median(timed) for name, timed in seconds.items()}
    print(f"\n{len(limits)} texts of 8 to 96 tokens, 20 slots: {figures['refilled']:,.1f} tokens/s refilled,", end=" ")
    print(f"{figures['batches']:,.1f} in batches, ratio {statistics.median(ratios):.2f}", flush=True)
    return {"mixed_texts": len(limits), "mixed_tokens_per_second": figures, "mixed_ratio": statistics.median(ratios)}


def grow(sampler: Sampler, limits: list[int]) -> None:
    texts = [Text(i, [sampler.tokenizer.bos_token_id], limit) for i, limit in enumerate(limits)]
    for _ in sampler._decoder(texts, seed=0, batch_size=20, settings=SAMPLING_DEFAULTS).grow(texts):
        pass
    if [len(text.new_ids) for text in texts] != limits:
        sys.exit("error: a text has not the length that it was to have")


def step_bytes(model: GPTNeoForCausalLM, batch_size: int, num_tokens: int) -> float:
    """Bytes that a step for one token must read, on average over a text: weights and cache.

    Token embeddings are also the head, and so are read whole; of the position embeddings a step reads one row.
    """
    unread = model.transformer.wpe.weight.nbytes
    weights = sum(weight.nbytes for weight in model.parameters()) - unread
    config = model.config
    token_cache = 2 * config.num_layers * config.hidden_size * model.dtype.itemsize
    return weights + batch_size * token_cache * (1 + num_tokens) / 2


def summarise(seconds: dict[str, list[float]], batch_size: int, num_tokens: int, limit: float) -> dict:
    """Medians over the turns; `limit` is the minimum number of seconds of a step for one token."""
    ratios = [theirs / ours for theirs, ours in zip(seconds["transformers"], seconds["ours"], strict=True)]
    figures = {"ratio": statistics.median(ratios), "ratio_min": min(ratios), "ratio_max": max(ratios)}
    for name, timed in seconds.items():
        step = statistics.median(timed) / num_tokens
        figures[name] = {
            "tokens_per_second": batch_size / step,
            "milliseconds_per_step": step * 1e3,
            "share_of_bandwidth_limit": limit / step,
        }
    return figures


def print_header() -> None:
    print(f"{'texts at a time':<18}{'side':<14}{'tokens/s':>10}{'ms a step':>12}{'of the limit':>14}{'ratio':>8}")


def print_rows(batch_size: int, figures: dict) -> None:
    for name in ("transformers", "ours"):
        side = figures[name]
        row = f"{batch_size:<18}{name:<14}{side['tokens_per_second']:>10,.1f}{side['milliseconds_per_step']:>12.2f}"
        row += f"{side['share_of_bandwidth_limit']:>14.1%}"
        if name == "ours":
            row += f"{figures['ratio']:>8.2f}  ({figures['ratio_min']:.2f}-{figures['ratio_max']:.2f})"
        print(row, flush=True)


if __name__ == "__main__":
    main()
