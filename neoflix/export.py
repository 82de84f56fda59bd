"""`python -m neoflix.export --to gpt2 RUN OUT`: GPT-Neo in GPT-2's layout, for engines that do not know GPT-Neo.
`--to merged`: the model as it is, LoRA's adapters merged into it, for whoever has no `peft`.

GPT-Neo and GPT-2 are the same network but for three things. GPT-Neo does not divide attention scores by sqrt(head
width): its queries are multiplied by that here, which GPT-2's division takes back. GPT-2 has biases for queries, keys
and values: zeros. And every second layer of GPT-Neo looks no further back than its window of 256 tokens. GPT-2 has no
such layer; up to 256 tokens there is no difference, so that the export has so many positions and no more.

Sources: transformers' modeling_gpt_neo.py and modeling_gpt2.py.
"""

import argparse
import json
import math
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers import (
    GPT2Config,
    GPTNeoConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from neoflix.arguments.command_line import SWITCH, Parser
from neoflix.checkpoints.find import find_model
from neoflix.data.tokenizer import read_tokenizer
from neoflix.model.folder import WEIGHTS_FILES, holds_adapters
from neoflix.model.load import load_pretrained
from neoflix.runtime.console import say
from neoflix.runtime.errors import UserError
from neoflix.runtime.files import free_bytes, share_as_asked, sync_folder
from neoflix.runtime.processes import run_and_exit


def parse_export_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line of `python -m neoflix.export`."""
    parser = Parser(prog="python -m neoflix.export", description="Rewrite a model for other engines.")
    add = parser.add_argument
    layouts = (
        "gpt2: GPT-2's, exact up to GPT-Neo's window of 256 tokens; merged: the model's own, LoRA's adapters merged"
    )
    add("--to", choices=["gpt2", "merged"], required=True, help=layouts)
    add("--dtype", choices=["float32", "float16", "bfloat16"], help="of the weights (default: as they were saved)")
    add("--allow_pickle", **SWITCH, default=False, help="take weights from a pickle (pytorch_model.bin) if need be")
    add("run", metavar="RUN", help="a run's folder, or one checkpoint of it")
    add("out", metavar="OUT", help="the folder to write; must not exist yet, or be empty")
    return parser.parse_args(argv)


README = """---
library_name: transformers
pipeline_tag: text-generation
---

# GPT-Neo in GPT-2's layout

{name}, rewritten by neoflix for engines that know GPT-2. The texts are GPT-Neo's as long as prompt and text together
have at most **{positions} tokens**. {limit}

Begin each text with `{bos}`; it is over at `{eos}`. Never to be sampled: {never}
(`generation_config.json` says so to transformers; other engines have to be told).

Weights: {dtype}. {rounding}
"""


def main(argv: list[str] | None = None) -> None:
    args = parse_export_args(argv)
    export = export_gpt2 if args.to == "gpt2" else export_merged
    export(args.run, args.out, args.dtype, args.allow_pickle)


def export_gpt2(run: str, out: str, dtype: str | None = None, allow_pickle: bool = False) -> None:
    """Writes a model's folder in GPT-2's layout: config, weights (safetensors), tokenizer, generation settings, README.

    `out` appears whole or not at all. Memory: the model's weights twice, as they were saved and as they are written.

    Args:
        run: a run's folder (its best model), or one checkpoint of it.
        out: a folder that does not exist yet, or is empty.
        dtype: "float32", "float16" or "bfloat16"; None: what the weights were saved in.
        allow_pickle: see `load_pretrained`.

    Raises:
        UserError: where there is no model or none of GPT-Neo's, where `out` holds something or cannot be written, and
            where a weight is too large for `dtype`.
    """
    folder, target = find_model(run, "RUN"), Path(out)
    check_target(target)
    if not holds_adapters(folder):  # else that of their base, once it is loaded
        saved = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        check_architecture(saved.get("model_type"), folder)
    model = load_pretrained(str(folder), "auto", allow_pickle).eval()
    tokenizer = read_tokenizer(folder, f"RUN {folder}")
    check_architecture(model.config.model_type, folder)
    check_tokenizer(tokenizer, model, folder)
    config = gpt2_config(model.config, len(tokenizer), getattr(torch, dtype) if dtype else model.dtype)

    with appearing_whole(target) as unfinished:
        write_weights(model, config, unfinished)
        save_settings(model, tokenizer, config, unfinished, folder.absolute().name)
    say(f"{folder} -> {target}: GPT-2's layout, {_name(config.dtype)}, texts of up to {config.n_positions:,} tokens")
    for sentence in filter(None, (limit_of(model.config), rounding_of(model.config, config.dtype))):
        say(sentence)


def export_merged(run: str, out: str, dtype: str | None = None, allow_pickle: bool = False) -> None:
    """Writes a model's folder that `from_pretrained` loads without `peft`: of a LoRA run, the base model with the
    adapters merged into it. Arguments and errors as `export_gpt2`, for any architecture."""
    folder, target = find_model(run, "RUN"), Path(out)
    check_target(target)
    model = load_pretrained(str(folder), getattr(torch, dtype) if dtype else "auto", allow_pickle)
    tokenizer = read_tokenizer(folder, f"RUN {folder}")
    with appearing_whole(target) as unfinished:
        check_room(model.get_memory_footprint(), unfinished)
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
    say(f"{folder} -> {target}: the whole model, {_name(model.dtype)}")


@contextmanager
def appearing_whole(target: Path) -> Iterator[Path]:
    """A folder to write to, which becomes `target` when the context ends, and nothing where it fails. UserError where
    the disk does not take it."""
    unfinished = target.with_name(f"{target.name}.{uuid.uuid4().hex}.part")
    try:
        unfinished.mkdir(parents=True)
        yield unfinished
        share_as_asked(unfinished.rglob("*"))
        for path in unfinished.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        sync_folder(unfinished)
        unfinished.rename(target)
        sync_folder(target.absolute().parent)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"OUT {target}: cannot be written ({reason})") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def check_room(num_bytes: int, folder: Path) -> None:
    """UserError unless so many bytes are free where `folder` lies."""
    free = free_bytes(folder)
    if free < num_bytes:
        raise UserError(f"OUT: the weights take {num_bytes / 2**30:.1f} GiB of disk, {free / 2**30:.1f} GiB are free")


def check_target(target: Path) -> None:
    """UserError unless a folder of this name can be made without touching anything that is there."""
    if target.exists() and not target.is_dir():
        raise UserError(f"OUT {target}: is a file; name a folder")
    if target.is_dir() and any(target.iterdir()):
        raise UserError(f"OUT {target}: exists already and is not empty; choose another name or delete it")


def check_architecture(model_type: str | None, folder: Path) -> None:
    """UserError unless it is GPT-Neo's."""
    if model_type != "gpt_neo":
        raise UserError(f"RUN {folder}: its model is a {model_type}, not a GPT-Neo; no other is rewritten as GPT-2")


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, folder: Path) -> None:
    """UserError for a tokenizer with more tokens than the model."""
    rows = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > rows:
        raise UserError(f"RUN {folder}: its tokenizer has {len(tokenizer):,} tokens, its model {rows:,}")


