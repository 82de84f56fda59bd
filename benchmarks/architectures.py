"""The models and texts of the benchmarks: GPT-Neo's shapes with random weights, and random tokens."""

import random
from typing import NamedTuple

import torch
from transformers import GPTNeoConfig, GPTNeoForCausalLM

from neoflix.model import load

VOCAB_SIZE = 50_304  # GPT-Neo's 50,257 tokens and two more special ones, rounded up to a multiple of 64
LOGITS_DEVIATION = 3.2
PADDED_LENGTH = 62  # the article pads every text to the longest


class Architecture(NamedTuple):
    num_layers: int
    hidden_size: int
    num_heads: int
    vocab_size: int = VOCAB_SIZE


ARCHITECTURES = {
    "demo": Architecture(4, 256, 4, vocab_size=4096),  # what `--model_name_or_path demo` trains
    "small": Architecture(4, 256, 4),  # two CPU cores train it in seconds, with the real head's share of the work
    "125M": Architecture(12, 768, 12),
    "1.3B": Architecture(24, 2048, 16),
    "2.7B": Architecture(32, 2560, 20),
}


def build_model(architecture: str, dtype: torch.dtype, device: str | torch.device, side: str) -> GPTNeoForCausalLM:
    """A GPT-Neo with random weights: neither speed nor memory depends on their values.

    Weights are made where and as they stay. 2.7B takes 5.3 GB in bf16 on the device, and nothing of the host.

    Args:
        side: "ours", or "eager" for transformers' own attention and loss.
    """
    shape = ARCHITECTURES[architecture]
    config = GPTNeoConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        num_layers=shape.num_layers,
        num_heads=shape.num_heads,
        attention_types=[[["global", "local"], shape.num_layers // 2]],
        bos_token_id=None,  # by default 50,256, which the demo has no row for
        eos_token_id=None,
    )
    with torch.device(device):
        if side == "ours":
            return load.build_model(config, dtype)
        return GPTNeoForCausalLM._from_config(config, attn_implementation="eager", dtype=dtype)


def spread_logits(model: GPTNeoForCausalLM) -> None:
    """Scales weights so that logits differ as much as a trained model's: at temperature 0.8 about 500 of 50,304 tokens
    hold top_p's 95%. With plain random weights all tokens would be about equally likely.
    """
    with torch.no_grad():
        model.transformer.ln_f.weight.fill_(LOGITS_DEVIATION / (0.02 * model.config.hidden_size**0.5))


def draw_texts(num_texts: int, vocab_size: int = 50_257) -> list[list[int]]:
    """Random tokens with the lengths of the Netflix descriptions: 14 to 62, mean 31.8, 99th percentile 42."""
    rng = random.Random(0)
    lengths = [min(max(round(rng.gauss(31.8, 4.4)), 14), PADDED_LENGTH) for _ in range(num_texts)]
    return [[rng.randrange(vocab_size) for _ in range(length)] for length in lengths]
