"""Paths as a user names them, and as other programs can read them. A leaf, without torch."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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
    return value if name == "prompt" and not os.path.isfile(path) else path  # else it is how a text begins


@contextmanager
def without_wildcards(folder: Path | None) -> Iterator[Path | None]:
    """A path to a folder (None for None) for programs that read `[`, `*` and `?` in it as wildcards, as DeepSpeed and
    transformers do: the folder's own or, where it has such characters, a link's, until the context ends."""
    if folder is None or not set("*?[") & set(str(folder)):
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="neoflix-") as temporary:
        link = Path(temporary, folder.name.translate({ord(char): "_" for char in "*?["}))
        link.symlink_to(folder.absolute())
        yield link
