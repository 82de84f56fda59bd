"""The files in a model's folder, by the names that Hugging Face and peft give them."""

import json
from contextlib import suppress
from pathlib import Path

WEIGHTS_FILES = ("model.safetensors", "model.safetensors.index.json")
ADAPTERS_FILE, ADAPTERS_CONFIG_FILE = "adapter_model.safetensors", "adapter_config.json"  # peft's
PICKLED_WEIGHTS_FILES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
SETTINGS_FILES = (
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "chat_template.jinja", "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model"),
)


def list_loaded_files(folder: Path) -> list[Path]:
    """The files that a model is loaded from: weights, configuration and tokenizer."""
    names = {*WEIGHTS_FILES, *PICKLED_WEIGHTS_FILES, ADAPTERS_FILE, ADAPTERS_CONFIG_FILE, *SETTINGS_FILES}
    for index in (WEIGHTS_FILES[1], PICKLED_WEIGHTS_FILES[1]):
        with suppress(FileNotFoundError):
            names |= {*json.loads((folder / index).read_text(encoding="utf-8"))["weight_map"].values()}
    return sorted(path for path in map(folder.joinpath, names) if path.is_file())


def has_weights(folder: Path) -> bool:
    """Whether a folder has weights or adapters in safetensors."""
    return any((folder / name).is_file() for name in (*WEIGHTS_FILES, ADAPTERS_FILE))


def holds_adapters(folder: str | Path) -> bool:
    """Whether a folder has LoRA adapters in safetensors (lora.py)."""
    return all(Path(folder, name).is_file() for name in (ADAPTERS_FILE, ADAPTERS_CONFIG_FILE))
