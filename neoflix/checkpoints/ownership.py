"""What a run owns in its folder, by its own list. Only files on that list are replaced or deleted.

`run_files.json` holds the run's id and, for each file of the model at the top of the folder, the checksum of what the
run wrote. A file with another name or another content is the user's. Temporary folders carry the id in their names
(`checkpoint-8.3f9a1c2b.part`), and a checkpoint carries it in its manifest.
"""

import json
import re
from pathlib import Path

from neoflix.checkpoints.find import find_misplaced, list_checkpoints
from neoflix.checkpoints.manifest import read_manifest
from neoflix.checkpoints.names import LIST_FILE, OLDER_NAMES, RESULTS_FILE, TRAINING_FILES
from neoflix.checkpoints.runs import read_run
from neoflix.runtime.files import hash_file


def read_list(run: Path) -> dict | None:
    """The run's id and its files, `{"id": ..., "files": {name: [checksums]}}`; None where the folder has no list."""
    try:
        owned = json.loads((run / LIST_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    is_list = isinstance(owned, dict) and isinstance(owned.get("files"), dict)
    return owned if is_list and re.fullmatch(r"[0-9a-f]{8}", str(owned.get("id"))) else None


def is_unchanged(path: Path, checksums: list[str]) -> bool:
    """Whether a file still has one of the checksums that the run's list has for it."""
    return path.is_file() and hash_file(path)["xxh3_128"] in checksums


def temporary(run: Path, name: str, suffix: str) -> Path:
    """The path of `name` while it is written (`.part`), deleted (`.old`) or converted (`.universal`)."""
    owned = read_list(run)
    assert owned is not None, f"{run} was not claimed"
    return run / f"{name}.{owned['id']}{suffix}"


def is_own(checkpoint: Path, run: Path) -> bool:
    """Whether this run wrote a `checkpoint-N`, and not plain Trainer or another run; a copy under another number is not
    its own. (Manifests of older versions name no run.)"""
    manifest, owned = read_manifest(checkpoint), read_list(run)
    if manifest is None or find_misplaced(checkpoint):
        return False
    return owned is None or manifest.get("run", owned["id"]) == owned["id"]


def adopt(run: Path) -> dict[str, list[str]]:
    """The files of a run begun by a version without lists, as far as they are certainly its own: a finished run wrote
    nothing after its results, and an unfinished one has copied its model from one of its checkpoints."""
    if not is_older_run(run):
        return {}
    results, adopted = run / RESULTS_FILE, {}
    manifests = [read_manifest(checkpoint)["files"] for checkpoint in list_checkpoints(run)]
    for path in sorted(path for path in run.iterdir() if path.is_file()):
        is_result = path.name in OLDER_NAMES and results.is_file() and path.stat().st_mtime <= results.stat().st_mtime
        entries = [files[path.name] for files in manifests if path.name in files]
        if (is_result or entries) and path.name not in TRAINING_FILES:
            entry = hash_file(path)
            if is_result or entry in entries:
                adopted[path.name] = [entry["xxh3_128"]]
    return adopted


def is_older_run(run: Path) -> bool:
    """Whether a folder without a list holds a run of an older version."""
    try:
        facts = read_run(run)
    except ValueError:  # another program's
        return False
    return isinstance(facts, dict) and {"model", "architecture", "tokenizer", "data"} <= facts.keys()
