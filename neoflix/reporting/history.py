"""What a run's folder tells of the run: how it was started, what it logged, what it wrote, and whether it worked."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import mean

from neoflix.checkpoints.find import list_checkpoints
from neoflix.checkpoints.names import RESULTS_FILE, STARTS_FILE, STATE_FILE
from neoflix.checkpoints.runs import read_run
from neoflix.reporting.run_log import read_live_samples
from neoflix.runtime.errors import UserError
from neoflix.runtime.files import read_json

FEW_TEXTS = 1000


FEW_HELD_OUT = 100


@dataclass(frozen=True)
class Record:
    """All that a run's folder tells. `state`: Trainer's own, with `log_history`; `results`: empty until the end."""

    folder: Path
    run: dict
    starts: list[dict]
    state: dict
    results: dict
    samples: list[dict]

    @classmethod
    def read(cls, folder: str | Path) -> "Record":
        """Reads a run, finished or not. UserError where the folder holds none, or nothing was logged yet."""
        folder = Path(folder)
        run = read_run(folder)
        if run is None:
            raise UserError(f"{folder}: no run's folder (there is no run.json); name the --output_dir of a run")
        results = read_json(folder / RESULTS_FILE, {})
        state = read_json(folder / STATE_FILE, {})
        if not state and (checkpoints := list_checkpoints(folder)):
            state = read_json(checkpoints[-1] / STATE_FILE, {})
        if not state:
            raise UserError(f"{folder}: its run has no complete checkpoint yet, and so no curves; wait for the first")
        return cls(folder, run, read_json(folder / STARTS_FILE, []), state, results, read_live_samples(folder))

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def start(self) -> dict:
        """The newest start; empty where none was noted."""
        return self.starts[-1] if self.starts else {}

    @property
    def num_steps(self) -> tuple[int, int]:
        """(steps taken, steps at the most)"""
        return self.state.get("global_step", 0), self.state.get("max_steps", 0)

    def curve(self, key: str) -> tuple[list[int], list[float]]:
        """(steps, values) of a figure of the log."""
        lines = [line for line in self.state.get("log_history", []) if isinstance(line.get(key), int | float)]
        return [line["step"] for line in lines], [line[key] for line in lines]

    @cached_property
    def evaluations(self) -> list[dict]:
        return [line for line in self.state.get("log_history", []) if "eval_loss" in line]

    @property
    def untouched(self) -> dict | None:
        """The evaluation of the model as it was before the first step."""
        return next((line for line in self.evaluations if line["step"] == 0), None)

    @property
    def trained(self) -> list[dict]:
        return [line for line in self.evaluations if line["step"] > 0]

    @property
    def best(self) -> dict | None:
        """The evaluation of the model that the run saved as its best or, until then, the best there is."""
        saved = [line for line in self.trained if line["step"] == self.results.get("saved_step")]
        if self.results:
            return saved[-1] if saved else None
        return min(self.trained, key=lambda line: line["eval_loss"], default=None)

    @property
    def improved(self) -> bool:
        return bool(self.best and self.untouched and self.best["eval_loss"] < self.untouched["eval_loss"])

    # ---- the verdict ----

    def verdict(self) -> tuple[str, str]:
        """("yes", "no" or "unknown", one or two sentences): did it work?"""
        best, untouched = self.best, self.untouched
        if best is None:
            return "unknown", "No trained model was measured on held-out texts, so whether it worked is not known."
        where = f"step {best['step']:,} (epoch {best['epoch']:.2f})"
        reached = (
            f"perplexity {best['eval_perplexity']:,.2f} at {where}, {best['eval_bits_per_char']:.3f} bits a character"
        )
        if untouched is None:
            return (
                "unknown",
                f"Held-out texts: {reached}. The untouched model was not measured: nothing to compare with.",
            )
        share = 1 - best["eval_perplexity"] / untouched["eval_perplexity"]
        from_to = f"Held-out texts: from perplexity {untouched['eval_perplexity']:,.2f}, untouched, to {reached}"
        if not self.improved:
            return "no", f"{from_to}. The model is no better than before it was trained."
        return "yes", f"{from_to}: {share:.0%} lower, where lower is better."

    def remarks(self) -> list[str]:
        """What a reader should know besides, a sentence each."""
        found = [self._unfinished(), self._not_improved(), self._overfits(), self._still_learns(), self._skipped()]
        return [remark for remark in [*found, self._few_texts()] if remark]

    def _unfinished(self) -> str | None:
        step, most = self.num_steps
        if not self.results:
            return f"The run has not come to its end: step {step:,} of {most:,}. The same command goes on with it."
        if step < most and self.trained:
            return (
                f"It ended at step {step:,} of {most:,}, because the held-out loss had stopped falling "
                "(--early_stopping_patience)."
            )
        return None

    def _not_improved(self) -> str | None:
        if self.best is None or self.untouched is None or self.improved:
            return None
        return "Try a lower --learning_rate, look whether the texts are what you meant, or train for longer."

    def _overfits(self) -> str | None:
        """The held-out loss rises after the best step while the training loss goes on falling."""
        best, last = self.best, self.trained[-1] if self.trained else None
        if best is None or last["step"] <= best["step"] or last["eval_loss"] < best["eval_loss"] + 0.01:
            return None
        steps, losses = self.curve("loss")
        before = [loss for step, loss in zip(steps, losses, strict=True) if step <= best["step"]]
        after = [loss for step, loss in zip(steps, losses, strict=True) if step > best["step"]]
        if not before or not after or mean(after) >= mean(before[-len(after) :]):
            return None
        return (
            f"It overfits after step {best['step']:,}: the held-out loss rose from {best['eval_loss']:.3f} to "
            f"{last['eval_loss']:.3f} while the training loss went on falling: it learns its texts by heart. What was "
            "kept is the model before that; more texts would help, more epochs would not."
        )

    def _still_learns(self) -> str | None:
        is_last = len(self.trained) > 1 and self.best == self.trained[-1]
        step, most = self.num_steps
        if not is_last or not self.results or step < most or (self.untouched and not self.improved):
            return None
        gain = self.trained[-2]["eval_loss"] - self.best["eval_loss"]
        if gain < 0.01:
            return None
        return "It was still getting better at its end: more epochs (--num_train_epochs) may bring more."

    def _skipped(self) -> str | None:
        num_skipped, step = next(reversed(self.curve("skipped_steps")[1]), 0), self.num_steps[0]
        if not num_skipped or num_skipped <= 0.05 * step:
            return None
        return f"{num_skipped:,} of {step:,} steps were skipped, because fp16 gradients overflowed; bf16 does not."

    def _few_texts(self) -> str | None:
        num_train, num_held_out = self.run.get("num_training_texts"), self.start.get("num_validation_texts")
        if num_held_out is not None and 0 < num_held_out < FEW_HELD_OUT:
            return (
                f"Only {num_held_out:,} texts were held out: the figures on them move by chance, and small differences "
                "mean nothing."
            )
        if num_train is not None and num_train < FEW_TEXTS:
            return f"Only {num_train:,} texts to learn from: expect it to learn some of them by heart."
        return None


def file_sizes(folder: Path) -> list[tuple[str, int]]:
    """(name, bytes) of what lies in a run's folder, folders with all that is in them; a file that lies in several
    places, as the best checkpoint's weights do, is counted where it comes first."""
    counted, sizes = set(), []
    for path in sorted(folder.iterdir(), key=lambda path: (path.is_dir(), path.name)):
        size = 0
        for file in [path, *path.rglob("*")]:
            if file.is_file() and file.stat().st_ino not in counted:
                counted.add(file.stat().st_ino)
                size += file.stat().st_size
        sizes.append((path.name + "/" * path.is_dir(), size))
    return sizes
