"""One run at a time in a folder: its lock, its list of files, and folders of older versions."""

import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from neoflix.checkpoints.find import list_checkpoints
from neoflix.checkpoints.manifest import read_manifest
from neoflix.checkpoints.names import LIST_FILE, LOCK_FILE, OLDER_NAMES, RESULTS_FILE, TRAINING_FILES
from neoflix.checkpoints.runs import read_run
from neoflix.checkpoints.store import read_list, recover_interrupted
from neoflix.runtime.errors import UserError
from neoflix.runtime.files import hash_file, write_json
from neoflix.runtime.locks import Lock, acquire


@contextmanager
def opened(output_dir: str) -> Iterator[None]:
    """A run's folder, which is this run's alone until the context ends. Collective; comes after `check_output_dir`.
    UserError, in every process, where another run works there."""
    from neoflix.runtime.processes import run_on_main_process  # torch: `--plan` looks at folders without it

    run = Path(output_dir)
    is_new = not run.exists()
    run_on_main_process(_lock, run)
    try:
        run_on_main_process(claim, output_dir)
        yield
    finally:
        if lock := _locks.pop(run, None):
            lock.release()
            if is_new and {path.name for path in run.iterdir()} == {LIST_FILE}:  # it came to nothing
                shutil.rmtree(run)


_locks: dict[Path, Lock] = {}  # of the folders that this process holds: in the main process alone


def _lock(run: Path) -> None:
    sentence = (
        f"--output_dir {run}: another run works there ({{owner}}); wait until it ends, or choose another --output_dir"
    )
    try:
        run.mkdir(parents=True, exist_ok=True)
        _locks[run] = acquire(run / LOCK_FILE, sentence)
    except OSError as error:
        raise UserError(f"--output_dir {run}: cannot be written ({error.strerror})") from error


def check_held(run: Path) -> None:
    """UserError where another run has taken the folder over, which happens to one that was suspended for minutes."""
    if run in _locks and not _locks[run].is_held():
        raise UserError(f"{run}: another run has taken the folder over while this one was suspended; nothing was saved")


def claim(output_dir: str) -> None:
    """Makes a folder the run's: creates it and its list, and clears away what an interrupted save of the run left."""
    run = Path(output_dir)
    run.mkdir(parents=True, exist_ok=True)
    if read_list(run) is None:
        write_json(run / LIST_FILE, {"id": uuid.uuid4().hex[:8], "files": adopt(run)})
    recover_interrupted(run)


def adopt(run: Path) -> dict[str, list[str]]:
    """The files of a run that was begun before there were lists, by what is certain: it wrote nothing after its
    results, and an unfinished one had copied its model from one of its checkpoints."""
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
    """Whether a folder without a list holds a run of this project all the same."""
    try:
        facts = read_run(run)
    except ValueError:  # another program's
        return False
    return isinstance(facts, dict) and {"model", "architecture", "tokenizer", "data"} <= facts.keys()
