"""Successive halving (Jamieson and Talwalkar, "Non-stochastic Best Arm Identification and Hyperparameter Optimization",
2016): all settings train for a few steps, the better half goes on to twice as many, and so on.

A learning rate is one number on a logarithmic grid, so the grid itself is the search: nothing is sampled.
"""

import math
from dataclasses import dataclass, field

# The default grid. Rates above the default are cheap to try: one that is far too high is dropped at the first rung.
FACTORS = (0.25, 0.5, 1, 2, 4, 8)

# Perplexities that differ by less are equal in effect.
EQUAL = 0.003

MOST_EXTENSIONS = 2  # of the grid, each by one rate


@dataclass
class Trial:
    """A run with settings of its own. `losses` and `seconds` are by the number of steps.

    A loss is the held-out one in nats per token; infinite if the run diverged.
    """

    number: int
    learning_rate: float
    lora_rank: int | None = None  # None: without LoRA
    is_late: bool = False  # it was added after the ladder, and goes to the last rung at once
    losses: dict[int, float] = field(default_factory=dict)
    seconds: dict[int, float] = field(default_factory=dict)

    @property
    def has_diverged(self) -> bool:
        return math.inf in self.losses.values()


def make_rates(rate: float) -> list[float]:
    """The learning rates around one, the smallest first."""
    return [_rounded(rate * factor) for factor in FACTORS]


def make_ranks(lora_rank: int) -> list[int]:
    """A rank, and the ranks to compare it with: a quarter and four times as much."""
    return list(dict.fromkeys([lora_rank, max(1, lora_rank // 4), 4 * lora_rank]))


def make_rungs(steps: int) -> list[int]:
    """The steps of each rung: a quarter, a half and all of `steps`, which is 4 or more."""
    return [math.ceil(steps / 4), math.ceil(steps / 2), steps]


def find_next(trials: list[Trial], rungs: list[int]) -> tuple[Trial, int] | None:
    """The trial to train next, and to which step; None if the ladder is complete."""
    entrants = [trial for trial in trials if not trial.is_late]
    for steps in rungs:
        if steps == rungs[-1]:
            entrants = entrants + [trial for trial in trials if trial.is_late]
        for trial in entrants:
            if steps not in trial.losses and not trial.has_diverged:
                return trial, steps
        entrants = keep_better_half(entrants, steps)
    return None


def keep_better_half(entrants: list[Trial], steps: int) -> list[Trial]:
    """The half of the trials (rounded up) with the lower losses at a rung, without those that diverged."""
    ranked = sorted((trial for trial in entrants if not trial.has_diverged), key=lambda trial: trial.losses[steps])
    return ranked[: math.ceil(len(entrants) / 2)]


def find_dropped(trials: list[Trial], rungs: list[int]) -> list[Trial]:
    """The trials that need no further training, however the others turn out."""
    entrants, dropped = [trial for trial in trials if not trial.is_late], [t for t in trials if rungs[-1] in t.losses]
    for steps in rungs[:-1]:
        if any(steps not in trial.losses and not trial.has_diverged for trial in entrants):
            break
        kept = keep_better_half(entrants, steps)
        dropped += [trial for trial in entrants if trial not in kept]
        entrants = kept
    return dropped


def find_equals(trials: list[Trial], rungs: list[int]) -> list[Trial]:
    """The trials of the last rung whose perplexity is equal in effect to the lowest one; the first has the lowest rate
    and, of those, the lowest rank. Empty if all diverged."""
    last = [trial for trial in trials if math.isfinite(trial.losses.get(rungs[-1], math.inf))]
    best = min((trial.losses[rungs[-1]] for trial in last), default=0)
    equals = [trial for trial in last if trial.losses[rungs[-1]] <= best + math.log1p(EQUAL)]
    return sorted(equals, key=lambda trial: (trial.learning_rate, trial.lora_rank or 0))


def extend(trials: list[Trial], rungs: list[int], lora_rank: int | None) -> list[Trial]:
    """What a complete ladder still lacks: a rate beyond the edge of the grid, if the best one is at the edge; then,
    with LoRA, a quarter and four times the rank with the best rate.

    The rank comes second because the best rate hardly depends on it if alpha stays the same, so that adapters are
    scaled by 1 / rank (Schulman et al., "LoRA Without Regret", Thinking Machines Lab, 2025).
    """
    first_rank = [trial for trial in trials if trial.lora_rank == lora_rank]
    if not (equals := find_equals(first_rank, rungs)):
        return []
    rate, number = equals[0].learning_rate, len(trials)
    rates = sorted(trial.learning_rate for trial in first_rank)
    edges = {rates[0]: rates[:2], rates[-1]: rates[:-3:-1]}  # an edge and its neighbour
    if rate in edges and sum(trial.is_late for trial in first_rank) < MOST_EXTENSIONS:
        edge, neighbour = edges[rate] if len(rates) > 1 else (rate, 2 * rate)
        return [Trial(number, _rounded(edge * edge / neighbour), lora_rank, is_late=True)]
    if lora_rank is None or len(first_rank) < len(trials):
        return []
    ranks = make_ranks(lora_rank)[1:]
    return [Trial(number + n, rate, rank, is_late=True) for n, rank in enumerate(ranks)]


def count_steps_left(trials: list[Trial], rungs: list[int]) -> int:
    """Optimizer steps until the ladder is complete, if no further trial diverges or is added."""
    num_entrants = sum(not trial.is_late for trial in trials)
    num_late = sum(trial.is_late and not trial.losses for trial in trials)
    steps, before = num_late * rungs[-1], 0
    for rung in rungs:
        num_done = sum(rung in trial.losses for trial in trials if not trial.is_late)
        steps += max(num_entrants - num_done, 0) * (rung - before)
        num_entrants, before = math.ceil(num_entrants / 2), rung
    return steps


def _rounded(rate: float) -> float:
    return float(f"{rate:.3g}")
