"""Optimizers with few bytes per parameter, beside AdamW with fp32 weights and states.

    python benchmarks/optimizers.py learning --model RUN --dataset netflix_titles.csv     # fine-tunes a run's model
    python benchmarks/optimizers.py learning --model 40M --tokenizer FOLDER --learning_rate 5e-4 --dataset ...
    python benchmarks/optimizers.py moves --model RUN --steps 200 --learning_rate 1e-5 --dataset ...
    python benchmarks/optimizers.py seconds

`learning`: each side starts from the same bf16 weights and sees the same batches, with a cosine schedule and a warm-up,
and gradients clipped at 1. The model computes in fp32. For every side but `fp32` its weights and their gradients are
rounded to bf16 in each step. The figures are held-out perplexities.

`moves`: each side takes the gradients that the fp32 side has, rounded to bf16. The figures are the error of the total
move of the weights, as a share of the move: of all together, and the largest of one weight, as a share of the root
mean square of its tensor's moves. --outliers 50 makes every 64th column of the gradients 50 times larger.

`seconds`: a step of each optimizer with GPT-Neo-125M's weights, in turns, and the resident bytes per parameter of
CompactAdamW with its weights.

Sides: `fp32`; `compact` (CompactAdamW); `masters` (bf16 weights with fp32 master weights, as DeepSpeed's bf16 has
them); `stochastic` (bf16 weights with fp32 states, rounded stochastically); `torchao` (AdamW8bit with stochastic
rounding; `pip install torchao`); `bf16` (AdamW on bf16 weights). The last line is JSON; --output also appends it to a
file.
"""

import argparse
import copy
import importlib.util
import math
import statistics
import sys
from pathlib import Path

import psutil
import torch
from transformers import GPTNeoConfig

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from machine import now, write_line

from neoflix.data.packing import PackedCollator, PaddedCollator
from neoflix.data.sources import read_examples
from neoflix.data.tokenizer import load_tokenizer
from neoflix.model.load import build_model, load_model
from neoflix.model.vocabulary import keeps_texts_apart
from neoflix.training import compact_adamw
from neoflix.training.compact_adamw import CompactAdamW
from neoflix.training.compact_update import join_bits

SMALL = {"num_layers": 4, "hidden_size": 512, "num_heads": 8, "attention_types": [[["global", "local"], 2]]}
GPT_NEO_125M = {"num_layers": 12, "hidden_size": 768, "num_heads": 12, "attention_types": [[["global", "local"], 6]]}
PLAIN_UPDATE, PLAIN_CHUNK = compact_adamw.update, compact_adamw.CHUNK["cpu"]
ADAM = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}


