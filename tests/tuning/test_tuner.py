"""The search's driver: what it decides without training."""

import pytest
from conftest import NETFLIX, card, forecast_of

from neoflix.arguments.reader import read_train_flags
from neoflix.runtime.errors import UserError
from neoflix.tuning.tuner import choose_steps, count_processes, new_search


def search_of(tmp_path, *words: str, plan=None):
    flags = read_train_flags(["--tune", *words])
    return new_search(flags, ["--tune", *words], tmp_path, plan)


def test_the_default_costs_about_two_epochs():
    for batch in ("64", "32"):
        plan = forecast_of("2.7B", card(80), "--per_device_train_batch_size", batch)
        steps_per_epoch = NETFLIX.num_train / int(batch)
        assert 1.5 * steps_per_epoch < 3.25 * choose_steps(plan) < 2.5 * steps_per_epoch


def test_the_default_has_bounds():
    assert choose_steps(forecast_of("2.7B", card(80), "--per_device_train_batch_size", "2000")) == 40
    assert choose_steps(forecast_of("2.7B", card(80), "--per_device_train_batch_size", "1")) == 400
    assert choose_steps(None) > 40


def test_the_grid(tmp_path):
    rates = [trial.learning_rate for trial in search_of(tmp_path, "--learning_rate", "1e-3").trials]
    assert rates == [2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3, 8e-3]
    chosen = search_of(tmp_path, "--tune_rates", "3e-3", "1e-3", "3e-3", "--tune_steps", "10")
    assert [trial.learning_rate for trial in chosen.trials] == [1e-3, 3e-3]
    assert chosen.rungs == [3, 5, 10]


def test_a_recipe_can_name_rates(tmp_path):
    (tmp_path / "r.yaml").write_text("tune_rates: [1e-3, 2e-3]\n")
    chosen = search_of(tmp_path, "--config", str(tmp_path / "r.yaml"))
    assert [trial.learning_rate for trial in chosen.trials] == [1e-3, 2e-3]
    assert "tune_rates" not in chosen.settings


def test_an_array_has_one_rung_and_with_lora_every_rank(tmp_path):
    words = ["--tune_rates", "1e-3", "2e-3", "--tune_steps", "8", "--tune", "array"]
    assert search_of(tmp_path, *words).rungs == [8]
    trials = search_of(tmp_path, *words, "--lora", "--lora_rank", "8").trials
    assert {(trial.learning_rate, trial.lora_rank) for trial in trials} == {
        (rate, rank) for rate in (1e-3, 2e-3) for rank in (2, 8, 32)
    }
    assert [trial.number for trial in trials] == list(range(6))


def test_alpha_is_that_of_the_users_rank(tmp_path):
    assert search_of(tmp_path, "--lora").lora == {"rank": 16, "alpha": 32}
    assert search_of(tmp_path, "--lora", "--lora_alpha", "8").lora == {"rank": 16, "alpha": 8}


def test_processes_are_those_of_launch_sh(monkeypatch):
    flags = read_train_flags(["--tune", "--use_cpu", "true"])
    assert count_processes(flags) == 1
    monkeypatch.setenv("NGPU", "2")
    assert count_processes(flags) == 2


@pytest.mark.parametrize(
    "words",
    [
        "--tune --plan",
        "--tune --eval_only --model_name_or_path x",
        "--tune --validation_fraction 0",
        "--tune --save_strategy no",
        "--tune --tune_rates 1e-3 x",
        "--tune --tune_rates 0",
        "--tune --tune_rates nan",
        "--tune --tune_steps 3",
        "--tune maybe",
        "--tune_rates 1e-3",
    ],
)
def test_flags_that_no_search_can_use_are_refused(words):
    with pytest.raises(UserError, match=r"tune|held out"):
        read_train_flags(words.split())
