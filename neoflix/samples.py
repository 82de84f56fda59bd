"""Files of samples: one JSON object a line, written as texts are done, and gone on with after an interruption.

Beside a file that is not finished lies NAME.job, which says what the file is to hold. Only the same job goes on with
it, from the first text that is not there whole; a file without one is finished, or somebody else's, and is left alone.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from neoflix.console import progress
from neoflix.errors import UserError
from neoflix.manifest import write_json


def describe_job(model_dir: Path, prompts: list[str] | list[dict], **settings) -> dict:
    """What decides over every text of a file: the model's files, the prompts, the seed and the sampling settings."""
    files = sorted(path for path in model_dir.iterdir() if path.suffix in (".safetensors", ".bin", ".json"))
    model = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return {
        "model": hashlib.sha256(repr(model).encode()).hexdigest()[:16],
        "prompts": hashlib.sha256(json.dumps(prompts).encode()).hexdigest()[:16],
        **settings,
    }


def find_done(path: str, job: dict) -> int:
    """How many texts of this job the file at `path` has already; what a kill left of one more is cut off.

    UserError where the file is another job's, or finished.
    """
    file, note = Path(path), Path(f"{path}.job")
    if not file.exists():
        return 0
    if not note.is_file():
        raise UserError(f"--output {path}: exists already; choose another name or delete it")
    before = json.loads(note.read_text(encoding="utf-8"))
    for key in job:
        if before.get(key) != job[key]:
            was = "" if key in ("model", "prompts") else f" ({before.get(key)}, now {job[key]})"
            raise UserError(
                f"--output {path}: was begun with other {key}{was}; go on as it was begun, choose another name, or "
                "delete it"
            )
    written = file.read_bytes()
    whole = written[: written.rfind(b"\n") + 1]
    with open(file, "rb+") as handle:
        handle.truncate(len(whole))
    return whole.count(b"\n")


def save_samples(samples: Iterable, path: str, job: dict, total: int, done: int, quiet: bool = False) -> Iterator:
    """Appends each sample to the file as it comes, and hands it on.

    Args:
        done: texts that the file has already (`find_done`).
        quiet: no progress bar.
    """
    note = Path(f"{path}.job")
    try:
        write_json(note, job)
        with open(path, "a" if done else "w", encoding="utf-8") as output:
            for sample in progress(samples, total=total, initial=done, desc="Sampling", unit="text", disable=quiet):
                output.write(json.dumps(sample.to_dict(), ensure_ascii=False) + "\n")
                output.flush()
                yield sample
        note.unlink()
    except OSError as error:
        raise UserError(f"--output {path}: cannot be written ({error.strerror})") from error
