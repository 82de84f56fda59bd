"""Where an export is written: checks before, and files that appear complete or not at all."""

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from neoflix.runtime.console import GIB
from neoflix.runtime.errors import UserError
from neoflix.runtime.files import apply_umask, free_bytes, sync_folder


def check_target(target: Path) -> None:
    """Raises UserError unless `target` is new or an empty folder."""
    if target.exists() and not target.is_dir():
        raise UserError(f"OUT {target}: is a file; name a folder")
    if target.is_dir() and any(target.iterdir()):
        raise UserError(f"OUT {target}: exists already and is not empty; choose another name or delete it")


def check_room(num_bytes: int, folder: Path) -> None:
    """Raises UserError unless so many bytes are free on the disk of `folder`."""
    free = free_bytes(folder)
    if free < num_bytes:
        raise UserError(f"OUT: the weights need {num_bytes / GIB:.1f} GiB of disk space, {free / GIB:.1f} GiB are free")


@contextmanager
def appearing_whole(target: Path) -> Iterator[Path]:
    """Yields a folder to write to, which becomes `target` at the end, or is deleted after an error.

    Raises:
        UserError: if the disk is full or cannot be written.
    """
    with _unfinished_folder(target) as unfinished:
        yield unfinished
        _sync(unfinished)
        unfinished.rename(target)
        sync_folder(target.absolute().parent)


@contextmanager
def files_appearing_whole(*targets: Path) -> Iterator[Path]:
    """Yields a folder to write files to. At the end, those with the names of `targets`, which are in one folder, are
    moved there in this order; after an error they are deleted.

    Raises:
        UserError: if the disk is full or cannot be written.
    """
    with _unfinished_folder(targets[-1]) as unfinished:
        yield unfinished
        _sync(unfinished)
        for target in targets:
            (unfinished / target.name).rename(target)
        sync_folder(targets[-1].absolute().parent)


@contextmanager
def _unfinished_folder(target: Path) -> Iterator[Path]:
    """Yields a new folder beside `target`, which is deleted at the end if it is still there."""
    unfinished = target.with_name(f"{target.name}.{uuid.uuid4().hex}.part")
    try:
        unfinished.mkdir(parents=True)
        yield unfinished
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"OUT {target}: cannot be written ({reason})") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _sync(folder: Path) -> None:
    """Gives the files in a folder the umask's permissions, and writes them to the disk itself."""
    apply_umask(folder.rglob("*"))
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    sync_folder(folder)