def context_limit(config: GPTNeoConfig) -> int:
    """Most tokens, prompt and text together, for which GPT-2's attention is this GPT-Neo's."""
    if "local" in config.attention_layers:
        return min(config.window_size, config.max_position_embeddings)
    return config.max_position_embeddings


def gpt2_config(config: GPTNeoConfig, vocab_size: int, dtype: torch.dtype) -> GPT2Config:
    """GPT-2's config of a GPT-Neo, for texts up to `context_limit` tokens.

    Args:
        vocab_size: the tokenizer's: rows beyond it belong to no token, and engines want none.
    """
    limit = context_limit(config)
    return GPT2Config(
        vocab_size=vocab_size,
        n_positions=limit,
        n_ctx=limit,  # llama.cpp's converter asks for it by this name
        n_embd=config.hidden_size,
        n_layer=config.num_layers,
        n_head=config.num_heads,
        n_inner=config.intermediate_size,
        activation_function=config.activation_function,
        resid_pdrop=config.resid_dropout,
        embd_pdrop=config.embed_dropout,
        attn_pdrop=config.attention_dropout,
        layer_norm_epsilon=config.layer_norm_epsilon,
        initializer_range=config.initializer_range,
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
        tie_word_embeddings=config.tie_word_embeddings,
        architectures=["GPT2LMHeadModel"],
        dtype=dtype,
        exported_from={
            "model_type": config.model_type,
            "max_position_embeddings": config.max_position_embeddings,
            "exact_up_to_tokens": limit,
        },
    )


