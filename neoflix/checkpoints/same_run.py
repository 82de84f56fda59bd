"""Which settings differ between the record of a run and that of a later start, and how that is reported."""

from typing import Any, NamedTuple

from neoflix.runtime.errors import UserError

# Settings that `--override_resumed` may name.
SCHEDULE = ("learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps")

LENGTH = ("num_train_epochs", "max_steps")

OVERRIDABLE = (
    *SCHEDULE,
    *LENGTH,
    *("weight_decay", "max_grad_norm", "early_stopping_patience"),
    *("eval_strategy", "eval_steps", "eval_delay", "save_strategy", "save_steps"),
)

STATEFUL_SCHEDULES = ("reduce_lr_on_plateau", "greedy")  # the rate is their state, so a new one cannot be set


class Difference(NamedTuple):
    setting: str
    was: Any
    now: Any


def check_overrides(names: list[str] | None) -> None:
    """UserError for a name in `--override_resumed` that no run can change."""
    for name in names or []:
        if name.removeprefix("--").replace("-", "_") not in OVERRIDABLE:
            raise UserError(
                f"--override_resumed {name}: this setting cannot change within a run; those that can are "
                f"{', '.join(OVERRIDABLE)}"
            )


def find_differences(before: dict, run: dict) -> list[Difference]:
    """Settings in which two records differ. Settings that the earlier record lacks are not compared."""
    before = {"lora": None} | before
    keys = ("model", "architecture", "tokenizer", "data", "held_out", "lora", "texts_per_step")
    pairs = [(key, before[key], run[key]) for key in keys if key in before]
    for part, prefix in (("arguments", ""), ("deepspeed", "deepspeed ")):
        if part in before:
            was, now = before[part], run[part]
            names = was.keys() & now.keys() if part == "arguments" else was.keys() | now.keys()
            pairs += [(prefix + name, was.get(name), now.get(name)) for name in sorted(names)]
    if before["arguments"].get("max_steps", -1) > 0 and run["arguments"]["max_steps"] > 0:
        pairs = [pair for pair in pairs if pair[0] != "num_train_epochs"]  # --max_steps decides
    return [Difference(*pair) for pair in pairs if pair[1] != pair[2]]


def makes_longer(difference: Difference) -> bool:
    """Whether a difference makes the run longer, which is always allowed."""
    name, was, now = difference
    return name in LENGTH and now > was > 0


def has_free_schedule(before: dict, run: dict) -> bool:
    """Whether the learning rate is a function of the step alone, so that a new one can replace it."""
    types = {side["arguments"].get("lr_scheduler_type") for side in (before, run)}
    return not types & set(STATEFUL_SCHEDULES) and "scheduler.type" not in run["deepspeed"]


def explain_refusal(checkpoint: str, before: dict, run: dict, refused: list[Difference], step: int) -> str:
    """The message of the UserError for settings that may not change."""
    words = [_name_difference(each, before, run) for each in refused]
    sentence = (
        f"{checkpoint} belongs to a run with {', '.join(words)}; use the earlier settings, or choose another "
        "--output_dir"
    )
    free = OVERRIDABLE if has_free_schedule(before, run) else set(OVERRIDABLE) - set(SCHEDULE)
    if all(each.setting in free for each in refused):
        names = " ".join(each.setting for each in refused)
        sentence += f", or add --override_resumed {names} to go on from step {step} with the new ones"
    return sentence


def _name_difference(difference: Difference, before: dict, run: dict) -> str:
    name, was, now = difference
    if name in ("architecture", "tokenizer"):
        return f"another {name}"
    if name in ("data", "held_out"):
        texts = "other training texts" if name == "data" else "other held-out texts"
        was, now = before.get("texts", {}), run["texts"]
        flags = [
            f"{key} was {show(was[key])}, is now {show(now[key])}" for key in now if was.get(key, now[key]) != now[key]
        ]
        return texts + (f" ({'; '.join(flags)})" if flags else "")
    return f"another {name} (was {show(was)}, is now {show(now)})"


def show(value) -> str:
    """A setting's value, for a message."""
    return "unset" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
