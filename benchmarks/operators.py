"""Ways to compute the loss and the attention: milliseconds and memory, forward and backward.

    python benchmarks/operators.py                           # on a CPU: few tokens, narrow; on a GPU: 2.7B's shapes
    python benchmarks/operators.py --num_texts 256

Ways that the machine or the installed torch does not have are skipped and named. Each way's gradients are compared
with the first's before it is timed. The last line is JSON; --output also appends it to a file.
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
from torch import nn
from torch.nn.functional import linear, pad, scaled_dot_product_attention
from transformers.loss.loss_utils import ForCausalLMLoss

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from architectures import VOCAB_SIZE, draw_texts
from machine import now, write_line

from neoflix.data.packing import lay_out_texts
from neoflix.model import packed_attention
from neoflix.model.loss import causal_lm_loss

WINDOW = 256
ROUNDS = 10


def main() -> None:
    args = parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    args.dtype = torch.bfloat16 if device == "cuda" else torch.float32
    lengths = [len(text) for text in draw_texts(args.num_texts)]
    torch.manual_seed(0)
    figures = {
        "num_texts": args.num_texts,
        "num_tokens": sum(lengths),
        "width": args.width,
        "dtype": str(args.dtype).removeprefix("torch."),
    }
    with torch.device(device):
        figures["loss"] = compare("loss", losses(sum(lengths), args), device)
        figures["attention"] = compare("attention", attentions(lengths, args), device)
    write_line(figures, args.output)


def parse_args() -> argparse.Namespace:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_texts", type=int, default=128 if on_gpu else 15)
    parser.add_argument("--width", type=int, default=2560 if on_gpu else 256)
    parser.add_argument("--num_heads", type=int, default=20 if on_gpu else 4)
    parser.add_argument("--output", help="JSON lines file to append to")
    return parser.parse_args()


# ---- the ways -------------------------------------------------------------------------------------------


def losses(num_tokens: int, args: argparse.Namespace) -> dict[str, Callable]:
    """Functions without arguments that return the gradients of the hidden states and of the head."""
    hidden = torch.randn(1, num_tokens, args.width, dtype=args.dtype).requires_grad_()
    head = (torch.randn(VOCAB_SIZE, args.width, dtype=args.dtype) * 0.02).requires_grad_()
    labels = torch.randint(VOCAB_SIZE, (1, num_tokens))
    labels[0, ::32] = -100
    targets = pad(labels[0, 1:], (0, 1), value=-100)

    def on_logits(function: Callable) -> Callable:
        return lambda: gradients(function(linear(hidden, head), labels), hidden, head)

    def deepspeeds(logits, labels):
        from deepspeed.runtime.chunked_cross_entropy import chunked_cross_entropy

        return chunked_cross_entropy(logits[0], targets)

    ways = {
        "transformers": on_logits(lambda logits, labels: ForCausalLMLoss(logits, labels, VOCAB_SIZE)),
        "ours": on_logits(causal_lm_loss),
        "deepspeed": on_logits(deepspeeds),
    }
    if hasattr(nn.functional, "linear_cross_entropy"):  # torch 2.13
        ways["torch, fused with the head"] = lambda: gradients(
            nn.functional.linear_cross_entropy(hidden[0], head, targets, ignore_index=-100), hidden, head
        )
    return ways


def attentions(lengths: list[int], args: argparse.Namespace) -> dict[str, Callable]:
    """Functions without arguments that return the gradients of a local layer's query, key and value [T, H, D]."""
    shape = (sum(lengths), args.num_heads, args.width // args.num_heads)
    query, key, value = (torch.randn(*shape, dtype=args.dtype).requires_grad_() for _ in range(3))
    layout = lay_out_texts(lengths)
    text_T = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    place_T = torch.arange(len(text_T))
    distance_TT = place_T.unsqueeze(1) - place_T
    mask_TT = (text_T.unsqueeze(1) == text_T) & (distance_TT >= 0) & (distance_TT < WINDOW)

    def dense(mask):
        q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (query, key, value))
        return scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=1.0)[0].transpose(0, 1)

    def eager():
        scores = torch.einsum("qhd,khd->hqk", query.float(), key.float()).masked_fill(~mask_TT, -torch.inf)
        return torch.einsum("hqk,khd->qhd", scores.softmax(-1).to(value.dtype), value)

    def ours(with_varlen: bool):
        with mock.patch.object(packed_attention, "takes_varlen", return_value=with_varlen):
            return packed_attention.attend_by_text(query, key, value, layout, 1.0, 0.0, WINDOW)

    functions = {
        "one row, dense mask": lambda: dense(mask_TT),
        "eager": eager,
        "ours, texts by length": lambda: ours(with_varlen=False),
    }
    if query.is_cuda:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        blocks = create_block_mask(lambda b, h, q, k: mask_TT[q, k], None, None, len(query), len(query))
        compiled = torch.compile(flex_attention)

        def flex():
            q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (query, key, value))
            return compiled(q, k, v, block_mask=blocks, scale=1.0)[0].transpose(0, 1)

        functions["flex, compiled"] = flex
    if packed_attention.takes_varlen(query):
        functions["ours, variable-length kernel"] = lambda: ours(with_varlen=True)
    weight = torch.randn(*shape, dtype=args.dtype)  # so that no gradient is the same for all tokens
    return {
        name: lambda function=function: gradients((function() * weight).sum(), query, key, value)
        for name, function in functions.items()
    }


def gradients(loss: torch.Tensor, *leaves: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return torch.autograd.grad(loss, leaves)


# ---- the clock ------------------------------------------------------------------------------------------


def compare(title: str, ways: dict[str, Callable], device: str) -> dict[str, dict[str, float]]:
    """Median milliseconds of each function and, on a GPU, MiB allocated on top; in turn."""
    expected = next(iter(ways.values()))()
    milliseconds, memory = {name: [] for name in ways}, {}
    for name, way in ways.items():
        for mine, theirs in zip(way(), expected, strict=True):
            difference = (mine.float() - theirs.float()).norm() / theirs.float().norm()
            if not difference < (1e-4 if mine.dtype == torch.float32 else 2e-2):
                sys.exit(f"error: {title}, {name}: gradients differ by {difference:.1e} of their size")
    for _ in range(ROUNDS):
        for name, way in ways.items():
            if device == "cuda":
                before = torch.cuda.memory_allocated()
                torch.cuda.reset_peak_memory_stats()
            began = now()
            way()
            milliseconds[name].append((now() - began) * 1e3)
            if device == "cuda":
                memory[name] = (torch.cuda.max_memory_allocated() - before) / 2**20
    figures = {}
    print(f"{title:32}{'ms':>10}" + f"{'MiB':>10}" * bool(memory))
    for name, timed in milliseconds.items():
        figures[name] = {"milliseconds": statistics.median(timed)}
        row = f"{name:32}{figures[name]['milliseconds']:>10.2f}"
        if name in memory:
            figures[name]["mib"] = memory[name]
            row += f"{memory[name]:>10,.0f}"
        print(row)
    print()
    return figures


if __name__ == "__main__":
    main()
