"""Complete or not: a folder counts when its manifest, written last, names every file with size and checksum. A leaf.

The checksums (XXH3, 128 bits) find what a full disk, a crash or a bad cable did. They are no signature: whoever can
write into the folder can write a manifest too.
"""

import json
import math
import os
import re
import shutil
import stat
import uuid
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import xxhash
from safetensors import SafetensorError

MANIFEST = "manifest.json"
BLOCK = 1 << 20  # bytes hashed and written at a time: still in the processor's cache for the second of the two


class HashedFile:
    """A new file, hashed as it is written, and on the disk itself (fsync) once `close` returns."""

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


class Files:
    """What this process writes of a checkpoint: an entry for each file, and what went wrong.

    A failed write is remembered, not raised: the other processes wait in the same save's barriers, and one that
    left would hang them. Who saved asks for `error` at the end.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.entries: dict[str, dict] = {}
        self.error: str | None = None

    @contextmanager
    def remembering_errors(self):
        try:
            yield
        except OSError as error:
            self.error = self.error or error.strerror or str(error)
        except SafetensorError as error:
            self.error = self.error or str(error)
        except RuntimeError as error:
            if "inline_container" not in str(error):  # the file of torch.save that fails when a write fails
                raise
            self.error = self.error or "PyTorch's writer failed: the disk is full or gone"

    def save(self, state_dict, path: str | Path) -> None:
        """`torch.save`, hashed; called by DeepSpeed, in the place of its own writer.

        The archive's own checksums, which `torch.load` never looks at, are left out: they take longer than ours
        (0.8 GB: 0.96 s with them alone, 0.68 s with ours alone; 2 CPU cores).
        """
        import torch  # here, because `--plan` reads manifests in a fraction of the time that torch takes to load

        with self.remembering_errors():
            file = HashedFile(path)
            torch.serialization.set_crc32_options(False)
            try:
                torch.save(state_dict, file)
            except RuntimeError as error:  # what torch makes of an OSError in the middle of its archive
                raise _os_error_behind(error) from error
            finally:
                torch.serialization.set_crc32_options(True)
                file.close()
            self.entries[str(Path(path).relative_to(self.folder))] = file.entry()


def _os_error_behind(error: BaseException) -> BaseException:
    """The OSError that another error was raised from, else the error itself."""
    cause = error
    while cause is not None:
        if isinstance(cause, OSError):
            return cause
        cause = cause.__cause__ or cause.__context__
    return error


def hash_file(path: Path, sync: bool = False) -> dict:
    """The manifest's entry for a file that is there already."""
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
    """The names in a folder, on the disk itself."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def share_as_asked(paths: Iterable[Path]) -> None:
    """Gives files and folders the permissions that the user's umask allows; safetensors makes files that the user alone
    may read."""
    umask = int(re.search(r"^Umask:\s*(\d+)", Path("/proc/self/status").read_text(), re.MULTILINE)[1], 8)
    for path in paths:
        mode = stat.S_IMODE(path.stat().st_mode)
        asked = mode | (0o777 if path.is_dir() else 0o666) & ~umask
        if asked != mode:
            with suppress(PermissionError):  # another user's
                path.chmod(asked)


def write_manifest(folder: Path, facts: dict, entries: dict[str, dict]) -> None:
    """Makes a folder complete: every file under it on disk and named, with what `entries` does not know read now.

    Args:
        facts: what else a reader should know before any other file is opened (step, number of processes).
        entries: of the files that were hashed as they were written, by path in the folder.
    """
    share_as_asked([folder, *folder.rglob("*")])
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    names = {str(path.relative_to(folder)): path for path in paths}
    with ThreadPoolExecutor(4) as pool:
        unknown = [name for name in names if name not in entries]
        read = dict(zip(unknown, pool.map(lambda name: hash_file(names[name], sync=True), unknown), strict=True))
    manifest = facts | {"files": {name: entries.get(name) or read[name] for name in names}}
    write_json(folder / MANIFEST, manifest)
    for inner in [path for path in folder.rglob("*") if path.is_dir()] + [folder]:
        sync_folder(inner)


def write_json(path: Path, content: dict | list) -> None:
    """All of it or nothing, and on the disk itself. NaN and infinity, which JSON does not have, become null."""
    write_text(path, json.dumps(_without_nan(content), indent=2, allow_nan=False) + "\n")


def _without_nan(content):
    if isinstance(content, dict):
        return {key: _without_nan(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_without_nan(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def write_text(path: Path, content: str) -> None:
    """All of it or nothing, and on the disk itself."""
    unfinished = path.with_name(f"{path.name}.{uuid.uuid4().hex}.part")  # a name that nobody else's file has
    try:
        with unfinished.open("x", encoding="utf-8") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
    sync_folder(path.parent)


def read_manifest(folder: Path) -> dict | None:
    """The manifest, or None where there is none that can be read."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return manifest if isinstance(manifest, dict) and isinstance(manifest.get("files"), dict) else None


def find_damage(folder: Path, checksums: bool = False) -> str | None:
    """Why a folder is not complete, in a few words; None where it is.

    Args:
        checksums: read every file, not only its size: a 2.7B checkpoint takes as long as reading its 42 GB.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        return f"it has no {MANIFEST}: its save was interrupted"
    for name, entry in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != entry["bytes"]:
            return f"{name} has {path.stat().st_size:,} bytes, not {entry['bytes']:,}"
    if checksums:
        names = list(manifest["files"])
        with ThreadPoolExecutor(4) as pool:
            for name, entry in zip(names, pool.map(lambda name: hash_file(folder / name), names), strict=True):
                if entry != manifest["files"][name]:
                    return f"{name} does not match its checksum"
    return None


def num_bytes(folder: Path) -> int:
    """Size of a complete folder's files, by its manifest."""
    return sum(entry["bytes"] for entry in (read_manifest(folder) or {"files": {}})["files"].values())


def free_bytes(folder: Path) -> int:
    """Free disk space for a folder that may not exist yet."""
    while not folder.exists():
        folder = folder.absolute().parent
    return shutil.disk_usage(folder).free
