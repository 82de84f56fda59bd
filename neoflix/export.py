"""Converts models for other engines: `python -m neoflix.export --to gpt2 RUN OUT`, or `--to merged RUN OUT`.

`--to gpt2` writes a GPT-Neo in GPT-2's layout, for engines that do not support GPT-Neo (`model/gpt2.py` says how).
`--to merged` writes a whole model in its own layout, with LoRA adapters merged, which needs no `peft`.
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
from transformers import GPT2Config, GPTNeoConfig, PreTrainedModel, PreTrainedTokenizerBase

from neoflix.arguments.command_line import SWITCH, Parser
from neoflix.checkpoints.find import find_model
from neoflix.data.tokenizer import read_tokenizer
from neoflix.model.folder import WEIGHTS_FILES, holds_adapters
from neoflix.model.gpt2 import context_limit, gpt2_config, rewrite
from neoflix.model.load import load_pretrained
from neoflix.reporting.render import escape_markdown, render
from neoflix.runtime.console import GIB, say
from neoflix.runtime.errors import UserError
from neoflix.runtime.files import apply_umask, free_bytes, sync_folder
from neoflix.runtime.processes import run_and_exit


def parse_export_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line of `python -m neoflix.export`."""
    parser = Parser(prog="python -m neoflix.export", description="Convert a model for other engines.")
    add = parser.add_argument
    layouts = "gpt2: GPT-2's, exact up to GPT-Neo's window of 256 tokens; merged: its own, with LoRA adapters merged"
    add("--to", choices=["gpt2", "merged"], required=True, help=layouts)
    add("--dtype", choices=["float32", "float16", "bfloat16"], help="dtype of the weights (default: as saved)")
    add(
        "--allow_pickle",
        **SWITCH,
        default=False,
        help="load weights from a pickle (pytorch_model.bin) if there is no safetensors file",
    )
    add("run", metavar="RUN", help="a run's folder, or one of its checkpoints")
    add("out", metavar="OUT", help="the folder to write; must be new or empty")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_export_args(argv)
    export = export_gpt2 if args.to == "gpt2" else export_merged
    export(args.run, args.out, args.dtype, args.allow_pickle)


def export_gpt2(run: str, out: str, dtype: str | None = None, allow_pickle: bool = False) -> None:
    """Writes a GPT-Neo as a GPT-2: config, weights (safetensors), tokenizer, generation settings, README.

    `out` appears complete or not at all. Needs memory for the weights twice, as saved and as written.

    Args:
        run: a run's folder (for its best model), or one of its checkpoints.
        out: a folder that is new or empty.
        dtype: "float32", "float16" or "bfloat16"; None: as saved.
        allow_pickle: see `load_pretrained`.

    Raises:
        UserError: if there is no model, or it is not a GPT-Neo; if `out` is not empty or cannot be written; if a weight
            overflows `dtype`.
    """
    folder, target = find_model(run, "RUN"), Path(out)
    check_target(target)
    if not holds_adapters(folder):  # otherwise the base model's is checked, once it is loaded
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
    """Writes a whole model of any architecture, which `from_pretrained` loads without `peft`: of a LoRA run, the base
    model with the adapters merged. Arguments and errors as for `export_gpt2`."""
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
    """Yields a folder to write to, which becomes `target` at the end, or is deleted after an error.

    Raises:
        UserError: if the disk is full or cannot be written.
    """
    unfinished = target.with_name(f"{target.name}.{uuid.uuid4().hex}.part")
    try:
        unfinished.mkdir(parents=True)
        yield unfinished
        apply_umask(unfinished.rglob("*"))
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
    """Raises UserError unless so many bytes are free on the disk of `folder`."""
    free = free_bytes(folder)
    if free < num_bytes:
        raise UserError(f"OUT: the weights need {num_bytes / GIB:.1f} GiB of disk space, {free / GIB:.1f} GiB are free")


def check_target(target: Path) -> None:
    """Raises UserError unless `target` is new or an empty folder."""
    if target.exists() and not target.is_dir():
        raise UserError(f"OUT {target}: is a file; name a folder")
    if target.is_dir() and any(target.iterdir()):
        raise UserError(f"OUT {target}: exists already and is not empty; choose another name or delete it")


def check_architecture(model_type: str | None, folder: Path) -> None:
    """Raises UserError unless it is a GPT-Neo."""
    if model_type != "gpt_neo":
        raise UserError(f"RUN {folder}: its model is a {model_type}; only a gpt_neo can be converted to GPT-2's layout")


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, folder: Path) -> None:
    """Raises UserError if the tokenizer has more tokens than the model."""
    rows = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > rows:
        raise UserError(f"RUN {folder}: its tokenizer has {len(tokenizer):,} tokens, its model {rows:,}")


def write_weights(model: PreTrainedModel, config: GPT2Config, folder: Path) -> None:
    """Writes the GPT-2's weights to model.safetensors.

    Raises:
        UserError: if a weight overflows the dtype, or the disk is too small.
        OSError, SafetensorError: if the file cannot be written.
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
    """Writes tokenizer, generation settings, README and, last, the config, without which the folder is not a model."""
    tokenizer.model_max_length = config.n_positions
    tokenizer.save_pretrained(folder)
    generation = model.generation_config
    never = [token for token in generation.suppress_tokens or [] if token < config.vocab_size]
    generation.suppress_tokens = never or None
    if generation.max_new_tokens:
        generation.max_new_tokens = min(generation.max_new_tokens, config.n_positions - 1)
    generation.save_pretrained(folder)
    text = render(
        "gpt2.md.jinja",
        name=escape_markdown(name),
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
    """A sentence on the positions that were left out; empty if there are none."""
    limit = context_limit(config)
    if limit == config.max_position_embeddings:
        return ""
    return (
        f"Longer texts would be wrong: GPT-Neo's local layers attend to the last {config.window_size} tokens, GPT-2's "
        f"to all. The other {config.max_position_embeddings - limit:,} positions are left out, so no engine uses them."
    )


def rounding_of(config: GPTNeoConfig, dtype: torch.dtype) -> str:
    """A sentence on the rounding of the scaled queries; empty if it is exact (a power of two), or in float32."""
    scale = math.sqrt(config.hidden_size // config.num_heads)
    if dtype == torch.float32 or math.log2(scale).is_integer():
        return ""
    return f"The queries' weights, scaled by {scale:.4g}, were rounded to {_name(dtype)}; --dtype float32 avoids that."


if __name__ == "__main__":
    run_and_exit(main)
