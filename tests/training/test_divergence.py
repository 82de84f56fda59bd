"""A model that diverged is neither saved nor reported."""

import json
import math
from pathlib import Path

import pytest
from conftest import ON_CPU

import train
from neoflix.checkpoints.find import list_checkpoints
from neoflix.runtime.files import write_json
from neoflix.runtime.processes import exit_code_of

EXPLODES = [*ON_CPU, "--max_steps", "8", "--learning_rate", "1e39", "--max_grad_norm", "1e9", "--warmup_steps", "0"]
EXPLODES += ["--lr_scheduler_type", "constant", "--logging_first_step", "false"]
SPARSE = {
    "large logging_steps": ["--logging_steps", "100"],
    "no log": ["--logging_strategy", "no"],
    "a log an epoch": ["--logging_strategy", "epoch"],
    "nothing held out": ["--logging_steps", "100", "--validation_fraction", "0", "--save_strategy", "no"],
    "an evaluation within": ["--logging_steps", "100", "--eval_strategy", "steps", "--eval_steps", "3"],
    "a save within": [
        "--logging_steps",
        "100",
        "--save_strategy",
        "steps",
        "--save_steps",
        "2",
        "--eval_strategy",
        "no",
    ],
    "the last step alone": ["--logging_steps", "100", "--max_steps", "1", "--validation_fraction", "0"],
}


def read_strictly(path: Path):
    def refuse(token):
        raise AssertionError(f"{path}: {token} is not JSON")

    return json.loads(path.read_text(), parse_constant=refuse)


@pytest.mark.parametrize("name", SPARSE)
@pytest.mark.process
def test_a_diverged_model_is_never_promoted(train_words, tmp_path, capfd, name):
    words = [*train_words, *EXPLODES, *SPARSE[name]]
    assert exit_code_of(lambda: train.main(words)) == 3
    errors = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "use a lower --learning_rate than 1e+39" in errors[0]
    folder = tmp_path / "run"
    assert not (folder / "all_results.json").exists()
    assert not (folder / "model.safetensors").exists()
    assert not list_checkpoints(folder)
    for path in folder.rglob("*.json"):
        read_strictly(path)


def test_json_has_no_nan(tmp_path):
    write_json(tmp_path / "a.json", {"a": [1.5, math.nan, {"b": math.inf}], "c": -math.inf, "d": "NaN"})
    assert read_strictly(tmp_path / "a.json") == {"a": [1.5, None, {"b": None}], "c": None, "d": "NaN"}
