"""Recipes, the command line, and what is refused before anything is loaded."""

import json
import re
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path

import pytest
from conftest import ROOT

import train
from neoflix.arguments.generate import parse_generate_args
from neoflix.arguments.parse import parse_train_args
from neoflix.arguments.recipes import read_recipe
from neoflix.arguments.sampling import SAMPLING_DEFAULTS
from neoflix.arguments.training import TrainArguments
from neoflix.runtime.environment import prepare_environment
from neoflix.runtime.errors import UserError
from neoflix.runtime.processes import exit_code_of

RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))


@pytest.fixture
def parse(tmp_path):
    prepare_environment()

    def parse(*words):
        return parse_train_args(["--output_dir", str(tmp_path / "run"), "--use_cpu", "true", *words])

    return parse


def test_no_argument_is_the_promised_run(parse):
    args = parse()
    assert args.model_name_or_path == "EleutherAI/gpt-neo-2.7B"
    assert (args.dataset, args.text_column, args.validation_fraction) == ("netflix", None, 0.1)
    assert args.deepspeed == str(ROOT / "ds_config.json")
    assert parse_train_args(["--use_cpu", "true"]).output_dir == "results"
    assert not args.bf16
    assert not args.fp16


def test_command_line_wins_over_recipe_and_recipe_over_default(parse, tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("learning_rate: 1.0e-4\nseed: 7\nreport_to: [none]\neval_on_start: false\nmax_length: null\n")
    args = parse("--config", str(recipe), "--seed", "8")
    assert (args.learning_rate, args.seed, args.eval_on_start, args.max_length) == (1e-4, 8, False, None)
    assert args.weight_decay == 0.01
    assert args.report_to == []


def test_every_hugging_face_flag_works(parse):
    args = parse("--adam_beta2", "0.95", "--lr_scheduler_type", "linear", "--max_steps=3", "--local_rank=0")
    assert (args.adam_beta2, args.lr_scheduler_type, args.max_steps) == (0.95, "linear", 3)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipes_parse(parse, path, tmp_path):
    words = [] if path.stem == "demo" else ["--bf16", "false", "--fp16", "false"]
    if path.stem in ("own-jsonl", "txt-folder"):  # the data set is the user's
        (tmp_path / "mine.jsonl").write_text('{"text": "A text."}\n')
        words += ["--dataset", str(tmp_path / "mine.jsonl")]
    args = parse("--config", str(path), *words)
    assert set(args.generation) >= set(SAMPLING_DEFAULTS)


def test_default_recipe_says_what_the_defaults_are(parse, tmp_path):
    recipe = ROOT / "recipes" / "gpt-neo-2.7b.yaml"
    flags, _ = read_recipe(str(recipe), {field.name for field in fields(TrainArguments)})
    defaults, by_recipe = parse(), parse("--config", str(recipe))
    assert len(flags) > 8
    for key in flags:
        assert getattr(defaults, key) == getattr(by_recipe, key), key


def test_article_recipe_holds_the_articles_settings(parse):
    args = parse("--config", str(ROOT / "recipes" / "article.yaml"))
    assert args.model_name_or_path.lower() == "eleutherai/gpt-neo-1.3b"
    assert (args.num_train_epochs, args.per_device_train_batch_size, args.gradient_accumulation_steps) == (5, 2, 1)
    assert (args.warmup_steps, args.weight_decay) == (100, 0.01)
    sampling = parse_generate_args(["--config", str(ROOT / "recipes" / "article.yaml")])
    assert (sampling.temperature, sampling.top_k, sampling.top_p, sampling.num_samples) == (1.9, 50, 0.95, 20)


BAD_WORDS = {
    "unknown flag": (["--learning_rat", "1"], "did you mean '--learning_rate'"),
    "not a number": (["--seed", "many"], "--seed"),
    "fraction": (["--validation_fraction", "1.5"], "validation_fraction 1.5"),
    "no learning": (["--learning_rate", "0"], "learning_rate"),
    "no batch": (["--per_device_train_batch_size", "0"], "per_device_train_batch_size"),
    "too short": (["--max_length", "2"], "max_length"),
    "impatient": (["--early_stopping_patience", "-1"], "early_stopping_patience"),
    "no recipe": (["--config", "none.yaml"], "cannot be read"),
    "no deepspeed file": (["--deepspeed", "none.json"], "cannot be read"),
    "unknown scheduler": (["--lr_scheduler_type", "cosin"], "cosin"),
}


@pytest.mark.parametrize("case", BAD_WORDS)
def test_bad_words_are_told(parse, case):
    words, message = BAD_WORDS[case]
    with pytest.raises(ValueError, match=re.escape(message)):
        parse(*words)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rat: 1", "unknown key 'learning_rat'; did you mean 'learning_rate'"),
        ("generation:\n  temprature: 1", "unknown key 'temprature'; did you mean 'temperature'"),
        ("a: b: c", "not valid YAML"),
        ("- just\n- a list", "flag: value"),
    ],
)
def test_bad_recipes_are_told(parse, tmp_path, text, message):
    recipe = tmp_path / "bad.yaml"
    recipe.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        parse("--config", str(recipe))
    assert "\n" not in str(error.value)


