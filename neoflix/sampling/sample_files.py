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
from neoflix.runtime.console import printable, progress
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


def open_output(args, model_dir: Path, prompts: list[str] | list[dict]) -> "SampleFile | Screen":
    """Where `generate.py`'s arguments want the samples. Errors as `SampleFile`."""
    if not args.output:
        return Screen(is_streamed=args.stream)
    settings = {name: value for name, value in args.sampling.items() if name != "batch_size"}
    job = describe_job(model_dir, prompts, num_samples=args.num_samples, novel=args.novel, int8=args.int8, **settings)
    return SampleFile(args.output, job, len(prompts) * args.num_samples, quiet=args.stream)


class Screen:
    """Prints samples, unless they are streamed already."""

    num_done = 0

    def __init__(self, is_streamed: bool):
        self.is_streamed = is_streamed

    def write(self, samples: Iterable) -> list[dict]:
        """Prints the samples as they come, and returns them as rows of a file."""
        rows = []
        for number, sample in enumerate(samples, start=1):
            if not self.is_streamed:
                print(f"{number:>3}. {' '.join(printable(sample.whole).split())}", flush=True)
            rows.append(sample.to_dict())
        return rows


class SampleFile:
    """A file that one job writes. `num_done` is the number of samples that the file had when it was opened.

    Args:
        job: what the file is to hold (`describe_job`).
        num_samples: how many samples it holds when it is finished.
        quiet: no progress bar.

    Raises:
        UserError: if the file belongs to another job, is finished, cannot be written, or is in use by another process.
    """

    def __init__(self, path: str, job: dict, num_samples: int, quiet: bool = False):
        self.path, self.job, self.num_samples, self.quiet = path, job, num_samples, quiet
        with self._locked():
            self.num_done, _ = self._read_done()

    def write(self, samples: Iterable) -> list[dict]:
        """Writes the samples after the first `num_done`, as they come, and returns them as rows."""
        return [sample.to_dict() for sample in self.append(samples)]

    def append(self, samples: Iterable) -> Iterator:
        """Writes each sample to the file as it comes, and yields it. Removes an unfinished last line first.

        Args:
            samples: those after the first `num_done`.
        """
        with self._locked():
            num_done, num_bytes = self._read_done()
            if num_done != self.num_done:
                raise UserError(f"--output {self.path}: another process has written to it; run the command again")
            note = Path(f"{self.path}.job")
            bar = {"total": self.num_samples, "initial": num_done, "desc": "Sampling", "unit": "text"}
            try:
                exists = Path(self.path).exists()
                write_json(note, self.job)
                with open(self.path, "r+b" if exists else "xb") as output:
                    output.truncate(num_bytes)
                    output.seek(num_bytes)
                    for sample in progress(samples, disable=self.quiet, **bar):
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
    if not isinstance(job, dict) or not {"model", "prompts"} <= job.keys():
        return None
    return {"int8": False} | job  # files of earlier releases do not name it
