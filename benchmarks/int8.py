"""What a run's model loses when `generate.py --int8` rounds it, and what CTranslate2's int8 loses.

    python benchmarks/int8.py results               # a finished run
    python benchmarks/int8.py results --texts 20

The run's held-out texts go through the model in fp32 and in int8; for GPT-Neo also through CTranslate2
(`pip install -r requirements-dev.txt`) on the export. "same" is the share of places where the same token is likeliest
as in fp32. Texts are cut at the export's length. The last line is JSON; --output also appends it to a file.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy
import torch
from transformers import AutoTokenizer

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import ctranslate2
from held_out import encode, log_probabilities, read_texts
from machine import write_line

from neoflix.export import export_gpt2
from neoflix.exporting.gguf_file import context_length_of
from neoflix.model.load import load_pretrained
from neoflix.sampling.inference import optimize_for_inference


def main() -> None:
    args = parse_args()
    model, rounded = (load_pretrained(args.run, torch.float32).eval() for _ in range(2))
    tokenizer = AutoTokenizer.from_pretrained(args.run)
    texts = [encode(text, tokenizer)[: context_length_of(model)] for text in read_texts(args.run, 0, args.texts)[1]]
    sides = {
        "fp32": lambda ids: log_probabilities(model, ids, len(tokenizer)),
        "int8": lambda ids: log_probabilities(rounded, ids, len(tokenizer)),
    }
    optimize_for_inference(rounded, 1, int8=True)
    with tempfile.TemporaryDirectory() as folder:
        if model.config.model_type == "gpt_neo":
            sides["ctranslate2 int8"] = load_ctranslate2(args.run, Path(folder), tokenizer)
        figures = {"run": Path(args.run).name, "model_type": model.config.model_type, **compare(sides, texts)}
    write_line(figures, args.output)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", metavar="RUN", help="a run's folder")
    parser.add_argument("--texts", type=int, help="held-out texts (default: all)")
    parser.add_argument("--output", help="JSON lines file to append to")
    return parser.parse_args()


def load_ctranslate2(run: str, folder: Path, tokenizer) -> Callable:
    """A function from token ids to log-probabilities [tokens after the first, vocabulary], in int8."""
    export_gpt2(run, str(folder / "gpt2"))
    ctranslate2.converters.TransformersConverter(str(folder / "gpt2")).convert(str(folder / "engine"))
    engine = ctranslate2.Generator(str(folder / "engine"), "cpu", compute_type="int8")

    def score(ids: list[int]) -> torch.Tensor:
        output = engine.forward_batch([tokenizer.convert_ids_to_tokens(ids)], return_log_probs=True)
        return torch.from_numpy(numpy.array(output))[0, :-1]

    return score


def compare(sides: dict[str, Callable], texts: list[list[int]]) -> dict:
    """Number of places, and each side's perplexity and share of places with fp32's likeliest token."""
    losses, hits = {name: [] for name in sides}, {name: [] for name in sides}
    for ids in texts:
        scores = {name: score(ids) for name, score in sides.items()}
        for name, side in scores.items():
            losses[name].append(-side[range(len(ids) - 1), ids[1:]])
            hits[name].append(side.argmax(-1) == scores["fp32"].argmax(-1))
    figures = {"places": sum(map(len, hits["fp32"]))}
    for name in sides:
        perplexity, same = torch.cat(losses[name]).mean().exp().item(), torch.cat(hits[name]).float().mean().item()
        print(f"{name:<18} perplexity {perplexity:,.2f}, same likeliest token {same:.2%}", flush=True)
        figures[name] = {"perplexity": perplexity, "same": same}
    return figures


if __name__ == "__main__":
    main()
