"""The ladder, on losses that are given."""

import itertools
import math

import pytest

from neoflix.tuning.ladder import (
    Trial,
    count_steps_left,
    extend,
    find_dropped,
    find_equals,
    find_next,
    make_rates,
    make_rungs,
)

RUNGS = [10, 20, 40]


def climb(trials: list[Trial], loss, lora_rank: int | None = None) -> list[tuple[float, int]]:
    """Trains by the ladder, with `loss(trial, steps)` for a run; returns the runs."""
    runs = []
    while job := find_next(trials, RUNGS):
        trial, steps = job
        runs.append((trial.learning_rate, steps))
        trial.losses[steps] = loss(trial, steps)
        if find_next(trials, RUNGS) is None:
            trials += extend(trials, RUNGS, lora_rank)
    return runs


def make_trials(*rates: float, rank: int | None = None) -> list[Trial]:
    return [Trial(number, rate, rank) for number, rate in enumerate(rates)]


def valley(best: float):
    """A loss that is lowest at a rate, and falls with the steps."""
    return lambda trial, steps: abs(math.log(trial.learning_rate / best)) + 100 / steps


def test_the_grid_surrounds_the_default():
    rates = make_rates(5e-5)
    assert rates[0] < 5e-5 < rates[-1]
    assert 5e-5 in rates
    assert all(larger == pytest.approx(2 * rate) for rate, larger in itertools.pairwise(rates))


@pytest.mark.parametrize("steps", [4, 5, 7, 40, 400])
def test_each_rung_is_longer(steps):
    first, second, last = make_rungs(steps)
    assert 1 <= first < second < last == steps


def test_the_better_half_goes_on():
    runs = climb(make_trials(1, 2, 4, 8, 16, 32), valley(4.1))
    assert [sum(steps == rung for _, steps in runs) for rung in RUNGS] == [6, 3, 2]
    assert {rate for rate, steps in runs if steps == 20} == {2, 4, 8}
    assert len(set(runs)) == len(runs), "nothing is trained twice"


def test_the_best_rate_is_found():
    trials = make_trials(1, 2, 4, 8, 16, 32)
    climb(trials, valley(4.1))
    assert [trial.learning_rate for trial in find_equals(trials, RUNGS)] == [4]


def test_it_continues_with_the_figures_it_has():
    trials = make_trials(1, 2, 4, 8)
    runs = climb(trials, valley(2.1))
    for count in range(len(runs)):
        again = make_trials(1, 2, 4, 8)
        for rate, steps in runs[:count]:
            trial = next(each for each in again if each.learning_rate == rate)
            trial.losses[steps] = valley(2.1)(trial, steps)
        assert climb(again, valley(2.1)) == runs[count:]


def test_a_trial_that_diverged_is_the_worst_and_is_not_trained_again():
    trials = make_trials(1, 2, 4)
    runs = climb(trials, lambda trial, steps: math.inf if trial.learning_rate == 4 else valley(2)(trial, steps))
    assert [steps for rate, steps in runs if rate == 4] == [10]
    assert [trial.learning_rate for trial in find_equals(trials, RUNGS)] == [2]


def test_one_that_diverges_on_the_last_rung_does_not_win():
    trials = make_trials(1, 2, 4)
    climb(trials, lambda t, steps: math.inf if (t.learning_rate, steps) == (2, 40) else valley(2)(t, steps))
    assert 2 not in [trial.learning_rate for trial in find_equals(trials, RUNGS)]


def test_no_trial_is_the_best_if_all_diverged():
    trials = make_trials(1, 2, 4)
    assert len(climb(trials, lambda *_: math.inf)) == 3
    assert find_equals(trials, RUNGS) == []


def test_of_equal_rates_the_smaller_is_taken():
    trials = make_trials(1, 2, 4)
    for trial, loss in zip(trials, (1.0, 1.0 + math.log(1.0029), 1.0 + math.log(1.0031)), strict=True):
        trial.losses[40] = loss
    assert [trial.learning_rate for trial in find_equals(trials[::-1], RUNGS)] == [1, 2]


@pytest.mark.parametrize(
    ("best", "added"), [(0.9, [0.5]), (0.1, [0.5, 0.25]), (5, [8]), (100, [8, 16]), (2.1, [])], ids=str
)
def test_the_grid_is_extended_at_its_edge_twice_at_most(best, added):
    trials = make_trials(1, 2, 4)
    runs = climb(trials, valley(best))
    assert [trial.learning_rate for trial in trials if trial.is_late] == added
    assert runs[len(runs) - len(added) :] == [(rate, 40) for rate in added], "to the last rung at once"


def test_a_single_rate_is_compared_with_its_neighbours():
    trials = make_trials(4)
    climb(trials, valley(2))
    assert sorted(trial.learning_rate for trial in trials) == [1, 2, 4]


def test_with_lora_other_ranks_follow_with_the_best_rate():
    trials = make_trials(1, 2, 4, rank=16)
    climb(trials, lambda trial, steps: valley(2)(trial, steps) + abs(math.log(trial.lora_rank / 64)), lora_rank=16)
    assert [(t.learning_rate, t.lora_rank) for t in trials if t.is_late] == [(2, 4), (2, 64)]
    assert [(t.learning_rate, t.lora_rank) for t in find_equals(trials, RUNGS)] == [(2, 64)]


def test_numbers_are_never_given_twice():
    trials = make_trials(1, 2, 4, rank=1)
    climb(trials, valley(100), lora_rank=1)
    assert [trial.number for trial in trials] == list(range(len(trials)))


def test_the_steps_left_are_those_that_are_taken():
    trials = make_trials(1, 2, 4, 8, 16)
    while job := find_next(trials, RUNGS):
        trial, steps = job
        before, taken = count_steps_left(trials, RUNGS), steps - max(trial.losses, default=0)
        trial.losses[steps] = valley(4.1)(trial, steps)
        assert count_steps_left(trials, RUNGS) == before - taken
    assert count_steps_left(trials, RUNGS) == 0
    trials.append(Trial(5, 32, is_late=True))
    assert count_steps_left(trials, RUNGS) == 40


def test_weights_are_needed_until_a_trial_is_dropped_or_complete():
    trials = make_trials(1, 2, 4)
    dropped = []
    while job := find_next(trials, RUNGS):
        trial, steps = job
        assert trial not in find_dropped(trials, RUNGS)
        trial.losses[steps] = valley(2.1)(trial, steps)
        dropped.append({each.learning_rate for each in find_dropped(trials, RUNGS)})
    assert dropped == [set(), set(), {1}, {1}, {1, 4}, {1, 2, 4}]
