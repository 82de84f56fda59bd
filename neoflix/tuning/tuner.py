"""`train.py --tune`: finds the learning rate, and with LoRA the rank, by short runs.

Nothing is trained in this process, and torch is not imported.
"""

import argparse
import math
import os
import time
from itertools import product
from pathlib import Path

from neoflix.planning.forecast import Plan
from neoflix.planning.plan_run import plan_run
from neoflix.reporting.formats import format_duration
from neoflix.runtime.console import say
from neoflix.runtime.gpus import read_gpus
from neoflix.runtime.locks import acquire
from neoflix.tuning.ladder import (
    Trial,
    count_steps_left,
    extend,
    find_next,
    make_ranks,
    make_rates,
    make_rungs,
)
from neoflix.tuning.results import array_command, format_perplexity, name_trial, write_results
from neoflix.tuning.search import Search, open_search
from neoflix.tuning.trial_recipes import read_settings
from neoflix.tuning.trials import Stops, train_to

LOCK = "_tune.lock"
BUDGET = 2.0  # epochs that all trials of the default grid train for, together
# Of the longest trials. In fewer than 40 steps even the warm-up decides; the demo's 40 find the best of its six rates
# (docs/tuning.md). More than 400 would cost a large data set more than a search is worth.
FEWEST_STEPS, MOST_STEPS = 40, 400
UNPLANNED_STEPS = 100  # where the model's shape is not known before it is downloaded


def tune(flags: argparse.Namespace, words: list[str]) -> None:
    """Runs a search, or continues it.

    Args:
        flags: checked. Their plan is printed.
        words: the command line that they were read from.

    Raises:
        UserError: the run does not fit, or a trial's own error.
        StoppedEarly: the search was asked to stop.
    """
    folder = Path(flags.output_dir) / "tune"
    num_processes = count_processes(flags)
    plan = _plan(flags, folder, num_processes)
    search = open_search(new_search(flags, words, folder, plan), keeps_rungs=flags.tune_steps is None)
    folder.mkdir(parents=True, exist_ok=True)
    lock = acquire(folder / LOCK, f"{folder}: another search works there ({{owner}}); wait until it ends")
    try:
        search.collect()
        search.save()
        if flags.tune == "array":
            say(f"Trials: {_list_trials(search)}")
            say(array_command(search, [trial.number for trial in search.trials]))
            say("When the jobs have ended, the same command with --tune true writes the report.")
            return
        climb(search, num_processes, plan)
        search.remove_weights()
        for line in write_results(search):
            say(line)
    finally:
        lock.release()


def count_processes(flags: argparse.Namespace) -> int:
    """Processes of a trial: NGPU, as for launch.sh, or one for each GPU, or one."""
    return int(os.environ.get("NGPU") or (0 if flags.use_cpu else len(read_gpus())) or 1)


def _plan(flags: argparse.Namespace, folder: Path, num_processes: int) -> Plan | None:
    """The plan of the whole run, as its launcher would start it."""
    if num_processes > 1:
        os.environ["WORLD_SIZE"] = os.environ["LOCAL_SIZE"] = str(num_processes)
    flags.output_dir = str(folder)  # a run beside the search does not count
    return plan_run(flags)


def new_search(flags: argparse.Namespace, words: list[str], folder: Path, plan: Plan | None) -> Search:
    rates = sorted({float(rate) for rate in flags.tune_rates}) if flags.tune_rates else make_rates(flags.learning_rate)
    steps = flags.tune_steps or choose_steps(plan)
    alpha = 2.0 * flags.lora_rank if flags.lora_alpha is None else flags.lora_alpha
    lora = {"rank": flags.lora_rank, "alpha": alpha} if flags.lora else None
    is_array = flags.tune == "array"
    ranks = [None] if lora is None else make_ranks(flags.lora_rank) if is_array else [flags.lora_rank]
    trials = [Trial(number, rate, rank) for number, (rank, rate) in enumerate(product(ranks, rates))]
    rungs = [steps] if is_array else make_rungs(steps)
    return Search(folder, read_settings(words, flags.config), lora, rungs, trials, is_array)


def choose_steps(plan: Plan | None) -> int:
    """Steps of the longest trials, so that the default grid takes about BUDGET epochs in all."""
    if plan is None:
        return UNPLANNED_STEPS
    tokens_per_step = plan.settings.train_tokens / plan.settings.num_steps
    steps_per_epoch = plan.texts.num_train * plan.texts.mean / tokens_per_step
    trials = [Trial(number, rate) for number, rate in enumerate(make_rates(1.0))]
    share = count_steps_left(trials, make_rungs(MOST_STEPS)) / MOST_STEPS  # of all trials, for each of the longest
    return min(max(math.ceil(BUDGET * steps_per_epoch / share), FEWEST_STEPS), MOST_STEPS)


def climb(search: Search, num_processes: int, plan: Plan | None) -> None:
    """Trains what the ladder still lacks. A SLURM array's trials are left to SLURM."""
    if search.is_array:
        if missing := [trial.number for trial in search.trials if search.rungs[-1] not in trial.losses]:
            say(f"Trials without a result (exit code 3 of a job: it diverged): {array_command(search, missing)}")
        return
    stops = Stops()
    if find_next(search.trials, search.rungs):
        say(f"Trials: {_list_trials(search)}; {_forecast(search, plan)}")
    while job := _find_job(search):
        stops.check()
        trial, steps = job
        began = time.monotonic()
        try:
            trial.losses[steps] = train_to(steps, search.recipe(trial), num_processes, stops)
        finally:
            trial.seconds[steps] = trial.seconds.get(steps, 0) + time.monotonic() - began
            search.save()
        search.remove_weights()
        say(f"{_describe(trial, steps)}; {_forecast(search, plan)}")


def _find_job(search: Search) -> tuple[Trial, int] | None:
    job = find_next(search.trials, search.rungs)
    if job or not (added := extend(search.trials, search.rungs, search.lora_rank)):
        return job
    search.trials += added
    search.save()
    why = "best rate is at the edge" if added[0].lora_rank == search.lora_rank else "other ranks with the best rate"
    say(f"Added ({why}): {'; '.join(map(name_trial, added))}")
    return find_next(search.trials, search.rungs)


def _list_trials(search: Search) -> str:
    rates = " ".join(f"{rate:g}" for rate in sorted({trial.learning_rate for trial in search.trials}))
    ranks = " ".join(map(str, dict.fromkeys(trial.lora_rank for trial in search.trials if trial.lora_rank)))
    return f"rates {rates}{f', ranks {ranks}' if ranks else ''}; rungs of {', '.join(map(str, search.rungs))} steps"


def _describe(trial: Trial, steps: int) -> str:
    outcome = format_perplexity(trial.losses[steps])
    return f"{name_trial(trial)}, {steps} steps: perplexity {outcome}, {format_duration(trial.seconds[steps])}"


def _forecast(search: Search, plan: Plan | None) -> str:
    """The steps left, and their time: at the speed so far, start-ups included; before that by the plan."""
    left = count_steps_left(search.trials, search.rungs)
    timed = [trial for trial in search.trials if trial.seconds and trial.losses]
    num_steps = sum(max(trial.losses) for trial in timed)
    if not left:
        return "the ladder is complete"
    if timed:
        seconds, source = left * sum(sum(trial.seconds.values()) for trial in timed) / num_steps, "at the speed so far"
    elif plan and (known := plan.seconds()):
        seconds, source = left * known[0] / plan.settings.num_steps, f"without start-ups; {known[1]}"
    else:
        return f"{left:,} steps left"
    return f"{left:,} steps left, about {format_duration(max(seconds, 1))} ({source})"
