"""A search in its folder: the recipes and figures of its trials, which make it resumable."""

import math
from dataclasses import asdict, dataclass
from pathlib import Path

from neoflix.checkpoints.find import list_numbered
from neoflix.checkpoints.names import RUN_FILE
from neoflix.checkpoints.ownership import read_list
from neoflix.checkpoints.storage import delete
from neoflix.runtime.errors import UserError
from neoflix.runtime.files import read_json, write_json
from neoflix.tuning.ladder import Trial, find_dropped
from neoflix.tuning.trial_recipes import trial_settings, write_recipe
from neoflix.tuning.trials import read_losses

STATE = "tune.json"


@dataclass
class Search:
    """The settings and trials of a search. Trial 3 has the recipe trials/3.yaml, and trains in trials/3/."""

    folder: Path
    settings: dict  # the user's
    lora: dict | None  # rank and alpha; None: without LoRA
    rungs: list[int]
    trials: list[Trial]
    is_array: bool  # a SLURM array trains the trials

    @property
    def lora_rank(self) -> int | None:
        return self.lora and self.lora["rank"]

    def recipe(self, trial: Trial) -> Path:
        return self.folder / "trials" / f"{trial.number}.yaml"

    def run(self, trial: Trial) -> Path:
        return self.recipe(trial).with_suffix("")

    def chosen(self, trial: Trial) -> dict:
        """The settings by which a trial differs from the others. Alpha is fixed, because a rank's own would change the
        best rate."""
        rank = {"lora_rank": trial.lora_rank, "lora_alpha": self.lora["alpha"]} if self.lora else {}
        return {"learning_rate": trial.learning_rate, **rank}

    def save(self) -> None:
        """Writes the figures, and the recipes that are missing."""
        (self.folder / "trials").mkdir(parents=True, exist_ok=True)
        shared = trial_settings(self.settings, self.rungs, self.folder / "trials")
        for trial in self.trials:
            if not self.recipe(trial).exists():
                comment = "A trial of `train.py --tune`: a short run with a constant rate after the warm-up."
                write_recipe(self.recipe(trial), shared | self.chosen(trial), comment)
        content = {name: value for name, value in vars(self).items() if name not in ("folder", "trials")}
        write_json(self.folder / STATE, content | {"trials": [asdict(trial) for trial in self.trials]})

    def collect(self) -> None:
        """Reads the figures of runs that have finished and whose figures are not known yet."""
        for trial in self.trials:
            if missing := [steps for steps in self.rungs if steps not in trial.losses]:
                losses = read_losses(self.run(trial))
                trial.losses |= {steps: losses[steps] for steps in missing if steps in losses}

    def remove_weights(self) -> None:
        """Deletes the checkpoints and models of trials that need no further training; their reports stay."""
        for trial in find_dropped(self.trials, self.rungs):
            run = self.run(trial)
            for name in (read_list(run) or {"files": {}})["files"]:
                (run / name).unlink(missing_ok=True)
            for checkpoint in list_numbered(run):
                delete(checkpoint)


def open_search(new: Search, keeps_rungs: bool) -> Search:
    """The search in the folder of a new one, if it has the same settings; otherwise the new one.

    Args:
        keeps_rungs: the number of steps was not given, and may have been estimated differently.

    Raises:
        UserError: a search with other settings has begun in the folder.
    """
    before = read_search(new.folder)
    differing = _find_differences(before, new, keeps_rungs) if before else []
    if before and not differing:
        return before
    if before and any((before.run(trial) / RUN_FILE).is_file() for trial in before.trials):
        name, was, now = differing[0]
        raise UserError(
            f"{new.folder} holds a search with another {name} (was {was}, is now {now}); use the earlier settings, "
            "choose another --output_dir, or delete that folder"
        )
    for recipe in (new.folder / "trials").glob("*.yaml"):
        recipe.unlink()
    return new


def _find_differences(before: Search, new: Search, keeps_rungs: bool) -> list[tuple]:
    pairs = {name: (before.settings.get(name), new.settings.get(name)) for name in before.settings | new.settings}
    pairs["tune_rates"] = tuple(_list_rates(search) for search in (before, new))
    if not keeps_rungs:
        pairs["tune_steps"] = (before.rungs[-1], new.rungs[-1])
    if new.is_array:
        pairs["tune"] = ("array" if before.is_array else "true", "array")
    return [(name, was, now) for name, (was, now) in pairs.items() if was != now]


def _list_rates(search: Search) -> str:
    return " ".join(f"{rate:g}" for rate in sorted({each.learning_rate for each in search.trials if not each.is_late}))


def read_search(folder: Path) -> Search | None:
    """The search in a folder; None if there is none."""
    content = read_json(folder / STATE, {})
    if not content:
        return None
    trials = [Trial(**_with_numbers(each)) for each in content.pop("trials")]
    return Search(folder, trials=trials, **content)


def _with_numbers(trial: dict) -> dict:
    """A trial's values from JSON, which has no infinity, and only strings as keys."""
    losses = {int(steps): math.inf if loss is None else loss for steps, loss in trial["losses"].items()}
    return trial | {"losses": losses, "seconds": {int(steps): value for steps, value in trial["seconds"].items()}}
