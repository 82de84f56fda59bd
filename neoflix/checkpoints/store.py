"""What a run owns in its folder, by its own list. Only files on that list are ever replaced or deleted.

`run_files.json` holds the run's id and, for each file of the model at the top of the folder, the checksum of what the
run wrote. A file that has another name or another content is the user's. Folders that come and go carry the id in
their names (`checkpoint-8.3f9a1c2b.part`), and a checkpoint carries it in its manifest.
"""

import json
import os
import re
import shutil
from pathlib import Path

from neoflix.checkpoints.find import (
    find_misplaced,
    list_checkpoints,
    list_model_files,
)
from neoflix.checkpoints.manifest import find_corruption, read_manifest
from neoflix.checkpoints.names import (
    LIST_FILE,
    RECORD_FILES,
    UNIVERSAL,
)
from neoflix.runtime.console import say
from neoflix.runtime.errors import UserError
from neoflix.runtime.files import free_bytes, hash_file, share_as_asked, sync_folder, write_json


def check_space(run: Path, needed: int, what: str) -> None:
    """UserError unless `needed` bytes are free for the run."""
    free = free_bytes(run)
    if free < needed:
        raise UserError(
            f"{run}: {what} {needed / 2**30:.1f} GiB of disk, {free / 2**30:.1f} GiB are free; make room, lower "
            "--save_total_limit, or choose another --output_dir"
        )


def read_list(run: Path) -> dict | None:
    """The run's id and its files, `{"id": ..., "files": {name: [checksums]}}`; None where the folder has no list."""
    try:
        owned = json.loads((run / LIST_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    is_list = isinstance(owned, dict) and isinstance(owned.get("files"), dict)
    return owned if is_list and re.fullmatch(r"[0-9a-f]{8}", str(owned.get("id"))) else None


def _is_unchanged(path: Path, checksums: list[str]) -> bool:
    return path.is_file() and hash_file(path)["xxh3_128"] in checksums


def temporary(run: Path, name: str, suffix: str) -> Path:
    """Where the run keeps `name` while it is being written (`.part`), deleted (`.old`) or converted (`.universal`)."""
    owned = read_list(run)
    assert owned is not None, f"{run} was not claimed"
    return run / f"{name}.{owned['id']}{suffix}"


def is_own(checkpoint: Path, run: Path) -> bool:
    """Whether this run wrote a `checkpoint-N`: not plain Trainer's, not a copy under another number, not another
    run's. (Manifests of older versions name no run.)"""
    manifest, owned = read_manifest(checkpoint), read_list(run)
    if manifest is None or find_misplaced(checkpoint):
        return False
    return owned is None or manifest.get("run", owned["id"]) == owned["id"]


def recover_interrupted(run: Path) -> None:
    """Clears away what an interrupted save or deletion of this run left."""
    owner = read_list(run)["id"]
    for path in sorted(run.iterdir()):
        name, _, rest = path.name.partition(f".{owner}.")
        if rest == "part" and re.fullmatch(r"checkpoint-\d+", name) and find_corruption(path) is None:
            commit(path)
        elif rest in ("part", "old", UNIVERSAL[1:]):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        elif _is_torn_record(path.name):
            path.unlink()
        elif re.fullmatch(rf"checkpoint-\d+\.(part|old|{UNIVERSAL[1:]})", path.name):
            say(f"{path}: not known to be this run's, left alone; delete it if you do not need it")


def _is_torn_record(name: str) -> bool:
    """Whether a file is what a kill in the middle of `manifest.write_text` left of one of the run's records."""
    records = "|".join(map(re.escape, RECORD_FILES))
    return re.fullmatch(rf"({records})\.[0-9a-f]{{32}}\.part", name) is not None


def commit(unfinished: Path) -> None:
    """`checkpoint-N.ID.part`, complete, becomes `checkpoint-N`, in the place of the run's own one of that name. One
    that is not the run's is kept, under another name."""
    run = unfinished.parent
    checkpoint = run / unfinished.name.split(".")[0]
    if os.path.lexists(checkpoint):
        if is_own(checkpoint, run):
            delete(checkpoint)
        else:
            set_aside(checkpoint)
    unfinished.rename(checkpoint)
    sync_folder(run)


def delete(checkpoint: Path) -> None:
    """Deletes a checkpoint of the run; if that is interrupted, nothing is left under its name."""
    doomed = temporary(checkpoint.parent, checkpoint.name, ".old")
    checkpoint.rename(doomed)
    shutil.rmtree(doomed)


def prune(run: Path, limit: int | None, best_step: int | None) -> None:
    """Deletes the run's oldest complete checkpoints beyond `limit`, never the newest complete nor the best one.

    Damaged ones count for nothing and stay: only complete ones make room for complete ones.
    """
    checkpoints = [path for path in list_checkpoints(run) if is_own(path, run)]
    kept = {path for path in checkpoints if path.name == f"checkpoint-{best_step}"} | set(checkpoints[-1:])
    surplus = len(checkpoints) - max(limit or len(checkpoints), len(kept))
    for checkpoint in [path for path in checkpoints if path not in kept][: max(surplus, 0)]:
        delete(checkpoint)


def set_aside(path: Path) -> None:
    """Gives what is in the run's way, and is not the run's, another name, and says so."""
    number, kept = 1, path.with_name(f"{path.name}.kept")
    while os.path.lexists(kept):
        number += 1
        kept = path.with_name(f"{path.name}.kept-{number}")
    path.rename(kept)
    say(f"{path} was not written by this run: it is kept as {kept.name}")


def export_best(checkpoint: Path, run: Path) -> None:
    """Puts a checkpoint's model, tokenizer and generation settings at the top of the run's folder.

    Each file takes the place of its predecessor in one step, and the list names both before the first one does: an
    interrupted call is finished by the next one. Files are hard links where the file system has them.
    """
    owned, entries = read_list(run), (read_manifest(checkpoint) or {"files": {}})["files"]
    sources = {path.name: path for path in list_model_files(checkpoint)}
    share_as_asked(sources.values())
    checksums = {name: (entries.get(name) or hash_file(path))["xxh3_128"] for name, path in sources.items()}
    before = owned["files"]
    both = {name: [*before.get(name, []), checksum] for name, checksum in checksums.items()}
    write_json(run / LIST_FILE, {**owned, "files": {**before, **both}})
    for name, source in sources.items():
        target = run / name
        if os.path.lexists(target) and not _is_unchanged(target, both[name]):
            set_aside(target)
        unfinished = temporary(run, name, ".part")
        link_or_copy(source, unfinished)
        unfinished.replace(target)
        unfinished.unlink(missing_ok=True)  # `replace` leaves it where both were one file already
    for name in before.keys() - sources.keys():
        if _is_unchanged(run / name, before[name]):
            (run / name).unlink()
    sync_folder(run)
    write_json(run / LIST_FILE, {**owned, "files": {name: [checksum] for name, checksum in checksums.items()}})


def link_or_copy(source: Path, target: Path) -> None:
    """`target`, which must not exist, as a hard link to `source` or, where the file system has none, a copy."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
