"""Sampling with transformers' eager `generate`, with this project and with others, in turn: same weights, same device.

    python benchmarks/generate.py                        # a small GPT-Neo with the real vocabulary's size
    python benchmarks/generate.py --architecture 2.7B    # random weights
    python benchmarks/generate.py --sides transformers ours generate_batch
    VLLM_PYTHON=vllm/bin/python python benchmarks/generate.py --sides ours vllm
    python benchmarks/generate.py --sides ours --batch_sizes 1 8 20 32 64 128
    python benchmarks/generate.py --mixed_texts 1000     # also: refilled slots against batches that wait

`generate_batch` is transformers' continuous batching with this project's attention. `vllm` is vLLM on the GPT-2 export,
in a Python of its own (docs/export.md). On a GPU every side computes in bf16, on a CPU in fp32.

The sides take turns, so that other work on the machine affects all of them. A turn goes from the prompt (a start token)
to decoded texts, with the sampling settings of `python generate.py`. No text ends early, and every turn's tokens are
counted. A side's ratio is how many times as fast ours is. The last line is JSON; --output also appends it to a file.

A step for one token must read every weight and the keys and values so far. The time this takes at the bandwidth of a
plain copy, divided by the step's time, is the share of the memory limit. A cache that holds the model (a server CPU's
may hold the small one) can raise it above 100%, and so can int8, as weights are counted in the model's dtype.
"""

import argparse
import os
import random
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from operator import truediv
from pathlib import Path

import torch
from transformers import GPTNeoForCausalLM

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from architectures import ARCHITECTURES, build_model, spread_logits
from generate_sides import SIDES, build_sides, build_tokenizer, check_vllm_python
from machine import cap_device_memory, copy_bytes_per_second, write_line

from neoflix.arguments.sampling import SAMPLING_DEFAULTS
from neoflix.runtime.environment import tune_malloc
from neoflix.sampling.decoder import Text
from neoflix.sampling.inference import optimize_for_inference
from neoflix.sampling.sampler import Sampler
from neoflix.sampling.slots import FEWEST


def main() -> None:
    args = parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    cap_device_memory(args.device_memory_gib)
    tune_malloc()  # as generate.py does; it is good for all sides
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    bandwidth = copy_bytes_per_second(device)
    torch.manual_seed(0)
    model = build_model(args.architecture, dtype, device, "ours")
    spread_logits(model)
    sampler = Sampler(model, build_tokenizer(model.config.vocab_size))
    num_parameters, read_bytes = model.num_parameters(), weight_bytes(model)
    with ExitStack() as stack:
        sides = build_sides(sampler, args, stack)
        optimize_for_inference(model, min(max(args.batch_sizes), FEWEST))  # as Sampler.load does
        batches = measure(sides, args, lambda *step: (read_bytes + cache_bytes(model, *step)) / bandwidth)
    mixed = compare_refilling(sampler, args) if args.mixed_texts else {}
    figures = {
        "architecture": args.architecture,
        "parameters": num_parameters,
        "dtype": str(dtype).removeprefix("torch."),
        "cpu_threads": torch.get_num_threads(),
        "max_new_tokens": args.max_new_tokens,
        "turns": args.turns,
        "sides": args.sides,
        **({"vllm": sides["vllm"].version} if "vllm" in sides else {}),
        "copy_gb_per_second": bandwidth / 1e9,
        "batch_sizes": batches,
        **mixed,
    }
    print()
    write_line(figures, args.output)


