"""Recipe and command line, read without torch."""

import json
import subprocess

import pytest
from conftest import PYTHON, ROOT, run_program

from neoflix.arguments.reader import is_complete, keep_texts_per_step, read_train_flags
from neoflix.checkpoints.names import RESULTS_FILE, RUN_FILE
from neoflix.runtime.errors import UserError


def test_the_command_line_wins_over_the_recipe_and_the_recipe_over_defaults(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("learning-rate: 1e-4\nseed: 7\noutput_dir: 2024_01\nmax_steps: 010\neval_on_start: off\n")
    flags = read_train_flags(["--config", str(recipe), "--seed", "8", "--local_rank=0"])
    assert (flags.learning_rate, flags.seed, flags.output_dir, flags.max_steps) == (1e-4, 8, "2024_01", 10)
    assert flags.eval_on_start is False
    assert flags.weight_decay == 0.01
    assert flags.command == f"train.py --config {recipe} --seed 8"


def test_flags_are_spelled_with_either_line():
    assert read_train_flags(["--output-dir", "a-b"]).output_dir == "a-b"
    assert read_train_flags(["--output_dir=a-b"]).output_dir == "a-b"
    assert read_train_flags(["--no-eval-on-start"]).eval_on_start is False
    assert read_train_flags(["--plan", "--dataset", "sample"]).plan is True
    assert read_train_flags(["--plan", "false"]).plan is False


def test_hugging_faces_other_flags_are_left_to_its_parser(tmp_path):
    (tmp_path / "recipe.yaml").write_text("adam_beta1: 0.8\nseed: 7\n")
    flags = read_train_flags(["--config", str(tmp_path / "recipe.yaml"), "--adam_beta2", "0.9", "--max_steps", "3"])
    assert (flags.others, flags.other_recipe) == (["--adam_beta2", "0.9"], {"adam_beta1": "0.8"})
    assert (flags.seed, flags.max_steps) == (7, 3)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], True),
        (["--lr_scheduler_type", "linear"], True),
        (["--report_to", "none"], True),
        (["--adam_beta2", "0.9"], False),
        (["word"], False),
        (["--lr_scheduler_type", "foo"], False),
        (["--report_to", "foo"], False),
        (["--eval_strategy", "sometimes"], False),
        (["--deepspeed", '{"gradient_clipping": 0.5}'], False),
        (["--deepspeed", "auto"], True),
    ],
    ids=str,
)
def test_whether_transformers_has_to_check(words, expected):
    assert is_complete(read_train_flags(words)) is expected


def test_the_held_out_texts_of_a_run_are_evaluated(tmp_path):
    texts = {"dataset": "sample", "text_column": "description", "template": None, "validation_fraction": 0.2}
    (tmp_path / RUN_FILE).write_text(json.dumps({"texts": texts}))
    words = ["--eval_only", "--model_name_or_path", str(tmp_path)]
    flags = read_train_flags(words)
    assert (flags.dataset, flags.text_column, flags.validation_fraction) == ("sample", "description", 0.2)
    assert (flags.output_dir, flags.deepspeed, flags.report_to) == ("", None, "none")
    assert read_train_flags([*words, "--dataset", "netflix"]).dataset == "netflix"
    with pytest.raises(UserError, match=f"--output_dir {tmp_path}"):
        read_train_flags([*words, "--output_dir", str(tmp_path)])


@pytest.fixture
def resumed(tmp_path):
    """Flags of a run that had 24 texts per step."""
    (tmp_path / RUN_FILE).write_text(json.dumps({"texts_per_step": 24}))
    (tmp_path / RESULTS_FILE).write_text("{}")
    flags = read_train_flags(["--per_device_train_batch_size", "16"])
    flags.output_dir = str(tmp_path)
    return flags


@pytest.mark.parametrize(("num_processes", "batch", "steps"), [(1, 12, 2), (2, 12, 1), (3, 8, 1), (24, 1, 1)])
def test_a_resumed_run_keeps_its_texts_per_step(resumed, processes, num_processes, batch, steps):
    processes(num_processes)
    keep_texts_per_step(resumed)
    assert (resumed.per_device_train_batch_size, resumed.gradient_accumulation_steps) == (batch, steps)


def test_texts_that_cannot_be_shared_are_refused(resumed, processes):
    processes(5)
    with pytest.raises(UserError, match="24 texts"):
        keep_texts_per_step(resumed)


@pytest.mark.process
def test_help_comes_without_torch_and_the_most_used_flags_first():
    output = run_program(PYTHON, "-X", "importtime", "train.py", "--help")
    assert "| torch\n" not in output
    assert "--help-all" in output
    assert "--adam_beta2" not in output
    assert output.index("--dataset") < output.index("--max_steps")


@pytest.mark.process
def test_wrong_flags_are_refused_without_torch():
    """Not by a launcher's process: the others must hear of it."""
    output = run_program(PYTHON, "-X", "importtime", "train.py", "--seed", "many", expect=2)
    assert "error: argument --seed" in output
    assert "| torch\n" not in output


@pytest.mark.process
def test_the_reader_imports_no_torch():
    code = "import sys, neoflix.arguments.reader, neoflix.arguments.generate; sys.exit('torch' in sys.modules)"
    assert subprocess.run([PYTHON, "-c", code], cwd=ROOT, timeout=60).returncode == 0
