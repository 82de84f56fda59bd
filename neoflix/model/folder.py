"""Names of the files in a model's folder, as Hugging Face and peft write them."""

import json
from contextlib import suppress
from pathlib import Path

ADAPTERS_CONFIG_FILE = "adapter_config.json"  # as in checkpoint.py


WEIGHTS_FILES = ("model.safetensors", "model.safetensors.index.json")


ADAPTERS_FILE, ADAPTERS_CONFIG_FILE = "adapter_model.safetensors", "adapter_config.json"  # peft's; a base beside them


PICKLED_WEIGHTS_FILES = ("pytorch_model.bin", "pytorch_model.bin.index.json")


SETTINGS_FILES = (
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "chat_template.jinja", "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model"),
)


def list_loaded_files(folder: Path) -> list[Path]:
    """The files that decide over a model that is loaded from a folder: weights, configuration and tokenizer."""
    names = {*WEIGHTS_FILES, *PICKLED_WEIGHTS_FILES, ADAPTERS_FILE, ADAPTERS_CONFIG_FILE, *SETTINGS_FILES}
    for index in (WEIGHTS_FILES[1], PICKLED_WEIGHTS_FILES[1]):
        with suppress(FileNotFoundError):
            names |= {*json.loads((folder / index).read_text(encoding="utf-8"))["weight_map"].values()}
    return sorted(path for path in map(folder.joinpath, names) if path.is_file())


def has_weights(folder: Path) -> bool:
    """Whether `from_pretrained` finds weights in a folder, or adapters, and no pickled ones."""
    return any((folder / name).is_file() for name in (*WEIGHTS_FILES, ADAPTERS_FILE))


def holds_adapters(folder: str | Path) -> bool:
    """Whether what a folder holds is LoRA adapters of another model, by safetensors (lora.py)."""
    return all(Path(folder, name).is_file() for name in (ADAPTERS_FILE, ADAPTERS_CONFIG_FILE))
