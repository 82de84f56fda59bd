"""A recipe's value means what was typed, by its flag's own type."""

import json

import pytest
from forked import launch

from neoflix.arguments.generate import parse_generate_args
from neoflix.arguments.parse import read_all_flags
from neoflix.arguments.recipes import read_recipe
from neoflix.runtime.environment import prepare_environment
from neoflix.runtime.errors import UserError

DEMO = "model_name_or_path: demo\ndataset: sample\ndeepspeed: ds_configs/cpu.json\n"


@pytest.fixture
def parse(tmp_path):
    """parse(recipe's text, *words) -> train.py's flags."""
    prepare_environment()

    def parse(text: str, *words: str):
        recipe = tmp_path / "recipe.yaml"
        recipe.write_bytes((DEMO + text).encode() if isinstance(text, str) else text)
        output = [] if "output" in str(text) else ["--output_dir", str(tmp_path / "run")]
        return read_all_flags(["--config", str(recipe), "--use_cpu", "true", *output, *words])

    return parse


@pytest.mark.parametrize(
    ("text", "name", "expected"),
    [
        ("eval_strategy: no", "eval_strategy", "no"),
        ("eval_strategy: No", None, "must be one of no, steps, epoch"),
        ("output_dir: 2024_01", "output_dir", "2024_01"),
        ("output_dir: 2024-01-31", "output_dir", "2024-01-31"),
        ("output_dir: 0x1F", "output_dir", "0x1F"),
        ("output_dir: 1.10", "output_dir", "1.10"),
        ("output_dir: 12:30", "output_dir", "12:30"),
        ("run_name: true", "run_name", "true"),
        ("run_name: 'null'", "run_name", "null"),
        ("run_name: -x", "run_name", "-x"),
        ("learning_rate: 1e-4", "learning_rate", 1e-4),
        ("learning_rate: 1E-4", "learning_rate", 1e-4),
        ("seed: 010", "seed", 10),
        ("seed: 1_000", "seed", 1000),
        ("lora_alpha: 8\nlora: on\nmodel_name_or_path: x", None, "'model_name_or_path' is given twice"),
        ("eval_on_start: off", "eval_on_start", False),
        ("eval_on_start: yes", "eval_on_start", True),
        ("eval_on_start: 'no'", "eval_on_start", False),
        ("learning-rate: 1e-3", "learning_rate", 1e-3),
        ("report_to: none", "report_to", ["none"]),
        ("report_to: [tensorboard]", "report_to", ["tensorboard"]),
        ("sample_prompts: [no, 1e-4, a b]", "sample_prompts", ["no", "1e-4", "a b"]),
        ("save_total_limit: null", "save_total_limit", None),
        ("max_length:", "max_length", None),
        ("lr_scheduler_kwargs: {num_cycles: 1e-1}", "lr_scheduler_kwargs", {"num_cycles": 0.1}),
        ("seed:", None, "seed is empty"),
        ("seed: [1, 2]", None, "seed takes one value, not a list"),
        ("seed: {a: 1}", None, "seed takes one value, not a block"),
        ("report_to: [[a]]", None, "report_to: must be a list of plain values"),
        ("seed: many", None, "seed: invalid int value: 'many'"),
        ("seed: 1.0", None, "seed: invalid int value: '1.0'"),
        ("learning_rate: .nan", None, "learning_rate: invalid float value"),
        ("learning_rate: nan", None, "--learning_rate nan: must be above 0"),
        ("seed: 1\nseed: 2", None, "'seed' is given twice"),
        ("max-steps: 1\nmax_steps: 2", None, "'max_steps' is given twice"),
        ("lr_scheduler_kwargs: {a: 1, a: 2}", None, "'a' is given twice"),
        ("[a]: 1", None, "has no name before its colon"),
        ("config: other.yaml", None, "unknown key 'config'"),
        ("generation: {temperature: 0}", None, "generation: temperature 0: must be above 0"),
        ("generation: {temperature: nan}", None, "generation: temperature nan: must be above 0"),
        ("generation: {temperature: .inf}", None, "generation: temperature: must be a number"),
        ("generation: {temperature: hot}", None, "generation: temperature: must be a number"),
        ("generation: {temperature: }", None, "generation: temperature: must be a number"),
        ("generation: {temperature: [1]}", None, "generation: temperature: must be a number"),
        ("generation: {top_k: 1.5}", None, "generation: top_k: must be a whole number"),
        ("generation: {num_samples: 0}", None, "generation: num_samples 0: must be 1 or more"),
        ("generation: {top_k: 1, top-k: 2}", None, "generation: 'top-k' is given twice"),
        ("generation: 5", None, "generation: must hold"),
    ],
)
def test_a_value_is_what_was_typed(parse, text, name, expected):
    if name is None:
        with pytest.raises(UserError) as error:
            parse(text)
        assert expected in str(error.value)
        assert "\n" not in str(error.value)
    else:
        assert getattr(parse(text), name) == expected


def test_files_with_a_byte_order_mark_or_nothing_in_them(parse, tmp_path):
    assert parse("\ufeff".encode() + DEMO.encode() + b"seed: 7\r\n").seed == 7
    for text in ("", "# nothing\n", "---\n"):
        (tmp_path / "empty.yaml").write_text(text)
        assert read_recipe(str(tmp_path / "empty.yaml")) == ({}, {})


def test_only_one_recipe(parse):
    with pytest.raises(UserError, match="--config is given twice"):
        parse("seed: 1", "--config=other.yaml")


def test_a_deepspeed_file_may_be_part_of_the_recipe(parse):
    block = "{zero_optimization: {stage: 0}, bf16: {enabled: auto}}"
    args = parse(f"model_name_or_path: demo\ndataset: sample\ndeepspeed: {block}\n".encode())
    assert json.loads(args.deepspeed) == {"zero_optimization": {"stage": 0}, "bf16": {"enabled": "auto"}}


def test_the_number_of_samples_is_no_setting_of_a_model(parse, tmp_path):
    args = parse("generation: {temperature: 1.9, num_samples: 7}")
    assert args.generation["temperature"] == 1.9
    assert "num_samples" not in args.generation
    recipe = str(tmp_path / "recipe.yaml")
    assert parse_generate_args(["--config", recipe]).num_samples == 7


def test_generate_py_reads_the_folder_as_typed(tmp_path):
    (tmp_path / "recipe.yaml").write_text("output-dir: 2024_01\n")
    assert parse_generate_args(["--config", str(tmp_path / "recipe.yaml")]).model_dir == "2024_01"


@pytest.mark.process
def test_a_program_says_where(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(DEMO + "seed: 1\nseed: 2\n")
    for words in ([], ["--plan"]):
        output = launch(0, "train.py", "--config", recipe, *words, expect=2)
        assert f"error: --config {recipe}: 'seed'" in output
