"""The recipes of a search hold the user's settings."""

import pytest
import yaml

from neoflix.arguments.reader import read_train_flags
from neoflix.arguments.recipes import read_recipe
from neoflix.runtime.errors import UserError
from neoflix.tuning.trial_recipes import group_words, read_settings, trial_settings, without_search, write_recipe


def test_a_command_line_becomes_a_recipe():
    words = ["--seed", "7", "--lora", "--report-to=none", "--no_tf32", "--sample_prompts", "", "A young"]
    grouped = {"seed": "7", "lora": True, "report_to": "none", "tf32": False, "sample_prompts": ["", "A young"]}
    assert group_words([*words, "--max_steps", "-1"]) == grouped | {"max_steps": "-1"}


@pytest.mark.parametrize("words", ["--tune", "--tune true", "--tune=array", "--tune_rates 1 2", "--tune-steps 8"])
def test_the_flags_of_the_search_are_left_out(words):
    assert without_search(["--lora", *words.split(), "--seed", "7"]) == ["--lora", "--seed", "7"]


def test_the_command_line_wins_and_sampling_settings_stay(tmp_path):
    (tmp_path / "r.yaml").write_text("seed: 1\ntf32: off\ngeneration:\n  top_k: 5\n")
    words = ["--config", str(tmp_path / "r.yaml"), "--seed", "2", "--tune", "--tune_steps", "8"]
    assert read_settings(words, str(tmp_path / "r.yaml")) == {"seed": "2", "tf32": "off", "generation": {"top_k": 5}}


def test_a_secret_is_not_written():
    with pytest.raises(UserError, match="hub_token"):
        read_settings(["--hub_token", "x"], None)


VALUES = {
    "learning_rate": 5e-05,
    "adam_beta2": "5.0e-4",
    "model_name_or_path": "2024_01",
    "template": "{title} | {listed_in}: {description}",
    "text_column": "null",
    "max_length": None,
    "lora": True,
    "eval_strategy": "no",
    "sample_prompts": ["", "no", "3: 4", "ein \u201eZitat\u201c"],
    "deepspeed": {"zero_optimization": {"stage": 1, "name": "1"}},
    "run_name": "",
    "dataset": "# x",
}


def test_a_recipe_is_read_as_it_was_typed(tmp_path):
    write_recipe(tmp_path / "r.yaml", VALUES, "first\n  second")
    flags, _ = read_recipe(str(tmp_path / "r.yaml"))
    as_text = {"learning_rate": "5.0e-05", "lora": "true"}
    assert flags == VALUES | as_text
    assert (
        (tmp_path / "r.yaml")
        .read_text()
        .startswith("# first\n#   second\n\nlearning_rate: 5.0e-05\nadam_beta2: 5.0e-4")
    )


def test_trials_are_started_with_flags_that_no_check_refuses(tmp_path):
    """Of the user's, those that a trial would make useless are left out."""
    words = "--eval_strategy steps --eval_steps 5 --eval_delay 2 --load_best_model_at_end true --max_steps 9"
    settings = read_settings([*words.split(), "--lr_scheduler_kwargs", '{"num_cycles": 2}'], None)
    for rungs in ([1, 2, 4], [400]):
        shared = trial_settings(settings, rungs, tmp_path / "trials")
        write_recipe(tmp_path / "trial.yaml", shared, "")
        flags = read_train_flags(["--config", str(tmp_path / "trial.yaml")])
        assert set(flags.other_recipe) == {"metric_for_best_model", "save_steps"}
        assert flags.max_steps == rungs[-1]
        assert 1 <= flags.warmup_steps <= rungs[0], "the first rung ends after the warm-up, whose steps are a number"


def test_a_recipe_is_yaml(tmp_path):
    write_recipe(tmp_path / "r.yaml", {"seed": "7", "eval_strategy": "no"}, "x")
    assert set(yaml.safe_load((tmp_path / "r.yaml").read_text())) == {"seed", "eval_strategy"}
