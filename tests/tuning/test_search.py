"""A search in its folder."""

import json
import math

import pytest

from neoflix.checkpoints.names import RESULTS_FILE, RUN_FILE, STATE_FILE
from neoflix.runtime.errors import UserError
from neoflix.tuning.ladder import Trial
from neoflix.tuning.search import Search, open_search, read_search


def make_search(folder, *rates: float, lora: dict | None = None, is_array: bool = False, **settings) -> Search:
    trials = [Trial(number, rate, lora and lora["rank"]) for number, rate in enumerate(rates or (1.0, 2.0, 4.0))]
    return Search(folder, {"seed": "1"} | settings, lora, [4] if is_array else [1, 2, 4], trials, is_array)


def begin(search: Search) -> Search:
    """Makes the folder of a search whose first trial has taken a step."""
    search.save()
    search.run(search.trials[0]).mkdir()
    (search.run(search.trials[0]) / RUN_FILE).write_text("{}")
    return search


def test_it_is_read_as_it_was_written(tmp_path):
    search = make_search(tmp_path, lora={"rank": 16, "alpha": 32.0})
    search.trials[0].losses |= {1: 2.5, 2: math.inf}
    search.trials[0].seconds[1] = 3.25
    search.save()
    assert read_search(tmp_path) == search
    assert read_search(tmp_path / "elsewhere") is None


def test_each_trial_has_a_recipe_with_its_settings(tmp_path):
    search = make_search(tmp_path, 0.5, lora={"rank": 16, "alpha": 32.0})
    search.trials.append(Trial(1, 0.5, 4, is_late=True))
    search.save()
    second = search.recipe(search.trials[1]).read_text()
    assert {"learning_rate: 0.5", "lora_rank: 4", "lora_alpha: 32.0"} <= set(second.splitlines()), "alpha stays"
    assert "lora_rank" not in json.dumps(make_search(tmp_path, 0.5).chosen(Trial(0, 0.5)))


def test_the_same_settings_continue_it(tmp_path):
    before = begin(make_search(tmp_path))
    new = make_search(tmp_path)
    new.rungs = [2, 4, 8]  # estimated from other counts of the texts
    assert open_search(new, keeps_rungs=True) == before
    with pytest.raises(UserError, match="tune_steps"):
        open_search(new, keeps_rungs=False)


@pytest.mark.parametrize(
    ("rates", "settings", "name"),
    [((1.0, 2.0), {}, "tune_rates"), ((), {"seed": "2"}, "seed"), ((), {"bf16": "true"}, "bf16")],
    ids=["rates", "changed", "added"],
)
def test_other_settings_are_refused_once_it_has_begun(tmp_path, rates, settings, name):
    make_search(tmp_path).save()
    new = make_search(tmp_path, *rates, **settings)
    assert open_search(new, keeps_rungs=True) is new
    assert not list(tmp_path.glob("trials/*.yaml")), "the earlier recipes would be taken for those of the new one"
    begin(make_search(tmp_path))
    with pytest.raises(UserError, match=f"another {name}"):
        open_search(new, keeps_rungs=True)


def test_an_array_is_not_trained_by_the_command_that_reads_its_results(tmp_path):
    make_search(tmp_path, is_array=True).save()
    assert open_search(make_search(tmp_path), keeps_rungs=True).is_array
    begin(make_search(tmp_path))
    with pytest.raises(UserError, match="another tune"):
        open_search(make_search(tmp_path, is_array=True), keeps_rungs=True)


def test_figures_of_finished_runs_are_read_from_their_folders(tmp_path):
    search = begin(make_search(tmp_path))
    run, state = search.run(search.trials[0]), {"log_history": [{"step": 2, "eval_loss": 1.5}, {"step": 2, "loss": 9}]}
    (run / STATE_FILE).write_text(json.dumps(state))
    search.collect()
    assert search.trials[0].losses == {}, "it has not finished"
    (run / RESULTS_FILE).write_text("{}")
    search.trials[0].losses[1] = 2.0
    search.collect()
    assert search.trials[0].losses == {1: 2.0, 2: 1.5}
