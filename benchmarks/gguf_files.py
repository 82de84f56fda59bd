"""What a run's model finds likely in llama.cpp, after `python -m neoflix.export --to gguf`.

    python benchmarks/gguf_files.py results                 # a finished run of GPT-Neo or Llama
    python benchmarks/gguf_files.py results --texts 20

The run's held-out texts go through this project's model in fp32 and, token by token, through llama.cpp (`xllamacpp`,
`pip install -r requirements-dev.txt`) on the exported file in each dtype: with keys and values in fp32, and once with
llama.cpp's defaults (fp16 and flash attention). "same" is the share of places where the same token is likeliest; "gap"
is by how much ours is likelier than llama.cpp's where it is not, at most (nats). "same_greedy" counts greedy texts of
24 tokens, after the first words of training texts. "control" is the probability of the beginning and padding tokens,
which are never drawn, at all places. Not for runs with a template. The last line is JSON; --output also appends it to
a file.
"""

import argparse
import math
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import torch
from transformers import AutoTokenizer

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from held_out import encode, log_probabilities, read_texts
from llama_engine import LlamaEngine
from machine import write_line

from neoflix.export import export_gguf
from neoflix.exporting.gguf_file import FILE_TYPES, context_length_of
from neoflix.exporting.gguf_vocabulary import list_never_sampled
from neoflix.model.load import load_pretrained
from neoflix.sampling.sampler import Sampler

NEW_TOKENS = 24


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    model = load_pretrained(args.run, torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.run)
    prompts, texts = read_texts(args.run, args.prompts, args.texts)
    texts = [encode(text, tokenizer)[: context_length_of(model)] for text in texts]
    ours = [log_probabilities(model, ids, len(tokenizer)) for ids in texts]
    own = torch.cat([scores[range(len(ids) - 1), ids[1:]] for ids, scores in zip(texts, ours, strict=True)])
    samples = Sampler.load(args.run, device="cpu").sample(prompts, top_k=1, max_new_tokens=NEW_TOKENS)
    greedy = {prompt: sample.text for prompt, sample in zip(prompts, samples, strict=True)}
    control = torch.cat(ours)[:, list_never_sampled(tokenizer)].exp()
    figures = {"run": Path(args.run).name, "model_type": model.config.model_type, "places": len(own)}
    figures |= {"prompts": len(greedy), "xllamacpp": version("xllamacpp"), "perplexity": math.exp(-own.mean())}
    figures |= {"control_mean": control.mean().item(), "control_max": control.max().item(), "files": {}}
    with tempfile.TemporaryDirectory() as folder:
        for dtype in FILE_TYPES:
            file = Path(folder, f"{dtype}.gguf")
            export_gguf(args.run, str(file), dtype)
            for way in ("exact", "defaults") if dtype == "float32" else ("exact",):
                engine = LlamaEngine(file, is_exact=way == "exact", threads=args.threads)
                row = {"bytes": file.stat().st_size, **compare(engine, texts, ours, tokenizer)}
                if way == "exact":
                    row["same_greedy"] = count_same_texts(engine, greedy)
                engine.close()
                figures["files"][f"{dtype} {way}"] = row
                print(dtype, way, row, flush=True)
            file.unlink()
    write_line(figures, args.output)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", metavar="RUN", help="a run's folder")
    parser.add_argument("--texts", type=int, help="held-out texts (default: all)")
    parser.add_argument("--prompts", type=int, default=100, help="greedy texts")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU cores")
    parser.add_argument("--output", help="JSON lines file to append to")
    return parser.parse_args()


def compare(engine: LlamaEngine, texts: list[list[int]], ours: list[torch.Tensor], tokenizer) -> dict[str, float]:
    gaps, sum_theirs = [], 0.0
    for ids, scores in zip(texts, ours, strict=True):
        places = engine.score(ids, tokenizer)
        gaps += (scores.amax(-1) - scores[range(len(places)), [token for token, _ in places]]).tolist()
        sum_theirs += sum(score for _, score in places)
    return {
        "same": sum(gap == 0 for gap in gaps) / len(gaps),
        "gap": max(gaps),
        "perplexity": math.exp(-sum_theirs / len(gaps)),
    }


def count_same_texts(engine: LlamaEngine, greedy: dict[str, str]) -> int:
    return sum((prompt + engine.write(prompt, NEW_TOKENS)).strip() == text for prompt, text in greedy.items())


if __name__ == "__main__":
    main()
