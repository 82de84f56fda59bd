"""What a run records."""

import json
from dataclasses import fields

import pytest
from conftest import save_checkpoint

from neoflix.arguments.training import TrainArguments
from neoflix.checkpoints.names import RESULTS_FILE, RUN_FILE
from neoflix.checkpoints.runs import (
    NOT_COMPARED,
    RECORDED_ELSEWHERE,
    describe_deepspeed,
    find_run,
    read_texts_per_step,
    save_results,
    save_run,
)
from neoflix.checkpoints.same_run import OVERRIDABLE
from neoflix.runtime.errors import UserError


def test_every_argument_is_recorded_or_known_to_change_nothing(describe):
    names = {field.name for field in fields(TrainArguments)}
    assert names - set(describe()["arguments"]) <= NOT_COMPARED | RECORDED_ELSEWHERE
    assert set(OVERRIDABLE) <= set(describe()["arguments"])


def test_half_precision_settings_count_where_they_are_used():
    block = {"fp16": {"enabled": False, "initial_scale_power": 12}, "bf16": {"enabled": True}}
    assert describe_deepspeed(block) == {"bf16.enabled": True}
    assert describe_deepspeed(block | {"fp16": {"enabled": True, "hysteresis": 1}}) == {
        "fp16.enabled": True,
        "fp16.hysteresis": 1,
        "bf16.enabled": True,
    }


def test_texts_per_step_are_known_where_a_run_goes_on(tmp_path):
    (tmp_path / RUN_FILE).write_text(json.dumps({"texts_per_step": 32}))
    assert read_texts_per_step(str(tmp_path), None) is None, "nothing was trained yet: the command decides"
    checkpoint = save_checkpoint(tmp_path / "checkpoint-1", 1)
    assert read_texts_per_step(str(tmp_path), None) == 32
    assert read_texts_per_step("elsewhere", str(checkpoint)) == 32


def test_a_folder_or_one_of_its_checkpoints_belongs_to_its_run(tmp_path):
    save_run(str(tmp_path), {"model": "demo"})
    (tmp_path / "checkpoint-2").mkdir()
    assert find_run(tmp_path) == find_run(tmp_path / "checkpoint-2") == {"model": "demo"}
    (tmp_path / "samples").mkdir()
    assert find_run(tmp_path / "samples") is None
    (tmp_path / RUN_FILE).write_text("{")
    with pytest.raises(UserError, match=RUN_FILE):
        find_run(tmp_path)


def test_a_run_that_takes_a_step_is_not_finished_any_more(tmp_path):
    save_results(str(tmp_path), {"eval_loss": 1.0})
    save_run(str(tmp_path), {"model": "demo"})
    assert not (tmp_path / RESULTS_FILE).exists()
    assert (tmp_path / RUN_FILE).is_file()
