"""All flags of train.py, by recipe and command line."""

import json
import re
from importlib.util import find_spec

import pytest
from conftest import ROOT

import train
from neoflix.arguments.generate import parse_generate_args
from neoflix.arguments.parse import read_all_flags
from neoflix.arguments.recipes import read_recipe
from neoflix.arguments.sampling import SAMPLING_DEFAULTS
from neoflix.runtime.environment import prepare_environment
from neoflix.runtime.errors import UserError
from neoflix.runtime.processes import exit_code_of

RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))


@pytest.fixture
def parse(tmp_path):
    prepare_environment()

    def parse(*words):
        return read_all_flags(["--output_dir", str(tmp_path / "run"), "--use_cpu", "true", *words])

    return parse


def test_command_line_wins_over_recipe_and_recipe_over_default(parse, tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("learning_rate: 1.0e-4\nseed: 7\nreport_to: [none]\neval_on_start: false\nmax_length: null\n")
    args = parse("--config", str(recipe), "--seed", "8")
    assert (args.learning_rate, args.seed, args.eval_on_start, args.max_length) == (1e-4, 8, False, None)
    assert args.weight_decay == 0.01
    assert args.report_to == ["none"]


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
    flags, _ = read_recipe(str(recipe))
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


def test_deepspeed_file_is_checked_before_anything_else(parse, tmp_path):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"zero_optimisation": {}}))
    with pytest.raises(ValueError, match="zero_optimization"):
        parse("--deepspeed", str(path))


def test_recipes_find_our_deepspeed_files_from_anywhere(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    args = read_all_flags(["--config", str(ROOT / "recipes" / "demo.yaml"), "--output_dir", str(tmp_path / "run")])
    assert args.deepspeed == str(ROOT / "ds_configs" / "cpu.json")


@pytest.mark.parametrize(
    "words", [["--eval_strategy", "sometimes"], ["--optim", "adamm"], ["--lr_scheduler_type", "x"]], ids=lambda w: w[0]
)
def test_what_transformers_refuses_is_a_user_error(words, parse):
    with pytest.raises(UserError):
        parse(*words)


def test_a_bug_in_a_check_is_no_user_error(monkeypatch, parse):
    def check(flags):
        int("a bug")

    monkeypatch.setattr("neoflix.arguments.parse.check_words", check)
    with pytest.raises(ValueError, match="a bug") as caught:
        parse()
    assert not isinstance(caught.value, UserError)


def test_help_all_shows_hugging_faces_flags_too(capsys):
    with pytest.raises(SystemExit) as end:
        read_all_flags(["--help-all"])
    assert not end.value.code
    shown = capsys.readouterr().out
    for flag in ("--adam_beta2", "--dataset", "--lr_scheduler_kwargs"):
        assert flag in shown


def test_where_curves_cannot_go_is_told_at_once(train_words, tmp_path, capfd):
    missing = next(name for name in ("clearml", "neptune", "wandb") if find_spec(name) is None)
    for name, said in (
        (missing, f"{missing}: its package is not installed; `pip install {missing}"),
        ("wandbb", "'wandb'"),
    ):
        assert exit_code_of(lambda: train.main([*train_words, "--report_to", name])) == 2  # noqa: B023 - called here
        assert said in capfd.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "run").exists()
