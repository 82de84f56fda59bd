"""Paths in flags: `~` is the home folder. Imports no torch."""

import os

# Flags and keys of recipes, of all programs, that may name a file or a folder.
PATH_FLAGS = frozenset(
    "config model_name_or_path dataset cache_dir output_dir logging_dir deepspeed resume_from_checkpoint model_dir "
    "prompt fields_file output judge base_model run runs out".split()
)


def expand_paths(flags: dict) -> dict:
    """Flags by name, with `~` as the home folder in those that name paths."""
    return {name: _expand(name, value) if name in PATH_FLAGS else value for name, value in flags.items()}


def _expand(name: str, value):
    if isinstance(value, list):
        return [_expand(name, item) for item in value]
    if not isinstance(value, str):
        return value
    if value.startswith("hf:~"):
        return "hf:" + os.path.expanduser(value[3:])
    path = os.path.expanduser(value) if value.startswith("~") else value
    return value if name == "prompt" and not os.path.isfile(path) else path  # a prompt that is no file is text
