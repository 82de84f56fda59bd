"""Files and folders of the cache: complete or not there at all, with nothing left of killed runs."""

import fcntl
import os
import re
import shutil
import socket
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from neoflix.runtime.errors import UserError

HOST = re.sub(r"\W", "-", socket.gethostname())


# Files that are being written, with the machine that writes them; earlier versions had two other kinds of names.
UNFINISHED = re.compile(r".+\.((?P<host>[\w-]+)@)?[0-9a-f]{32}\.part|tokens-[0-9a-f]+\.arrow\.[0-9a-f]{32}\.json")


DAY = 86_400  # seconds; another machine may still be writing, and its locks are not always visible here


def default_cache_dir() -> Path:
    """The folder beside Hugging Face's data set cache, by the same variables; importing `datasets` takes too long."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache"))
    home = Path(os.environ.get("HF_HOME", cache / "huggingface"))
    return Path(os.environ.get("HF_DATASETS_CACHE", home / "datasets")).expanduser() / "neoflix"


@contextmanager
def in_cache(folder: Path) -> Iterator[None]:
    """Raises UserError if the cache folder cannot be read or written, or its disk is full."""
    try:
        yield
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else error
        raise UserError(
            f"--cache_dir {folder}: cannot be read or written ({reason}); free disk space there, or use another folder"
        ) from error


@contextmanager
def new_path(path: Path, is_folder: bool = False) -> Iterator[Path]:
    """Yields another path to write to, beside `path`: it becomes `path` when the block ends; an error removes it.

    It is locked (`flock`) for as long as this process lives, which tells it from what a killed run left.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_orphans(path.parent)
    unfinished, lock = _create(path, is_folder)
    try:
        yield unfinished
        try:
            unfinished.replace(path)
        except OSError:
            if not (is_folder and path.is_dir()):  # otherwise another process was first
                raise
    finally:
        _remove(unfinished)
        os.close(lock)


def _create(path: Path, is_folder: bool) -> tuple[Path, int]:
    """(an empty file or folder beside `path`, the descriptor that holds its lock)"""
    while True:
        unfinished = path.with_name(f"{path.name}.{HOST}@{uuid.uuid4().hex}.part")
        unfinished.mkdir() if is_folder else unfinished.touch(exist_ok=False)
        lock = os.open(unfinished, os.O_RDONLY)
        with suppress(OSError):  # a disk without locks
            fcntl.flock(lock, fcntl.LOCK_EX)
        if unfinished.exists():
            return unfinished, lock
        os.close(lock)  # another process removed it as an orphan before it was locked


def remove_orphans(folder: Path) -> None:
    """Removes the unfinished files of killed runs in a folder: those that no process has locked and, of other machines,
    those that are a day old. On a disk without locks nothing is removed."""
    for path in folder.iterdir():
        match = UNFINISHED.fullmatch(path.name)
        if match is None:
            continue
        with suppress(OSError):  # another process has just removed or finished it, or it is not ours
            if match["host"] != HOST and time.time() - path.stat().st_mtime < DAY:
                continue
            lock = os.open(path, os.O_RDONLY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _remove(path)
            finally:
                os.close(lock)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
