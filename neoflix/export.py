"""Converts models for other engines: `python -m neoflix.export --to gpt2 RUN OUT`, also `--to gguf` and `--to merged`.

`--to gpt2` writes a GPT-Neo in GPT-2's layout, for engines that do not support GPT-Neo (`model/gpt2.py` says how).
`--to gguf` writes one file for llama.cpp and Ollama (`exporting/gguf_file.py`).
`--to merged` writes a whole model in its own layout, with LoRA adapters merged, which needs no `peft`.
"""

import argparse
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import GPT2Config, PreTrainedModel, PreTrainedTokenizerBase

from neoflix.arguments.command_line import SWITCH, Parser
from neoflix.checkpoints.find import find_model
from neoflix.data.tokenizer import read_tokenizer
from neoflix.exporting.gguf_file import Q8_0, export_gguf
from neoflix.exporting.source import Supported, find_source, load_source
from neoflix.exporting.targets import appearing_whole, check_room, check_target
from neoflix.model.folder import WEIGHTS_FILES
from neoflix.model.gpt2 import gpt2_config, limit_of, name_of, rewrite, rounding_of
from neoflix.model.load import load_pretrained
from neoflix.reporting.render import escape_markdown, render
from neoflix.runtime.console import say
from neoflix.runtime.errors import UserError
from neoflix.runtime.processes import run_and_exit

GPT_NEO = Supported(("gpt_neo",), "can be converted to GPT-2's layout")


def parse_export_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line of `python -m neoflix.export`."""
    parser = Parser(prog="python -m neoflix.export", description="Convert a model for other engines.")
    add = parser.add_argument
    layouts = (
        "gpt2: GPT-2's, exact up to GPT-Neo's window of 256 tokens; gguf: a file for llama.cpp and Ollama, of a "
        "GPT-Neo (as gpt2) or a Llama; merged: the model's own, with LoRA adapters merged"
    )
    add("--to", choices=["gpt2", "gguf", "merged"], required=True, help=layouts)
    dtypes = f"dtype of the weights (default: as saved); {Q8_0}, 8 bits a weight, only with --to gguf"
    add("--dtype", choices=["float32", "float16", "bfloat16", Q8_0], help=dtypes)
    add(
        "--allow_pickle",
        **SWITCH,
        default=False,
        help="load weights from a pickle (pytorch_model.bin) if there is no safetensors file",
    )
    add("run", metavar="RUN", help="a run's folder, or one of its checkpoints")
    add("out", metavar="OUT", help="the folder to write, new or empty; with --to gguf a new file, NAME.gguf")
    args = parser.parse_args(argv)
    if args.dtype == Q8_0 and args.to != "gguf":
        parser.error(f"--dtype {Q8_0}: only --to gguf writes it; use float32, float16 or bfloat16")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_export_args(argv)
    export = {"gpt2": export_gpt2, "gguf": export_gguf, "merged": export_merged}[args.to]
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
    target = Path(out)
    folder = find_source(run, GPT_NEO)
    check_target(target)
    model, tokenizer = load_source(folder, "auto", allow_pickle, GPT_NEO)
    config = gpt2_config(model.config, len(tokenizer), getattr(torch, dtype) if dtype else model.dtype)

    with appearing_whole(target) as unfinished:
        write_weights(model, config, unfinished)
        save_settings(model, tokenizer, config, unfinished, folder.absolute().name)
    say(f"{folder} -> {target}: GPT-2's layout, {name_of(config.dtype)}, texts of up to {config.n_positions:,} tokens")
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
    say(f"{folder} -> {target}: the whole model, {name_of(model.dtype)}")


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
            raise UserError(f"{name} overflows {name_of(config.dtype)}; use --dtype bfloat16 or float32")
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
        dtype=name_of(config.dtype),
        rounding=rounding_of(model.config, config.dtype),
    )
    (folder / "README.md").write_text(text, encoding="utf-8")
    config.save_pretrained(folder)


if __name__ == "__main__":
    run_and_exit(main)
