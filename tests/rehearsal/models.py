"""What a rehearsal trains: GPT-Neo folders of true shape, whose weights are zeros and take no disk, and texts."""

import json
import random
import struct
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import GPTNeoConfig, GPTNeoForCausalLM, PreTrainedTokenizerFast

NUM_WORDS = 50_256  # and the end token: GPT-Neo's vocabulary
SHAPES = {"125M": (12, 768, 12), "1.3B": (24, 2048, 16), "2.7B": (32, 2560, 20)}  # layers, width, heads


def build_folder(folder: Path, size: str) -> Path:
    """A model folder as on the hub: config, tokenizer, weights in fp32."""
    num_layers, width, num_heads = SHAPES[size]
    folder.mkdir(parents=True, exist_ok=True)
    config = GPTNeoConfig(
        vocab_size=NUM_WORDS + 1,
        hidden_size=width,
        num_layers=num_layers,
        num_heads=num_heads,
        attention_types=[[["global", "local"], num_layers // 2]],
    )
    config.architectures = ["GPTNeoForCausalLM"]
    config.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    with torch.device("meta"):
        model = GPTNeoForCausalLM(config)
    write_zeros(folder / "model.safetensors", {name: weight.shape for name, weight in model.named_parameters()})
    return folder


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of GPT-Neo's size in which each word is one token."""
    ids = {f"w{i}": i for i in range(NUM_WORDS)} | {"<|endoftext|>": NUM_WORDS}
    words = Tokenizer(WordLevel(ids, unk_token="<|endoftext|>"))
    words.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<|endoftext|>", bos_token="<|endoftext|>")


def write_texts(file: Path, num_texts: int) -> Path:
    """A CSV of random texts, of 32 tokens each with start and end."""
    rng = random.Random(0)
    rows = [" ".join(f"w{rng.randrange(NUM_WORDS)}" for _ in range(30)) for _ in range(num_texts)]
    file.write_text("\n".join(["description", *rows]) + "\n")
    return file


def write_zeros(file: Path, shapes: dict[str, torch.Size]) -> None:
    """A safetensors file (https://github.com/huggingface/safetensors#format) of fp32 zeros: its header, then a hole."""
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 4 * shape.numel()
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [begin, end]}
    words = json.dumps(header).encode()
    words += b" " * (-len(words) % 8)
    with open(file, "wb") as out:
        out.write(struct.pack("<Q", len(words)) + words)
        out.truncate(8 + len(words) + end)