def rewrite(weights: dict[str, torch.Tensor], config: GPTNeoConfig, gpt2: GPT2Config) -> Iterator:
    """(name, tensor) of a GPT-2's weights, one after the other, out of a GPT-Neo's.

    GPT-2 multiplies by its weights from the right (transformers' Conv1D): they are transposed, and queries, keys and
    values are one matrix [width, 3 width].
    """
    yield "transformer.wte.weight", weights["transformer.wte.weight"][: gpt2.vocab_size]
    yield "transformer.wpe.weight", weights["transformer.wpe.weight"][: gpt2.n_positions]
    for number in range(config.num_layers):
        layer = f"transformer.h.{number}."
        query, key, value = (weights[f"{layer}attn.attention.{name}_proj.weight"].float() for name in "qkv")
        query = query * math.sqrt(config.hidden_size // config.num_heads)
        yield f"{layer}attn.c_attn.weight", torch.cat([query, key, value]).t()
        yield f"{layer}attn.c_attn.bias", query.new_zeros(3 * config.hidden_size)
        yield f"{layer}attn.c_proj.weight", weights[f"{layer}attn.attention.out_proj.weight"].t()
        yield f"{layer}attn.c_proj.bias", weights[f"{layer}attn.attention.out_proj.bias"]
        for name in ("c_fc", "c_proj"):
            yield f"{layer}mlp.{name}.weight", weights[f"{layer}mlp.{name}.weight"].t()
            yield f"{layer}mlp.{name}.bias", weights[f"{layer}mlp.{name}.bias"]
        for name in ("ln_1.weight", "ln_1.bias", "ln_2.weight", "ln_2.bias"):
            yield layer + name, weights[layer + name]
    for name in ("transformer.ln_f.weight", "transformer.ln_f.bias"):
        yield name, weights[name]
    if not gpt2.tie_word_embeddings:
        yield "lm_head.weight", weights["lm_head.weight"][: gpt2.vocab_size]


def write_weights(model: PreTrainedModel, config: GPT2Config, folder: Path) -> None:
    """Writes the rewritten weights to `folder`'s model.safetensors.

    Raises:
        UserError: where a weight overflows the dtype, or the disk is too small.
        OSError, SafetensorError: where the file cannot be written.
    """
    weights = model.state_dict()
    shapes = rewrite({name: weight.to("meta") for name, weight in weights.items()}, model.config, config)
    check_room(sum(weight.numel() for _, weight in shapes) * config.dtype.itemsize, folder)
    rewritten = {}
    for name, weight in rewrite(weights, model.config, config):
        rewritten[name] = weight.to(config.dtype).contiguous()
        if not rewritten[name].isfinite().all():
            raise UserError(f"{name} overflows {_name(config.dtype)}; use --dtype bfloat16 or float32")
    save_file(rewritten, folder / WEIGHTS_FILES[0], metadata={"format": "pt"})


def save_settings(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: GPT2Config, folder: Path, name: str
) -> None:
    """Tokenizer, generation settings, README and, last of all, the config, without which the folder is no model."""
    tokenizer.model_max_length = config.n_positions
    tokenizer.save_pretrained(folder)
    generation = model.generation_config
    never = [token for token in generation.suppress_tokens or [] if token < config.vocab_size]
    generation.suppress_tokens = never or None
    if generation.max_new_tokens:
        generation.max_new_tokens = min(generation.max_new_tokens, config.n_positions - 1)
    generation.save_pretrained(folder)
    text = README.format(
        name=name,
        positions=config.n_positions,
        limit=limit_of(model.config),
        bos=tokenizer.bos_token,
        eos=tokenizer.eos_token,
        never=", ".join(f"`{token}`" for token in tokenizer.convert_ids_to_tokens(never)) or "nothing",
        dtype=_name(config.dtype),
        rounding=rounding_of(model.config, config.dtype),
    )
    (folder / "README.md").write_text(text, encoding="utf-8")
    config.save_pretrained(folder)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def limit_of(config: GPTNeoConfig) -> str:
    """What was cut off, in a sentence; empty where nothing was."""
    limit = context_limit(config)
    if limit == config.max_position_embeddings:
        return ""
    return (
        f"Longer texts would come out wrong: GPT-Neo's local layers look {config.window_size} tokens back, GPT-2's to "
        f"the beginning. The other {config.max_position_embeddings - limit:,} positions are left out, so that no "
        "engine gets there."
    )


def rounding_of(config: GPTNeoConfig, dtype: torch.dtype) -> str:
    """What scaling the queries cost, in a sentence; empty where it was exact (a power of two) or in float32."""
    scale = math.sqrt(config.hidden_size // config.num_heads)
    if dtype == torch.float32 or math.log2(scale).is_integer():
        return ""
    return (
        f"The queries' weights, scaled by {scale:.4g}, were rounded once more to fit {_name(dtype)}; "
        "--dtype float32 keeps them."
    )


if __name__ == "__main__":
    run_and_exit(main)
