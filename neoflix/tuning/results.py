"""What a search found: tune.html, and best.yaml."""

import math
import shlex

from neoflix.reporting.curves import Curve, Plot, draw
from neoflix.reporting.formats import format_duration, format_number
from neoflix.reporting.render import render
from neoflix.runtime.errors import UserError
from neoflix.runtime.files import write_text
from neoflix.tuning.ladder import Trial, find_equals
from neoflix.tuning.search import Search
from neoflix.tuning.trial_recipes import write_recipe

PAGE, RECIPE = "tune.html", "best.yaml"
FAR_OFF = 10  # times the best perplexity: not drawn


def format_perplexity(loss: float | None) -> str:
    """The perplexity of a loss; a trial whose loss is infinite has diverged."""
    if loss is None or math.isinf(loss):
        return "" if loss is None else "diverged"
    return format_number(math.exp(loss)) if loss < math.log(1e6) else f"{math.exp(min(loss, 700.0)):.0e}"


def name_trial(trial: Trial) -> str:
    """The settings of a trial, in words."""
    return f"rate {trial.learning_rate:g}" + (f", rank {trial.lora_rank}" if trial.lora_rank else "")


def write_results(search: Search) -> list[str]:
    """Writes the report and the recipe with the best settings. Returns what to print.

    Raises:
        UserError: no trial has reached the last rung.
    """
    equals = find_equals(search.trials, search.rungs)
    if not equals:
        raise UserError(f"every learning rate diverged; use lower --tune_rates than {_list_rates(search.trials)}")
    best, recipe = equals[0], search.folder / RECIPE
    comment = f"The user's settings with the best ones that `train.py --tune` found ({search.folder / PAGE}).\n"
    write_recipe(recipe, search.settings | search.chosen(best), f"{comment}  deepspeed train.py --config {recipe}")
    verdict = f"Best: {name_trial(best)} (held-out perplexity {_at_last_rung(search, best)})"
    remarks, command = _list_remarks(search, equals), f"deepspeed train.py --config {shlex.quote(str(recipe))}"
    columns, rows = make_table(search, best)
    page = render(
        "tune.html.jinja",
        title="Learning rate" if search.lora is None else "Learning rate and rank",
        kind="unknown" if _find_edge(search, best) else "yes",
        verdict=verdict,
        remarks=remarks,
        command=command,
        columns=columns,
        rows=rows,
        plot=_draw(search, best),
    )
    write_text(search.folder / PAGE, page)
    return [verdict, *remarks, f"Report: {search.folder / PAGE} (open it in a browser)", f"To train with it: {command}"]


def make_table(search: Search, best: Trial) -> tuple[list[str], list[list[str]]]:
    """The header and the rows of the trials, by rate."""
    columns = ["learning rate", *(["rank"] if search.lora else []), *(f"{steps:,} steps" for steps in search.rungs)]
    rows = []
    for trial in sorted(search.trials, key=lambda each: (each.learning_rate, each.lora_rank or 0)):
        row = [f"{trial.learning_rate:g}", *([str(trial.lora_rank)] if search.lora else [])]
        row += [format_perplexity(trial.losses.get(steps)) for steps in search.rungs]
        words = ["best"] if trial is best else []
        words += ["added later"] if trial.is_late else []
        rows.append([*row, format_duration(sum(trial.seconds.values())), ", ".join(words)])
    return [*columns, "time", ""], rows


def _at_last_rung(search: Search, trial: Trial) -> str:
    return f"{format_perplexity(trial.losses[search.rungs[-1]])} after {search.rungs[-1]:,} steps"


def _list_rates(trials: list[Trial]) -> str:
    return ", ".join(f"{rate:g}" for rate in sorted({trial.learning_rate for trial in trials}))


def _find_edge(search: Search, best: Trial) -> str | None:
    """ "lowest" or "highest" if the best rate is that one of those tried."""
    rates = sorted({trial.learning_rate for trial in search.trials})
    return {rates[-1]: "highest", rates[0]: "lowest"}.get(best.learning_rate) if len(rates) > 1 else None


def _list_remarks(search: Search, equals: list[Trial]) -> list[str]:
    best, *others = equals
    remarks = []
    if others:
        names = "; ".join(f"{name_trial(trial)}: {_at_last_rung(search, trial)}" for trial in others)
        remarks.append(f"Equal in effect, within 0.3% of the lowest perplexity ({names}). The smallest is taken.")
    late = [trial for trial in search.trials if trial.is_late and trial.lora_rank == search.lora_rank]
    if late:
        rates = " and ".join(f"{trial.learning_rate:g}" for trial in late)
        remarks.append(f"The best rate was at the edge of the grid, which was extended by {rates}.")
    if edge := _find_edge(search, best):
        remarks.append(f"It is the {edge} rate tried, so a better one may lie beyond it: use --tune_rates.")
    if missing := [trial.number for trial in search.trials if not trial.losses]:
        remarks.append(f"Trials without a result: {', '.join(map(str, missing))}.")
    return remarks


def _draw(search: Search, best: Trial) -> Plot | None:
    ranked = sorted(search.trials, key=lambda trial: trial.learning_rate)
    ranked = [trial for trial in ranked if trial.lora_rank == best.lora_rank]
    curves = []
    for number, steps in enumerate(search.rungs):
        losses = {trial.learning_rate: trial.losses[steps] for trial in ranked if steps in trial.losses}
        near = [rate for rate, loss in losses.items() if loss < min(losses.values()) + math.log(FAR_OFF)]
        values = [math.exp(losses[rate]) for rate in near]
        curves.append(Curve(f"{steps:,} steps", near, values, number, points=True))
    return draw(
        "Held-out perplexity" + (f" at rank {best.lora_rank}" if search.lora else ""),
        "By learning rate, a line for each rung. Lower is better. Rates that diverged, or with ten times the best "
        "perplexity, are left out.",
        curves,
        best=(best.learning_rate, math.exp(best.losses[search.rungs[-1]])),
        over="learning rate",
    )


def array_command(search: Search, numbers: list[int]) -> str:
    """The command that trains these trials as a SLURM array."""
    tasks = ",".join(map(str, numbers))
    if len(numbers) > 1 and numbers == list(range(numbers[0], numbers[-1] + 1)):
        tasks = f"{numbers[0]}-{numbers[-1]}"
    recipe = shlex.quote(str(search.folder / "trials" / "%a.yaml"))
    return f"sbatch --array={tasks} launch.sh --config {recipe}"