def measure(sides: dict[str, Callable], args: argparse.Namespace, find_limit: Callable) -> dict[int, dict]:
    """{texts at a time: figures}, printed as they come.

    Args:
        find_limit: (texts at a time, tokens of a text) -> the minimum number of seconds of a step for one token.
    """
    batches = {}
    print(f"{'texts at a time':<18}{'side':<16}{'tokens/s':>10}{'ms a step':>12}{'of the limit':>14}{'ours/it':>9}")
    for batch_size in args.batch_sizes:
        seconds = take_turns(sides, batch_size, args.max_new_tokens, args.turns)
        limit = find_limit(batch_size, args.max_new_tokens)
        batches[batch_size] = summarise(seconds, batch_size, args.max_new_tokens, limit)
        print_rows(batch_size, args.sides, batches[batch_size])
    return batches


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architecture", choices=ARCHITECTURES, default="small")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 20], help="texts written at a time")
    parser.add_argument("--sides", choices=SIDES, nargs="+", default=["transformers", "ours"])
    parser.add_argument("--vllm_python", default=os.environ.get("VLLM_PYTHON"), help="by default VLLM_PYTHON")
    parser.add_argument("--max_new_tokens", type=int, default=64, help="each text's length")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--mixed_texts", type=int, default=0, help="how many texts of 8 to 96 tokens; 0: none")
    parser.add_argument("--device_memory_gib", type=float, help="a share of the GPU's memory")
    parser.add_argument("--output", help="JSON lines file to append to")
    args = parser.parse_args()
    if "vllm" in args.sides:
        check_vllm_python(args.vllm_python)
    return args


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
    """Texts of 8 to 96 tokens (uniform): 20 slots that are refilled, and as many as `--batch_size auto` takes, against
    the same decoder with fixed batches of 20, which compute all 20 until the longest ends."""
    rng = random.Random(0)
    limits = [rng.randint(8, 96) for _ in range(args.mixed_texts)]
    ways = {
        "refilled": partial(grow, batch_size=20),
        "auto": partial(grow, batch_size=None),
        "batches": grow_in_batches,
    }
    seconds = {name: [] for name in ways}
    for _ in range(args.turns):
        for name, write in ways.items():
            start = time.perf_counter()
            write(sampler, limits)
            seconds[name].append(time.perf_counter() - start)
    speeds = {name: sum(limits) / statistics.median(timed) for name, timed in seconds.items()}
    ratios = {name: statistics.median(map(truediv, seconds["batches"], timed)) for name, timed in seconds.items()}
    print(f"\n{len(limits)} texts of 8 to 96 tokens:", end=" ")
    print(", ".join(f"{name} {speed:,.1f} tokens/s ({ratios[name]:.2f})" for name, speed in speeds.items()), flush=True)
    return {"mixed_texts": len(limits), "mixed_tokens_per_second": speeds, "mixed_ratios": ratios}


def grow_in_batches(sampler: Sampler, limits: list[int]) -> None:
    for first in range(0, len(limits), 20):
        grow(sampler, limits[first : first + 20], batch_size=20, keeps_slots=True)


def grow(sampler: Sampler, limits: list[int], batch_size: int | None, keeps_slots: bool = False) -> None:
    texts = [Text(i, [sampler.tokenizer.bos_token_id], limit) for i, limit in enumerate(limits)]
    decoder = sampler._decoder(texts, seed=0, batch_size=batch_size, settings=SAMPLING_DEFAULTS)
    if keeps_slots:  # those of texts that have ended
        decoder._leave = lambda free: None
    for _ in decoder.grow(texts):
        pass
    if [len(text.new_ids) for text in texts] != limits:
        sys.exit("error: a text has not the length that it was to have")


def weight_bytes(model: GPTNeoForCausalLM) -> int:
    """Bytes of the weights that a step for one token must read, before the model is optimized: then some are packed.

    Token embeddings are also the head, and so are read whole; of the position embeddings a step reads one row.
    """
    unread = model.transformer.wpe.weight.nbytes
    return sum(weight.nbytes for weight in model.parameters()) - unread


def cache_bytes(model: GPTNeoForCausalLM, batch_size: int, num_tokens: int) -> float:
    """Bytes of keys and values that a step for one token must read, on average over a text."""
    config = model.config
    return batch_size * 2 * config.num_layers * config.hidden_size * model.dtype.itemsize * (1 + num_tokens) / 2


def summarise(seconds: dict[str, list[float]], batch_size: int, num_tokens: int, limit: float) -> dict:
    """Medians over the turns; `limit` is the minimum number of seconds of a step for one token.

    The ratio to transformers is also the first of the figures.
    """
    figures = {}
    for name, timed in seconds.items():
        step = statistics.median(timed) / num_tokens
        figures[name] = {
            "tokens_per_second": batch_size / step,
            "milliseconds_per_step": step * 1e3,
            "share_of_bandwidth_limit": limit / step,
        }
    ratios = {name: compare(timed, seconds["ours"]) for name, timed in seconds.items() if "ours" in seconds}
    for name in ratios.keys() - {"ours"}:
        figures[name] |= ratios[name]
    return ratios.get("transformers", {}) | figures


def compare(theirs: list[float], ours: list[float]) -> dict[str, float]:
    """How many times as fast ours is, turn by turn."""
    ratios = [their / our for their, our in zip(theirs, ours, strict=True)]
    return {"ratio": statistics.median(ratios), "ratio_min": min(ratios), "ratio_max": max(ratios)}


def print_rows(batch_size: int, names: list[str], figures: dict) -> None:
    for name in names:
        side = figures[name]
        row = f"{batch_size:<18}{name:<16}{side['tokens_per_second']:>10,.1f}{side['milliseconds_per_step']:>12.2f}"
        row += f"{side['share_of_bandwidth_limit']:>14.1%}"
        if "ratio" in side:
            row += f"{side['ratio']:>9.2f}  ({side['ratio_min']:.2f}-{side['ratio_max']:.2f})"
        print(row, flush=True)


if __name__ == "__main__":
    main()