def test_output_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        parse_train_args(["--output_dir", str(tmp_path / "file" / "run")])
    with pytest.raises(ValueError, match="cannot write in /proc"):  # not even root can
        parse_train_args(["--output_dir", "/proc/run"])


def test_deepspeed_file_is_checked_before_anything_else(parse, tmp_path):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"zero_optimisation": {}}))
    with pytest.raises(ValueError, match="zero_optimization"):
        parse("--deepspeed", str(path))


@pytest.mark.parametrize(
    "words",
    [
        ["--temperature", "0"],
        ["--temperature", "-1"],
        ["--top_p", "0"],
        ["--top_p", "1.1"],
        ["--top_k", "-1"],
        ["--num_samples", "0"],
        ["--batch_size", "0"],
        ["--max_new_tokens", "0"],
        ["--repetition_penalty", "0"],
    ],
)
def test_sampling_settings_that_mean_nothing(words):
    with pytest.raises(ValueError, match=words[0]):
        parse_generate_args(words)


def test_generate_finds_the_run_of_a_recipe():
    assert parse_generate_args([]).model_dir == "results"
    assert parse_generate_args(["--config", str(ROOT / "recipes" / "article.yaml")]).model_dir == "results-article"
    assert parse_generate_args(["--output_dir", "elsewhere"]).model_dir == "elsewhere"


def test_recipes_find_our_deepspeed_files_from_anywhere(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    args = parse_train_args(["--config", str(ROOT / "recipes" / "demo.yaml"), "--output_dir", str(tmp_path / "run")])
    assert args.deepspeed == str(ROOT / "ds_configs" / "cpu.json")


def test_auto_is_decided_once_and_told_to_all(monkeypatch, model_dir, catalogue, parse):
    """By the main process, whose answer names a file of the project's, wherever that lies."""
    asked = []

    def ask(function, *args):
        asked.append(function(*args))
        return asked[-1]

    monkeypatch.setattr("neoflix.arguments.parse.run_on_main_process", ask)
    words = ["--model_name_or_path", str(model_dir), "--dataset", str(catalogue)]
    args = parse(*words, "--deepspeed", "auto", "--tokens_per_device_batch", "auto")
    (choices,) = asked
    assert (ROOT / choices["deepspeed"]).is_file()
    assert not Path(choices["deepspeed"]).is_absolute()
    assert Path(args.deepspeed).resolve() == (ROOT / choices["deepspeed"]).resolve()
    assert args.tokens_per_device_batch == choices["tokens_per_device_batch"] > 0


@pytest.mark.parametrize(
    "words", [["--eval_strategy", "sometimes"], ["--optim", "adamm"], ["--lr_scheduler_type", "x"]], ids=lambda w: w[0]
)
def test_what_transformers_refuses_is_a_user_error(words, parse):
    with pytest.raises(UserError):
        parse(*words)


def test_a_bug_in_a_check_is_no_user_error(monkeypatch, parse):
    def check(self):
        int("a bug")

    monkeypatch.setattr(TrainArguments, "check", check)
    with pytest.raises(ValueError, match="a bug") as caught:
        parse()
    assert not isinstance(caught.value, UserError)


def test_where_curves_cannot_go_is_told_at_once(train_words, tmp_path, capfd):
    missing = next(name for name in ("clearml", "neptune", "wandb") if find_spec(name) is None)
    for name, said in (
        (missing, f"{missing}: its package is not installed; `pip install {missing}"),
        ("wandbb", "'wandb'"),
    ):
        assert exit_code_of(lambda: train.main([*train_words, "--report_to", name])) == 2  # noqa: B023 - called here
        assert said in capfd.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "run").exists()
