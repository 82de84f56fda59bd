"""Opens a run's folder for one run at a time."""

import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from neoflix.checkpoints.names import LIST_FILE, LOCK_FILE
from neoflix.checkpoints.ownership import adopt, read_list
from neoflix.checkpoints.storage import recover_interrupted
from neoflix.runtime.errors import UserError
from neoflix.runtime.files import write_json
from neoflix.runtime.locks import Lock, acquire

_locks: dict[Path, Lock] = {}  # of the folders that this process holds, in the main process alone


@contextmanager
def open_run_folder(output_dir: str) -> Iterator[None]:
    """Reserves a run's folder for this run until the context ends. Call `check_output_dir` before. Collective.

    UserError, in every process, where another run works there.
    """
    from neoflix.runtime.processes import run_on_main_process, wait_for_others  # imports torch, unlike `--plan`

    run = Path(output_dir)
    is_new = not run.exists()
    wait_for_others()  # they read their flags and check the folder, as it was before this run writes there
    run_on_main_process(_lock, run)
    try:
        run_on_main_process(claim, output_dir)
        yield
    finally:
        if lock := _locks.pop(run, None):
            lock.release()
            if is_new and {path.name for path in run.iterdir()} == {LIST_FILE}:  # the start failed
                shutil.rmtree(run)


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
    """UserError where another run has taken over the folder, which can happen while this one is suspended for
    minutes."""
    if run in _locks and not _locks[run].is_held():
        raise UserError(f"{run}: another run has taken over the folder while this one was suspended; nothing was saved")


def claim(output_dir: str) -> None:
    """Creates a run's folder and its list of files where they are missing, and removes what an interrupted save of the
    run left there."""
    run = Path(output_dir)
    run.mkdir(parents=True, exist_ok=True)
    if read_list(run) is None:
        write_json(run / LIST_FILE, {"id": uuid.uuid4().hex[:8], "files": adopt(run)})
    recover_interrupted(run)
