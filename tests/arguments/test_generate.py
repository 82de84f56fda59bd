"""The command line of generate.py."""

import pytest
from conftest import PYTHON, ROOT, run_program

from neoflix.arguments.generate import parse_generate_args
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


def test_help_comes_without_torch():
    output = run_program(PYTHON, "-X", "importtime", "generate.py", "--help")
    assert "| torch\n" not in output
    for flag in ("--model_dir", "--prompt", "--judge", *(f"--{name}" for name in SAMPLING_DEFAULTS)):
        assert flag in output
    assert output.index("--num_samples") < output.index("--batch_size"), "the most used come first"


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
