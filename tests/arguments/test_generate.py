"""The command line of generate.py."""

import re

import pytest
from conftest import PYTHON, ROOT, run_program

from neoflix.arguments.generate import (
    DEFAULT_SWEEP_FOLDER,
    WEB_NUM_SAMPLES,
    parse_fields,
    parse_generate_args,
    parse_sweep,
)
from neoflix.arguments.sampling import SAMPLING_DEFAULTS
from neoflix.runtime.errors import UserError


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


@pytest.mark.process
def test_help_comes_without_torch():
    output = run_program(PYTHON, "-X", "importtime", "generate.py", "--help")
    assert "| torch\n" not in output
    for flag in ("--model_dir", "--prompt", "--judge", *(f"--{name}" for name in SAMPLING_DEFAULTS)):
        assert flag in output
    assert output.index("--num_samples") < output.index("--batch_size"), "the most used come first"


@pytest.mark.process
def test_wrong_flags_are_refused_without_torch():
    output = run_program(PYTHON, "-X", "importtime", "generate.py", "--top_p", "2", expect=2)
    assert "| torch\n" not in output
    assert "error: --top_p 2" in output


def test_keys_of_a_recipe_are_checked(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("output_dir: there\nadam_beta2: 0.9\n")
    assert parse_generate_args(["--config", str(recipe)]).model_dir == "there"
    recipe.write_text("output_dirr: there\n")
    with pytest.raises(UserError, match=r"'output_dirr'.*'output_dir'"):
        parse_generate_args(["--config", str(recipe)])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--sweep", "temprature=1"], "'temprature'"),
        (["--sweep", "temperature"], "--sweep temperature: must be temperature="),
        (["--sweep", "temperature=0.7,hot"], "--sweep temperature=0.7,hot: must be temperature= and numbers"),
        (["--sweep", "top_k=1.5"], "whole numbers"),
        (["--sweep", "temperature=0.7,0"], "--sweep temperature=0.0: "),
        (["--sweep", "top_p=0.5", "top_p=0.9"], "top_p is given twice"),
        (["--sweep", "top_p=0.5", "--novel"], "--novel"),
        (["--stream", "--novel"], "leave out --stream or --novel"),
        (["--stream", "--sweep", "top_p=0.5"], "leave out --stream or --sweep"),
        (["--prompt", "A", "--fields", "title=B"], "--fields"),
        (["--judge", "x.jsonl", "--novel"], "leave out --novel or the file"),
        (["--judge", "x.jsonl", "--output", "y.jsonl"], "leave out --output or the file"),
        (["--judge", "--validation_fraction", "1"], "--validation_fraction 1.0: "),
    ],
)
def test_flags_that_contradict_each_other_or_are_not_valid(words, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        parse_generate_args(words)


def test_judge_alone_judges_new_samples_and_with_a_file_those_in_it():
    for words, expected in (([], (False, None)), (["--judge"], (True, None)), (["--judge", "x"], (False, "x"))):
        args = parse_generate_args(words)
        assert (args.judge, args.judged_file) == expected


def test_output_is_a_file_or_for_a_sweep_a_folder():
    assert parse_generate_args([]).output is None
    assert parse_generate_args(["--sweep", "top_k=1"]).output == DEFAULT_SWEEP_FOLDER
    for words in ([], ["--sweep", "top_k=1"]):
        assert parse_generate_args([*words, "--output", "here"]).output == "here"


def test_sampling_settings_are_the_samplers_keyword_arguments():
    args = parse_generate_args(["--seed", "3", "--top_k", "5"])
    assert args.sampling == dict.fromkeys(SAMPLING_DEFAULTS) | {"seed": 3, "batch_size": None, "top_k": 5}
    assert parse_generate_args(["--batch_size", "7"]).sampling["batch_size"] == 7
    assert parse_generate_args(["--batch_size", "auto"]).sampling["batch_size"] is None


def test_number_of_samples():
    assert parse_generate_args([]).num_samples == 20
    assert parse_generate_args(["--fields_file", "x.csv"]).num_samples == 1
    assert parse_generate_args(["--fields_file", "x.csv", "--num_samples", "3"]).num_samples == 3


@pytest.mark.parametrize(
    "words",
    [
        ["--sweep", "top_p=0.5"],
        ["--novel"],
        ["--output", "x.jsonl"],
        ["--judge"],
        ["--judge", "x.jsonl"],
        ["--stream"],
        ["--fields_file", "x.csv"],
        ["--base_model", "gpt2"],
        ["--prompt", __file__],
    ],
)
def test_the_page_refuses_what_it_does_not_do(words):
    with pytest.raises(UserError, match=f"--web: .*{words[0]}"):
        parse_generate_args(["--web", *words])


@pytest.mark.parametrize("words", [["--web_port", "7860"], ["--web", "--web_port", "70000"]])
def test_the_port_is_that_of_a_page(words):
    with pytest.raises(UserError, match="--web_port"):
        parse_generate_args(words)


def test_the_page_without_gradio(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"-m pip install -r requirements-web\.txt"):
        parse_generate_args(["--web"])


def test_the_page_begins_with_the_flags(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    args = parse_generate_args(["--web", "--temperature", "1.5"])
    assert (args.seed, args.num_samples, args.temperature) == (None, WEB_NUM_SAMPLES, 1.5)
    args = parse_generate_args(["--web", "--seed", "7", "--num_samples", "9"])
    assert (args.seed, args.num_samples) == (7, 9)


def test_fields():
    assert parse_fields(["title=The Last Ferry", "type=", "a=b=c"]) == {
        "title": "The Last Ferry",
        "type": "",
        "a": "b=c",
    }
    for bad in (["title"], ["=x"], ["a=1", "a=2"]):
        with pytest.raises(ValueError, match=f"--fields {bad[-1]}"):
            parse_fields(bad)


def test_a_sweep_is_every_combination():
    assert parse_sweep(["temperature=0.7,1.0", "top_k=0,5"]) == [
        {"temperature": temperature, "top_k": top_k} for temperature in (0.7, 1.0) for top_k in (0, 5)
    ]
    assert parse_sweep(["top_k=5,5"]) == [{"top_k": 5}]
