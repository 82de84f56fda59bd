"""How well optimizers with few bytes per parameter learn, beside AdamW with fp32 weights and states.

    python benchmarks/optimizers.py --model RUN --dataset netflix_titles.csv            # fine-tunes a run's model
    python benchmarks/optimizers.py --model 40M --learning_rate 5e-4 --dataset ...      # from scratch

Each side starts from the same weights and sees the same batches: a cosine schedule with a warm-up, gradients clipped
at 1. The model computes in fp32, with weights that are rounded to bf16 for every side but the first, and their
gradients are rounded to bf16. Sides: `fp32`, `compact` (CompactAdamW), `bf16` (plain AdamW on bf16 weights), and
`torchao` (AdamW8bit with stochastic rounding; `pip install torchao`). The last line is JSON; --output also appends it
to a file.
"""

import argparse
import copy
import importlib.util
import math
import sys
from pathlib import Path

import torch
from transformers import GPTNeoConfig

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from machine import now, write_line

from neoflix.data.packing import PackedCollator, PaddedCollator
from neoflix.data.sources import read_examples
from neoflix.data.tokenizer import load_tokenizer
from neoflix.model.load import build_model, load_pretrained
from neoflix.model.vocabulary import keeps_texts_apart
from neoflix.training import compact_adamw
from neoflix.training.compact_adamw import CompactAdamW

ADAM = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}


def main() -> None:
    args = parse_args()
    torch.manual_seed(args.seed)
    tokenizer = load_tokenizer(args.tokenizer or args.model)
    if args.model == "40M":
        shape = {"num_layers": 4, "hidden_size": 512, "num_heads": 8, "attention_types": [[["global", "local"], 2]]}
        model = build_model(GPTNeoConfig(vocab_size=50304, max_position_embeddings=512, **shape), torch.float32)
    else:
        model = load_pretrained(args.model, torch.float32)
    texts = [example.whole for example in read_examples(Path(args.dataset))]
    ids = [[tokenizer.bos_token_id, *tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in texts]
    batches = make_batches(model, tokenizer, ids, args)
    figures = {"model": args.model, "learning_rate": args.learning_rate, "steps": args.steps, "texts": args.texts}
    print(f"{'side':10}" + "".join(f"{f'step {step}':>12}" for step in args.evaluate) + f"{'s a step':>10}")
    for side in args.sides:
        if side == "torchao" and not importlib.util.find_spec("torchao"):
            print("torchao: skipped, not installed")
            continue
        figures[side] = train(copy.deepcopy(model), side, *batches, args)
    write_line(figures, args.output)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a model, or 40M: a new GPT-Neo")
    parser.add_argument("--tokenizer", help="folder of a tokenizer, for a new model")
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--learning_rate", type=float, default=5e-5)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--texts", type=int, default=16, help="texts of a step")
    parser.add_argument("--held_out", type=int, default=200, help="texts that are held out")
    parser.add_argument("--sides", nargs="+", default=["fp32", "compact", "torchao", "bf16"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", help="JSON lines file to append to")
    args = parser.parse_args()
    args.evaluate = [0, args.steps // 2, args.steps]
    return args


def make_batches(model, tokenizer, ids: list[list[int]], args) -> tuple[list[dict], list[dict]]:
    """(batches to train on, held-out batches), chosen by the seed."""
    collate = PackedCollator() if keeps_texts_apart(model) else PaddedCollator(tokenizer.pad_token_id)
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(args.seed)).tolist()
    rows = [{"input_ids": ids[index], "prompt_length": 1} for index in order]
    held_out, rows = rows[: args.held_out], rows[args.held_out :]
    training = [
        collate([rows[(step * args.texts + n) % len(rows)] for n in range(args.texts)]) for step in range(args.steps)
    ]
    return training, [collate(held_out[start : start + 16]) for start in range(0, len(held_out), 16)]


def train(model, side: str, training: list[dict], held_out: list[dict], args) -> dict:
    weights = list(model.parameters())
    trained = weights if side == "fp32" else [torch.nn.Parameter(w.detach().bfloat16()) for w in weights]
    optimizer = make_optimizer(side, trained, args)
    perplexities, seconds = [], 0.0
    for step in range(args.steps + 1):
        if side != "fp32":
            torch._foreach_copy_([w.data for w in weights], [p.data for p in trained])
        if step in args.evaluate:
            perplexities.append(perplexity(model, held_out))
        if step == args.steps:
            break
        model.zero_grad()
        model(**training[step]).loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        for parameter, weight in zip(trained, weights, strict=True):
            parameter.grad = weight.grad.to(parameter.dtype)
        set_rate(optimizer, step, args)
        began = now()
        optimizer.step()
        seconds += now() - began
    print(
        f"{side:10}" + "".join(f"{value:12.2f}" for value in perplexities) + f"{seconds / args.steps:10.3f}", flush=True
    )
    return {"perplexity": perplexities, "optimizer_seconds_per_step": seconds / args.steps}


def make_optimizer(side: str, parameters: list, args) -> torch.optim.Optimizer:
    match side:
        case "compact":
            compact_adamw.update = compact_adamw.compiled_update()  # plain torch would take seconds
            compact_adamw.CHUNK["cpu"] = 2**30
            return CompactAdamW(parameters, lr=args.learning_rate, **ADAM)
        case "torchao":
            from torchao.optim import AdamW8bit

            return AdamW8bit(parameters, lr=args.learning_rate, bf16_stochastic_round=True, **ADAM)
        case _:
            return torch.optim.AdamW(parameters, lr=args.learning_rate, **ADAM)


def set_rate(optimizer, step: int, args) -> None:
    warm_up = max(1, args.steps // 20)
    factor = min(1.0, (step + 1) / warm_up) * 0.5 * (1 + math.cos(math.pi * step / args.steps))
    for group in optimizer.param_groups:
        if isinstance(group["lr"], torch.Tensor):  # torchao's
            group["lr"].fill_(args.learning_rate * factor)
        else:
            group["lr"] = args.learning_rate * factor


@torch.no_grad()
def perplexity(model, batches: list[dict]) -> float:
    """Per real token, over all batches."""
    model.eval()
    total = count = 0
    for batch in batches:
        labels = int((batch["labels"][:, 1:] != -100).sum())
        total, count = total + model(**batch).loss.item() * labels, count + labels
    model.train()
    return math.exp(total / count)


if __name__ == "__main__":
    main()
