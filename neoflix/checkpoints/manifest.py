"""A folder's manifest, written last: it names every file with size and checksum, so that a folder is complete or not.

The checksums (XXH3, 128 bits) find damage by a full disk, a crash or a bad cable. They are not a signature: whoever can
write to the folder can write a manifest too.
"""

import json
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from neoflix.runtime.files import (
    HashedFile,
    apply_umask,
    hash_file,
    sync_folder,
    write_json,
)

MANIFEST = "manifest.json"


class Files:
    """The files that this process writes to a checkpoint: their manifest entries, and the first error.

    A failed write is remembered and not raised, because the other processes wait in the barriers of the same save and
    would hang. The caller reads `error` at the end.
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
        """Writes a file by `torch.save` and hashes it. DeepSpeed calls this instead of its own writer.

        The archive's own checksums, which `torch.load` never reads, are left out: they take longer than ours
        (0.8 GB: 0.96 s with them alone, 0.68 s with ours alone; 2 CPU cores).
        """
        import torch  # here, because `--plan` reads manifests without it

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


def write_manifest(folder: Path, facts: dict, entries: dict[str, dict]) -> None:
    """Completes a folder: syncs every file under it to disk and names it in the manifest.

    Args:
        facts: further content of the manifest, such as the step and the number of processes.
        entries: of the files that were hashed as they were written, by path in the folder. All others are read now.
    """
    apply_umask([folder, *folder.rglob("*")])
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    names = {str(path.relative_to(folder)): path for path in paths}
    with ThreadPoolExecutor(4) as pool:
        unknown = [name for name in names if name not in entries]
        read = dict(zip(unknown, pool.map(lambda name: hash_file(names[name], sync=True), unknown), strict=True))
    manifest = facts | {"files": {name: entries.get(name) or read[name] for name in names}}
    write_json(folder / MANIFEST, manifest)
    for inner in [path for path in folder.rglob("*") if path.is_dir()] + [folder]:
        sync_folder(inner)


def read_manifest(folder: Path) -> dict | None:
    """A folder's manifest; None where it is missing or cannot be read."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return manifest if isinstance(manifest, dict) and isinstance(manifest.get("files"), dict) else None


def find_corruption(folder: Path, checksums: bool = False) -> str | None:
    """Why a folder is not complete, in a few words; None where it is.

    Args:
        checksums: read every file and not only its size, which for a 2.7B checkpoint means 42 GB.
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
