"""What a run writes, replaces and deletes in its folder: checkpoints, and the model at the top."""

import os
import re
import shutil
from pathlib import Path

from neoflix.checkpoints.find import list_checkpoints, list_model_files
from neoflix.checkpoints.manifest import find_corruption, read_manifest
from neoflix.checkpoints.names import LIST_FILE, RECORD_FILES, UNIVERSAL
from neoflix.checkpoints.ownership import is_own, is_unchanged, read_list, temporary
from neoflix.runtime.console import say
from neoflix.runtime.errors import UserError
from neoflix.runtime.files import apply_umask, free_bytes, hash_file, sync_folder, write_json


def check_space(run: Path, needed: int, what: str) -> None:
    """UserError unless `needed` bytes are free in the run's folder.

    Args:
        what: begins the message, before the number of GiB.
    """
    free = free_bytes(run)
    if free < needed:
        raise UserError(
            f"{run}: {what} {needed / 2**30:.1f} GiB of disk, {free / 2**30:.1f} GiB are free; make room, lower "
            "--save_total_limit, or choose another --output_dir"
        )


def recover_interrupted(run: Path) -> None:
    """Removes what an interrupted save or deletion of this run left; completes a save that was only not renamed."""
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
            say(f"{path}: may not be this run's and is left as it is; delete it if you do not need it")


def _is_torn_record(name: str) -> bool:
    """Whether a file is what a process killed within `write_text` left of one of the run's records."""
    records = "|".join(map(re.escape, RECORD_FILES))
    return re.fullmatch(rf"({records})\.[0-9a-f]{{32}}\.part", name) is not None


def commit(unfinished: Path) -> None:
    """Renames a complete `checkpoint-N.ID.part` to `checkpoint-N`.

    It replaces the run's own checkpoint of that name. Any other folder of that name is renamed and kept.
    """
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
    """Deletes a checkpoint of the run. An interrupted deletion leaves nothing under its name."""
    doomed = temporary(checkpoint.parent, checkpoint.name, ".old")
    checkpoint.rename(doomed)
    shutil.rmtree(doomed)


def prune(run: Path, limit: int | None, best_step: int | None) -> None:
    """Deletes the run's oldest complete checkpoints beyond `limit`, but neither the newest nor the best one.

    Damaged checkpoints are neither counted nor deleted.
    """
    checkpoints = [path for path in list_checkpoints(run) if is_own(path, run)]
    kept = {path for path in checkpoints if path.name == f"checkpoint-{best_step}"} | set(checkpoints[-1:])
    surplus = len(checkpoints) - max(limit or len(checkpoints), len(kept))
    for checkpoint in [path for path in checkpoints if path not in kept][: max(surplus, 0)]:
        delete(checkpoint)


def set_aside(path: Path) -> None:
    """Renames a file or folder that is in the way but not the run's own, and reports it."""
    number, kept = 1, path.with_name(f"{path.name}.kept")
    while os.path.lexists(kept):
        number += 1
        kept = path.with_name(f"{path.name}.kept-{number}")
    path.rename(kept)
    say(f"{path} was not written by this run and is kept as {kept.name}")


def export_best(checkpoint: Path, run: Path) -> None:
    """Puts a checkpoint's model, tokenizer and generation settings at the top of the run's folder.

    Each file replaces its predecessor atomically, and the list names both before the first is replaced, so that the
    next call completes an interrupted one. Files are hard links where the file system has them.
    """
    owned, entries = read_list(run), (read_manifest(checkpoint) or {"files": {}})["files"]
    sources = {path.name: path for path in list_model_files(checkpoint)}
    apply_umask(sources.values())
    checksums = {name: (entries.get(name) or hash_file(path))["xxh3_128"] for name, path in sources.items()}
    before = owned["files"]
    both = {name: [*before.get(name, []), checksum] for name, checksum in checksums.items()}
    write_json(run / LIST_FILE, {**owned, "files": {**before, **both}})
    for name, source in sources.items():
        target = run / name
        if os.path.lexists(target) and not is_unchanged(target, both[name]):
            set_aside(target)
        unfinished = temporary(run, name, ".part")
        link_or_copy(source, unfinished)
        unfinished.replace(target)
        unfinished.unlink(missing_ok=True)  # `replace` leaves it where both were one file already
    for name in before.keys() - sources.keys():
        if is_unchanged(run / name, before[name]):
            (run / name).unlink()
    sync_folder(run)
    write_json(run / LIST_FILE, {**owned, "files": {name: [checksum] for name, checksum in checksums.items()}})


def link_or_copy(source: Path, target: Path) -> None:
    """Makes `target`, which must not exist, a hard link to `source`, or a copy where the file system has no links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
