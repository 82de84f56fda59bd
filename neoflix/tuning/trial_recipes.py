"""Recipes of a search: the user's settings with other values of some of them, as YAML files."""

import re
from pathlib import Path

import yaml

from neoflix.arguments.command_line import with_underscores
from neoflix.arguments.recipes import read_recipe
from neoflix.runtime.errors import UserError
from neoflix.runtime.files import write_text
from neoflix.runtime.redaction import is_secret

# Flags of the search itself, and of a single start.
NOT_KEPT = (
    *("config", "tune", "tune_rates", "tune_steps", "local_rank", "resume_from_checkpoint", "override_resumed"),
)

# A trial does without these: they have no effect on it, and would be refused.
NOT_IN_TRIALS = (
    *("lr_scheduler_kwargs", "eval_steps", "eval_delay", "load_best_model_at_end", "max_steps"),
    *("push_to_hub", "hub_model_id", "hub_private_repo"),
)

# Of all trials. The held-out loss is measured once, at a rung, and the newest checkpoint is the only one.
OF_TRIALS = {
    "lr_scheduler_type": "constant_with_warmup",
    "eval_strategy": "no",
    "eval_on_start": False,
    "metric_for_best_model": None,
    "save_strategy": "steps",
    "save_total_limit": 1,
    "num_progress_samples": 0,
    "report_to": "none",
    "disable_tqdm": True,
}


def read_settings(words: list[str], config: str | None) -> dict:
    """The settings of a command line and its recipe, as typed; `generation` holds the recipe's sampling settings.

    Args:
        words: after the program's name; train.py's parser has accepted those that it knows.
        config: the recipe.

    Raises:
        UserError: for a secret, which a recipe must not hold.
    """
    recipe, generation = read_recipe(config) if config else ({}, {})
    settings = recipe | group_words(words) | ({"generation": generation} if generation else {})
    if secrets := [name for name in settings if is_secret(name)]:
        raise UserError(f"--{secrets[0]}: --tune writes the settings to recipes, where a secret does not belong")
    return {name: value for name, value in settings.items() if name not in NOT_KEPT}


def without_search(words: list[str]) -> list[str]:
    """A command line without the flags of the search: --tune --tune_steps 40 --seed 7 -> --seed 7"""
    kept, is_kept = [], True
    for word in with_underscores(words):
        if word.startswith("--"):
            is_kept = word.partition("=")[0] not in ("--tune", "--tune_rates", "--tune_steps")
        kept += [word] if is_kept else []
    return kept


def group_words(words: list[str]) -> dict[str, str | list[str] | bool]:
    """A command line as a recipe has it: --seed 7 --plan --no_tf32 --x a b -> {seed: 7, plan: true, tf32: false,
    x: [a, b]}"""
    groups: dict[str, list[str]] = {}
    values: list[str] = []
    for word in with_underscores(words):
        if word.startswith("--"):
            flag, equals, value = word[2:].partition("=")
            groups[flag] = values = [value] if equals else []
        else:
            values.append(word)
    grouped = {}
    for flag, values in groups.items():
        if not values and flag.startswith("no_"):
            grouped[flag.removeprefix("no_")] = False
        else:
            grouped[flag] = values if len(values) > 1 else values[0] if values else True
    return grouped


def trial_settings(settings: dict, rungs: list[int], output_dir: Path) -> dict:
    """The settings that all trials share. The rate is constant after the warm-up, which ends within the first rung, so
    that it does not depend on the rung at which a trial ends: a longer run continues a shorter one."""
    kept = {name: value for name, value in settings.items() if name not in NOT_IN_TRIALS}
    length = {"max_steps": rungs[-1], "save_steps": rungs[-1], "warmup_steps": max(1, rungs[0] // 2)}
    return kept | OF_TRIALS | length | {"output_dir": str(output_dir)}


def write_recipe(path: Path, settings: dict, comment: str) -> None:
    """Writes settings as a recipe, whose reader takes plain values as they are typed."""
    lines = [f"# {line}".rstrip() for line in comment.splitlines()] + [""]
    for name, value in settings.items():
        is_plain = isinstance(value, str) and re.fullmatch(r"\w[\w./+-]*", value) and value.lower() != "null"
        dumped = yaml.safe_dump({name: value}, allow_unicode=True, width=120).rstrip("\n")
        lines.append(f"{name}: {value}" if is_plain else dumped)
    write_text(path, "\n".join(lines) + "\n")
