"""What a run's folder records: how it was started, what it logged, and what it wrote."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from neoflix.checkpoints.find import list_checkpoints
from neoflix.checkpoints.names import RESULTS_FILE, STARTS_FILE, STATE_FILE
from neoflix.checkpoints.runs import read_run
from neoflix.reporting.run_log import read_live_samples
from neoflix.runtime.errors import UserError
from neoflix.runtime.files import read_json


@dataclass(frozen=True)
class Record:
    """The record of a run.

    Attributes:
        run: run.json.
        starts: starts.json, one entry per start, oldest first.
        state: the Trainer's own, with `log_history`.
        results: all_results.json; empty until the run is finished.
        samples: the texts of each evaluation.
    """

    folder: Path
    run: dict
    starts: list[dict]
    state: dict
    results: dict
    samples: list[dict]

    @classmethod
    def read(cls, folder: str | Path) -> "Record":
        """Reads the record of a run, finished or not.

        Raises:
            UserError: if the folder is not a run's, or if the run has no complete checkpoint yet.
        """
        folder = Path(folder)
        run = read_run(folder)
        if run is None:
            raise UserError(f"{folder}: not a run's folder (it has no run.json); name the --output_dir of a run")
        results = read_json(folder / RESULTS_FILE, {})
        state = read_json(folder / STATE_FILE, {})
        if not state and (checkpoints := list_checkpoints(folder)):
            state = read_json(checkpoints[-1] / STATE_FILE, {})
        if not state:
            raise UserError(f"{folder}: the run has no complete checkpoint yet; wait for the first one")
        return cls(folder, run, read_json(folder / STARTS_FILE, []), state, results, read_live_samples(folder))

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def start(self) -> dict:
        """The last start; empty if none was recorded."""
        return self.starts[-1] if self.starts else {}

    @property
    def num_steps(self) -> tuple[int, int]:
        """(steps so far, most steps)"""
        return self.state.get("global_step", 0), self.state.get("max_steps", 0)

    def curve(self, key: str) -> tuple[list[int], list[float]]:
        """(steps, values) of a figure in the log."""
        lines = [line for line in self.state.get("log_history", []) if isinstance(line.get(key), int | float)]
        return [line["step"] for line in lines], [line[key] for line in lines]

    def last(self, key: str) -> float | None:
        """The last value of a figure in the log."""
        return next(reversed(self.curve(key)[1]), None)

    @cached_property
    def evaluations(self) -> list[dict]:
        return [line for line in self.state.get("log_history", []) if "eval_loss" in line]

    @property
    def baseline(self) -> dict | None:
        """The evaluation of the model before the first step."""
        return next((line for line in self.evaluations if line["step"] == 0), None)

    @property
    def trained(self) -> list[dict]:
        """The evaluations after the first step."""
        return [line for line in self.evaluations if line["step"] > 0]

    @property
    def best(self) -> dict | None:
        """The evaluation of the model that the run saved as its best; of an unfinished run, the best one so far."""
        saved = [line for line in self.trained if line["step"] == self.results.get("saved_step")]
        if self.results:
            return saved[-1] if saved else None
        return min(self.trained, key=lambda line: line["eval_loss"], default=None)

    def before_and_after(self) -> list[tuple[str, str]]:
        """What the model wrote before the first step, and the best model from the same prompt and seed."""
        if self.best is None:
            return []
        steps = (0, self.best["step"])
        texts = [[row["text"] for row in self.samples if row["step"] == step] for step in steps]
        return list(zip(*texts, strict=False))

    @property
    def improved(self) -> bool:
        return bool(self.best and self.baseline and self.best["eval_loss"] < self.baseline["eval_loss"])


def file_sizes(folder: Path) -> list[tuple[str, int]]:
    """(name, bytes) of the files and folders in a run's folder. A file with several hard links, such as the best
    checkpoint's weights, is counted at its first place."""
    counted, sizes = set(), []
    for path in sorted(folder.iterdir(), key=lambda path: (path.is_dir(), path.name)):
        size = 0
        for file in [path, *path.rglob("*")]:
            if file.is_file() and file.stat().st_ino not in counted:
                counted.add(file.stat().st_ino)
                size += file.stat().st_size
        sizes.append((path.name + "/" * path.is_dir(), size))
    return sizes
