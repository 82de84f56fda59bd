"""Files of samples: one JSON object a line, written as texts are done, and gone on with after an interruption.

Beside a file that is not finished lies NAME.job, which says what the file is to hold. Only the same job goes on with
it, from the first text that is not there whole; a file without one is finished, or somebody else's, and is left alone.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from neoflix.model.folder import list_loaded_files
from neoflix.runtime.console import progress
from neoflix.runtime.errors import UserError
from neoflix.runtime.files import write_json
from neoflix.runtime.locks import acquire


def describe_job(model_dir: Path, prompts: list[str] | list[dict], **settings) -> dict:
    """What decides over every text of a file: the model's files, the prompts, the seed and the sampling settings."""
    files = [(path.name, path.stat()) for path in list_loaded_files(model_dir)]
    model = [(name, facts.st_size, facts.st_mtime_ns) for name, facts in files]
    return {
        "model": hashlib.sha256(repr(model).encode()).hexdigest()[:16],
        "prompts": hashlib.sha256(json.dumps(prompts).encode()).hexdigest()[:16],
        **settings,
    }


def find_done(path: str, job: dict) -> int:
    """How many texts of this job the file at `path` has already.

    UserError where the file is another job's, or finished, or another process is writing it.
    """
    with _locked(path):
        return _read_done(path, job)[0]


@contextmanager
def _locked(path: str) -> Iterator[None]:
    sentence = f"--output {path}: another process is writing it ({{owner}}); wait until it ends, or choose another name"
    try:
        lock = acquire(Path(f"{path}.lock"), sentence)
    except OSError as error:
        raise _cannot_write(path, error) from error
    try:
        yield
    finally:
        lock.release()


def _cannot_write(path: str, error: OSError) -> UserError:
    return UserError(f"--output {path}: cannot be written ({error.strerror})")


def _read_done(path: str, job: dict) -> tuple[int, int]:
    """(whole lines, their bytes) of a file that this job began. UserError where it is not this job's."""
    file, note = Path(path), Path(f"{path}.job")
    before = _read_note(note) if note.exists() else None
    if note.exists() and before is None:
        raise UserError(f"--output {path}: {note} is not a file of this program; choose another name or move it away")
    if not file.exists():
        return 0, 0
    if before is None:
        raise UserError(f"--output {path}: exists already; choose another name or delete it")
    for key in job:
        if before.get(key) != job[key]:
            was = "" if key in ("model", "prompts") else f" ({before.get(key)}, now {job[key]})"
            raise UserError(
                f"--output {path}: was begun with other {key}{was}; go on as it was begun, choose another name, or "
                "delete it"
            )
    written = file.read_bytes()
    whole = written[: written.rfind(b"\n") + 1]
    return whole.count(b"\n"), len(whole)


def _read_note(note: Path) -> dict | None:
    """What a file is to hold, or None where the note is not one that `save_samples` wrote."""
    try:
        job = json.loads(note.read_text(encoding="utf-8"))
    except ValueError:
        return None
    return job if isinstance(job, dict) and {"model", "prompts"} <= job.keys() else None


def save_samples(samples: Iterable, path: str, job: dict, total: int, done: int, quiet: bool = False) -> Iterator:
    """Appends each sample to the file as it comes, and hands it on. What a kill left of a line is cut off first.

    Args:
        done: texts that the file has already (`find_done`).
        quiet: no progress bar.
    """
    with _locked(path):
        num_texts, num_bytes = _read_done(path, job)
        if num_texts != done:
            raise UserError(f"--output {path}: another process has written to it meanwhile; run the command again")
        note = Path(f"{path}.job")
        try:
            is_begun = Path(path).exists()
            write_json(note, job)
            with open(path, "r+b" if is_begun else "xb") as output:
                output.truncate(num_bytes)
                output.seek(num_bytes)
                for sample in progress(samples, total=total, initial=done, desc="Sampling", unit="text", disable=quiet):
                    output.write(json.dumps(sample.to_dict(), ensure_ascii=False).encode() + b"\n")
                    output.flush()
                    yield sample
            note.unlink()
        except OSError as error:
            raise _cannot_write(path, error) from error
