"""Files that are written completely or not at all, and checksums of files."""

import json
import math
import os
import re
import shutil
import stat
import tempfile
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import xxhash

ROOT = Path(__file__).resolve().parent.parent.parent  # the project's folder

STOP_FILE = "STOP"  # in a run's folder: a request to stop

BLOCK = 1 << 20  # bytes hashed and written at a time: for the second, they are still in the processor's cache


@contextmanager
def without_wildcards(folder: Path | None) -> Iterator[Path | None]:
    """Yields a path to a folder without `[`, `*` and `?`, which DeepSpeed and transformers read as wildcards: the
    folder's own or, if it has such characters, a link that exists until the context ends. None stays None."""
    if folder is None or not set("*?[") & set(str(folder)):
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="neoflix-") as temporary:
        link = Path(temporary, folder.name.translate({ord(char): "_" for char in "*?["}))
        link.symlink_to(folder.absolute())
        yield link


class HashedFile:
    """A new file that is hashed while it is written, and is on the disk itself (fsync) once `close` returns."""

    def __init__(self, path: str | Path):
        self._file = open(path, "wb")  # noqa: SIM115 - closed by `close`
        self._hash = xxhash.xxh3_128()
        self.num_bytes = 0

    def write(self, data) -> int:
        view = memoryview(data).cast("B")
        for start in range(0, len(view), BLOCK):
            block = view[start : start + BLOCK]
            self._hash.update(block)
            self._file.write(block)
        self.num_bytes += len(view)
        return len(view)

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
        finally:
            self._file.close()

    def entry(self) -> dict:
        return {"bytes": self.num_bytes, "xxh3_128": self._hash.hexdigest()}


def hash_file(path: Path, sync: bool = False) -> dict:
    """The manifest's entry for a file: size and checksum. With `sync`, the file is on the disk itself then."""
    digest, num_bytes = xxhash.xxh3_128(), 0
    with path.open("rb", buffering=0) as file:
        buffer = memoryview(bytearray(BLOCK))
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
            num_bytes += count
        if sync:
            os.fsync(file.fileno())
    return {"bytes": num_bytes, "xxh3_128": digest.hexdigest()}


def sync_folder(folder: Path) -> None:
    """Writes the names in a folder to the disk itself."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def apply_umask(paths: Iterable[Path]) -> None:
    """Gives files and folders the permissions that the user's umask allows: safetensors makes files that only the user
    may read."""
    umask = int(re.search(r"^Umask:\s*(\d+)", Path("/proc/self/status").read_text(), re.MULTILINE)[1], 8)
    for path in paths:
        mode = stat.S_IMODE(path.stat().st_mode)
        allowed = mode | (0o777 if path.is_dir() else 0o666) & ~umask
        if allowed != mode:
            with suppress(PermissionError):  # another user's
                path.chmod(allowed)


def write_json(path: Path, content: dict | list) -> None:
    """Writes a JSON file as `write_text` does. NaN and infinity, which JSON does not have, become null."""
    write_text(path, json.dumps(_without_nan(content), indent=2, allow_nan=False) + "\n")


def _without_nan(content):
    if isinstance(content, dict):
        return {key: _without_nan(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_without_nan(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def write_text(path: Path, content: str) -> None:
    """Writes a text file, completely or not at all, to the disk itself."""
    unfinished = path.with_name(f"{path.name}.{uuid.uuid4().hex}.part")  # a name that no other file has
    try:
        with unfinished.open("x", encoding="utf-8") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
    sync_folder(path.parent)


def free_bytes(folder: Path) -> int:
    """Free disk space for a folder that may not exist yet."""
    while not folder.exists():
        folder = folder.absolute().parent
    return shutil.disk_usage(folder).free


def read_json(path: Path, default):
    """The content of a JSON file, or `default` if there is none of the same type."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return default
    return content if isinstance(content, type(default)) else default