def main() -> None:
    args = parse_args()
    torch.manual_seed(args.seed)
    figures = {"measure": args.measure}
    if args.measure == "seconds":
        figures |= seconds_per_step(args.turns)
    else:
        settings = ("model", "learning_rate", "steps", "texts", *(["outliers"] if args.measure == "moves" else []))
        figures |= {name: getattr(args, name) for name in settings}
        model, *batches = load(args)
        measure = learning if args.measure == "learning" else moves
        figures |= measure(model, *batches, args)
    write_line(figures, args.output)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("measure", choices=["learning", "moves", "seconds"])
    parser.add_argument("--model", help="folder of a model, or 40M: a new GPT-Neo")
    parser.add_argument("--tokenizer", help="folder of a tokenizer, for a new model")
    parser.add_argument("--dataset", help="CSV file of the texts")
    parser.add_argument("--learning_rate", type=float, default=5e-5)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--texts", type=int, default=16, help="texts of a step")
    parser.add_argument("--held_out", type=int, default=200, help="texts that are held out")
    parser.add_argument("--sides", nargs="+", default=["compact", "masters", "torchao", "bf16"], help="beside fp32")
    parser.add_argument("--outliers", type=float, default=1, help="factor of every 64th column of the gradients")
    parser.add_argument("--turns", type=int, default=5, help="steps of each optimizer, in turns")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", help="JSON lines file to append to")
    args = parser.parse_args()
    if args.measure != "seconds" and not (args.model and args.dataset):
        parser.error("--model and --dataset are required")
    if "torchao" in args.sides and not importlib.util.find_spec("torchao"):
        print("torchao: skipped, not installed")
        args.sides.remove("torchao")
    args.evaluate = [0, args.steps // 2, args.steps]
    return args


def load(args) -> tuple[torch.nn.Module, list[dict], list[dict]]:
    """(model in fp32 with weights that are bf16 values, batches to train on, held-out batches)"""
    tokenizer = load_tokenizer(args.tokenizer or args.model)
    if args.model == "40M":
        model = build_model(GPTNeoConfig(vocab_size=50304, max_position_embeddings=512, **SMALL), torch.float32)
    else:
        model = load_model(args.model, tokenizer, torch.float32, {})
    texts = [example.whole for example in read_examples(Path(args.dataset))]
    ids = [[tokenizer.bos_token_id, *tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in texts]
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().float()
    return model, *make_batches(model, tokenizer, ids, args)


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


def learning(model, training: list[dict], held_out: list[dict], args) -> dict:
    """{side: held-out perplexities}"""
    print(f"{'side':10}" + "".join(f"{f'step {step}':>12}" for step in args.evaluate))
    return {side: train(copy.deepcopy(model), side, training, held_out, args) for side in ("fp32", *args.sides)}


def train(model, side: str, training: list[dict], held_out: list[dict], args) -> list[float]:
    weights = list(model.parameters())
    trained = weights if side == "fp32" else in_bf16(weights)
    optimizer = make_optimizer(side, trained, args.learning_rate)
    perplexities = []
    for step in range(args.steps + 1):
        if side != "fp32":
            torch._foreach_copy_([w.data for w in weights], [p.data for p in trained])
        if step in args.evaluate:
            perplexities.append(perplexity(model, held_out))
        if step == args.steps:
            break
        compute_gradients(model, training[step])
        for parameter, weight in zip(trained, weights, strict=True):
            parameter.grad = weight.grad.to(parameter.dtype)
        set_rate(optimizer, step, args)
        optimizer.step()
    print(f"{side:10}" + "".join(f"{value:12.2f}" for value in perplexities), flush=True)
    return perplexities


def moves(model, training: list[dict], _held_out: list[dict], args) -> dict:
    """{side: errors of the total move}"""
    weights = list(model.parameters())
    sides = {side: in_bf16(weights) for side in ("fp32", *args.sides)}
    start = [parameter.detach().float() for parameter in sides["fp32"]]
    exact = sides["fp32"] = [torch.nn.Parameter(values.clone()) for values in start]
    optimizers = {side: make_optimizer(side, parameters, args.learning_rate) for side, parameters in sides.items()}
    for step in range(args.steps):
        torch._foreach_copy_([w.data for w in weights], [p.data for p in exact])
        compute_gradients(model, training[step])
        for weight in weights:
            if weight.dim() == 2:
                weight.grad[:, ::64] *= args.outliers
        for side, optimizer in optimizers.items():
            for parameter, weight in zip(sides[side], weights, strict=True):
                parameter.grad = weight.grad.bfloat16().to(parameter.dtype)
            set_rate(optimizer, step, args)
            optimizer.step()
    expected = [parameter.detach() - values for parameter, values in zip(exact, start, strict=True)]
    figures = {}
    for side in args.sides:
        found = [value - first for value, first in zip(values_of(optimizers[side], sides[side]), start, strict=True)]
        figures[side] = errors(found, expected)
        print(f"{side:10} all {figures[side]['all']:.4f}, one weight {figures[side]['one_weight']:.3f}", flush=True)
    return figures


def errors(found: list[torch.Tensor], expected: list[torch.Tensor]) -> dict[str, float]:
    wrong = [one - other for one, other in zip(found, expected, strict=True)]
    norm = torch.cat([difference.flatten() for difference in wrong]).norm()
    largest = [
        (difference.abs().max() / move.pow(2).mean().sqrt()).item()
        for difference, move in zip(wrong, expected, strict=True)
    ]
    return {"all": (norm / torch.cat([m.flatten() for m in expected]).norm()).item(), "one_weight": max(largest)}


def values_of(optimizer, parameters: list) -> list[torch.Tensor]:
    """The weights with all their bits."""
    if not isinstance(optimizer, CompactAdamW):
        return [parameter.detach().float() for parameter in parameters]
    low_bits = [optimizer.state[parameter]["low_bits"].view(parameter.shape) for parameter in parameters]
    return [join_bits(parameter.detach(), low) for parameter, low in zip(parameters, low_bits, strict=True)]


def seconds_per_step(turns: int) -> dict:
    """Medians of `turns` steps of each optimizer, and the resident bytes per parameter of CompactAdamW's weights and
    states."""
    with torch.device("meta"):
        shapes = [parameter.shape for parameter in build_model(GPTNeoConfig(**GPT_NEO_125M), None).parameters()]
    num_parameters = sum(shape.numel() for shape in shapes)
    before = psutil.Process().memory_info().rss
    optimizers = {"compact": make_optimizer("compact", some_weights(shapes, torch.bfloat16), 1e-5)}
    choose_update(is_compiled=False)  # the compiler would take memory too
    step_once(optimizers["compact"])
    num_bytes = (psutil.Process().memory_info().rss - before) / num_parameters
    for side in ("fp32", "deepspeed"):
        optimizers[side] = make_optimizer(side, some_weights(shapes, torch.float32), 1e-5)
        step_once(optimizers[side])
    choose_update(is_compiled=True)
    step_once(optimizers["compact"])  # compiles
    found = {side: [] for side in (*optimizers, "compact_plain")}
    for _ in range(turns):
        for side in found:
            choose_update(is_compiled=side == "compact")
            found[side].append(step_once(optimizers[side.removesuffix("_plain")]))
    medians = {side: statistics.median(seconds) for side, seconds in found.items()}
    for side, median in medians.items():
        print(f"{side:14} {median:.3f} s, {median / medians['fp32']:.2f} of torch's fused AdamW in fp32")
    print(f"CompactAdamW with its weights: {num_bytes:.2f} resident bytes per parameter")
    return {"parameters": num_parameters, "seconds": medians, "compact_bytes_per_parameter": num_bytes}


def some_weights(shapes: list[torch.Size], dtype: torch.dtype) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(torch.full(shape, 0.02, dtype=dtype)) for shape in shapes]


def step_once(optimizer) -> float:
    """Seconds of a step with new gradients, which are freed."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, 1e-4)
    began = now()
    optimizer.step()
    seconds = now() - began
    optimizer.zero_grad()
    return seconds


def in_bf16(weights: list) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(weight.detach().bfloat16()) for weight in weights]


def compute_gradients(model, batch: dict) -> None:
    """The gradients of a batch, clipped at 1."""
    model.zero_grad()
    model(**batch).loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)


class MasterAdamW(torch.optim.AdamW):
    """AdamW with fp32 states for bf16 weights. It keeps fp32 weights too, and rounds them to the nearest bf16 values;
    or it rounds up or down by chance, and keeps nothing else."""

    def __init__(self, parameters: list, is_stochastic: bool, **settings):
        self._rounded, self._is_stochastic = parameters, is_stochastic
        super().__init__([torch.nn.Parameter(parameter.detach().float()) for parameter in parameters], **settings)

    def step(self, closure=None):
        pairs = list(zip(self._rounded, self.param_groups[0]["params"], strict=True))
        for parameter, weight in pairs:
            weight.grad = parameter.grad.float()
        super().step()
        for parameter, weight in pairs:
            if self._is_stochastic:
                bits = weight.detach().view(torch.int32) + torch.randint(2**16, weight.shape, dtype=torch.int32)
                weight.data = (bits & ~0xFFFF).view(torch.float32)
            parameter.data.copy_(weight.detach())


def make_optimizer(side: str, parameters: list, learning_rate: float) -> torch.optim.Optimizer:
    settings = {"lr": learning_rate, **ADAM}
    match side:
        case "compact":
            choose_update(is_compiled=True)  # as on a GPU; plain torch takes longer
            return CompactAdamW(parameters, **settings)
        case "torchao":
            from torchao.optim import AdamW8bit

            return AdamW8bit(parameters, bf16_stochastic_round=True, **settings)
        case "deepspeed":
            from deepspeed.ops.adam import DeepSpeedCPUAdam

            return DeepSpeedCPUAdam(parameters, adamw_mode=True, **settings)
        case "masters" | "stochastic":
            return MasterAdamW(parameters, side == "stochastic", fused=True, **settings)
        case _:
            return torch.optim.AdamW(parameters, fused=side == "fp32", **settings)


def choose_update(is_compiled: bool) -> None:
    compact_adamw.update = compact_adamw.compiled_update() if is_compiled else PLAIN_UPDATE
    compact_adamw.CHUNK["cpu"] = 2**30 if is_compiled else PLAIN_CHUNK


def set_rate(optimizer, step: int, args) -> None:
    warm_up = max(1, args.steps // 10)
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
