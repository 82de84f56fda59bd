"""Files of samples: one JSON object per line, written as texts are finished, and resumed after an interruption.

Next to an unfinished file lies NAME.job, which describes the file's content. Only the same job resumes the file, after
its last whole line. A file without NAME.job is finished, or not ours, and is not touched.
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
    """Everything that the texts of a file depend on: the model's files, the prompts, and the settings."""
    files = [(path.name, path.stat()) for path in list_loaded_files(model_dir)]
    model = [(name, facts.st_size, facts.st_mtime_ns) for name, facts in files]
    return {
        "model": hashlib.sha256(repr(model).encode()).hexdigest()[:16],
        "prompts": hashlib.sha256(json.dumps(prompts).encode()).hexdigest()[:16],
        **settings,
    }


def open_sample_file(args, model_dir: Path, prompts: list[str] | list[dict]) -> "SampleFile | None":
    """The file that `generate.py`'s arguments name; None if they name none. Errors as `SampleFile`."""
    if not args.output:
        return None
    settings = {name: value for name, value in args.sampling.items() if name != "batch_size"}
    job = describe_job(model_dir, prompts, num_samples=args.num_samples, novel=args.novel, **settings)
    return SampleFile(args.output, job, len(prompts) * args.num_samples)


class SampleFile:
    """A file that one job writes. `num_done` is the number of samples that the file had when it was opened.

    Args:
        job: what the file is to hold (`describe_job`).
        num_samples: how many samples it holds when it is finished.

    Raises:
        UserError: if the file belongs to another job, is finished, cannot be written, or is in use by another process.
    """

    def __init__(self, path: str, job: dict, num_samples: int):
        self.path, self.job, self.num_samples = path, job, num_samples
        with self._locked():
            self.num_done, _ = self._read_done()

    def append(self, samples: Iterable, quiet: bool = False) -> Iterator:
        """Writes each sample to the file as it comes, and yields it. Removes an unfinished last line first.

        Args:
            samples: those after the first `num_done`.
            quiet: no progress bar.
        """
        with self._locked():
            num_done, num_bytes = self._read_done()
            if num_done != self.num_done:
                raise UserError(f"--output {self.path}: another process has written to it; run the command again")
            note = Path(f"{self.path}.job")
            bar = {"total": self.num_samples, "initial": num_done, "desc": "Sampling", "unit": "text", "disable": quiet}
            try:
                exists = Path(self.path).exists()
                write_json(note, self.job)
                with open(self.path, "r+b" if exists else "xb") as output:
                    output.truncate(num_bytes)
                    output.seek(num_bytes)
                    for sample in progress(samples, **bar):
                        output.write(json.dumps(sample.to_dict(), ensure_ascii=False).encode() + b"\n")
                        output.flush()
                        yield sample
                note.unlink()
            except OSError as error:
                raise self._cannot_write(error) from error

    def _read_done(self) -> tuple[int, int]:
        """(number of whole lines, their bytes). Raises UserError if the file is not this job's."""
        file, note = Path(self.path), Path(f"{self.path}.job")
        before = _read_note(note) if note.exists() else None
        if note.exists() and before is None:
            raise UserError(
                f"--output {self.path}: {note} is not a file of this program; choose another name or move it away"
            )
        if not file.exists():
            return 0, 0
        if before is None:
            raise UserError(f"--output {self.path}: exists already; choose another name or delete it")
        for key in self.job:
            if before.get(key) != self.job[key]:
                was = "" if key in ("model", "prompts") else f" ({before.get(key)}, now {self.job[key]})"
                raise UserError(
                    f"--output {self.path}: was started with other {key}{was}; use the same one, choose another "
                    "name, or delete the file"
                )
        written = file.read_bytes()
        whole = written[: written.rfind(b"\n") + 1]
        return whole.count(b"\n"), len(whole)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        in_use = "another process is writing it ({owner}); wait until it ends, or choose another name"
        try:
            lock = acquire(Path(f"{self.path}.lock"), f"--output {self.path}: {in_use}")
        except OSError as error:
            raise self._cannot_write(error) from error
        try:
            yield
        finally:
            lock.release()

    def _cannot_write(self, error: OSError) -> UserError:
        return UserError(f"--output {self.path}: cannot be written ({error.strerror})")


def _read_note(note: Path) -> dict | None:
    """The job in NAME.job; None if `SampleFile` did not write it."""
    try:
        job = json.loads(note.read_text(encoding="utf-8"))
    except ValueError:
        return None
    return job if isinstance(job, dict) and {"model", "prompts"} <= job.keys() else None
