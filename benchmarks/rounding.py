"""The effect of rounding the scaled queries in `python -m neoflix.export`: log-probabilities on held-out texts.

    python benchmarks/rounding.py

A small GPT-Neo with heads 128 wide (like 1.3B and 2.7B) is trained on the sample titles for six epochs and cast to
bf16. The reference is these weights computed in fp32. Compared with it: the export in three dtypes, computed in fp32,
and the same weights computed in bf16. The last line is JSON; --output also appends it to a file.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import torch
from transformers import GPT2LMHeadModel, GPTNeoConfig, GPTNeoForCausalLM

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from machine import write_line

from neoflix.data.packing import PackedCollator
from neoflix.data.sources import SAMPLE_PATH, read_examples
from neoflix.data.split import split_texts
from neoflix.data.tokenizer import train_tokenizer
from neoflix.data.tokens import tokenize_texts
from neoflix.model.gpt2 import gpt2_config, rewrite
from neoflix.model.load import build_model

VOCAB_SIZE, EPOCHS, TEXTS_PER_STEP = 2048, 6, 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", help="JSON lines file to append to")
    args = parser.parse_args()
    torch.manual_seed(0)
    split = split_texts(read_examples(SAMPLE_PATH, "description"), 0.1)
    with tempfile.TemporaryDirectory() as cache:
        tokenizer = train_tokenizer([example.completion for example in split.train], VOCAB_SIZE, Path(cache))
        train, held_out = (tokenize_texts(side, tokenizer, 256, Path(cache))[0][:]["input_ids"] for side in split)
    model = learn(train, len(tokenizer)).eval().to(torch.bfloat16)
    in_bf16 = log_probabilities(model, held_out)
    weights = {name: weight.float() for name, weight in model.state_dict().items()}
    expected = log_probabilities(model.float(), held_out)
    figures = {"computed in bfloat16": compare(in_bf16, expected)}
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        config = gpt2_config(model.config, len(tokenizer), dtype)
        gpt2 = GPT2LMHeadModel(config).eval().float()
        rounded = {name: weight.to(dtype).float() for name, weight in rewrite(weights, model.config, config)}
        gpt2.load_state_dict(rounded | {"lm_head.weight": rounded["transformer.wte.weight"]})
        name = str(dtype).removeprefix("torch.")
        figures[f"exported in {name}"] = compare(log_probabilities(gpt2, held_out), expected)
    for name, row in figures.items():
        print(name, row)
    write_line(figures, args.output)


def learn(texts: list[list[int]], vocab_size: int) -> GPTNeoForCausalLM:
    config = GPTNeoConfig(
        vocab_size=vocab_size,
        hidden_size=256,
        num_layers=4,
        num_heads=2,
        attention_types=[[["global", "local"], 2]],
        max_position_embeddings=256,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = build_model(config, torch.float32).train()
    optimizer, collate = torch.optim.AdamW(model.parameters(), lr=1e-3), PackedCollator()
    for _ in range(EPOCHS):
        for batch in torch.randperm(len(texts)).split(TEXTS_PER_STEP):
            model(**collate([{"input_ids": texts[i], "prompt_length": 1} for i in batch])).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return model


@torch.no_grad()
def log_probabilities(model, texts: list[list[int]]) -> torch.Tensor:
    """fp32 [tokens of all texts, vocabulary]"""
    return torch.cat([model(torch.tensor([ids])).logits[0].float().log_softmax(-1) for ids in texts])


def compare(found: torch.Tensor, expected: torch.Tensor) -> dict[str, float]:
    """Mean difference of log-probabilities (nats), mean Kullback-Leibler divergence (nats), and the share of positions
    with the same most likely token."""
    return {
        "difference": (found - expected).abs().mean().item(),
        "divergence": (expected.exp() * (expected - found)).sum(-1).mean().item(),
        "same_likeliest": (found.argmax(-1) == expected.argmax(-1)).float().mean().item(),
    }


if __name__ == "__main__":
    main()
