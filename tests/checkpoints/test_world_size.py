"""A run that goes on with another number of processes is the run that never changed."""

import re
import shutil

import pytest
from conftest import assert_same_weights, losses, results
from forked import launch

import train
from neoflix.checkpoints.find import list_checkpoints, list_numbered
from neoflix.checkpoints.manifest import find_corruption
from neoflix.checkpoints.names import UNIVERSAL
from neoflix.checkpoints.world_size import check_loadable, convert

# An epoch has seven steps; no checkpoint but the last falls at its end.
WORDS = ["--max_steps", "12", "--save_strategy", "steps", "--save_steps", "4", "--save_total_limit", "9"]
ZERO_2, ZERO_3, NO_ZERO = "ds_config.json", "ds_configs/zero3_offload.json", "ds_configs/cpu.json"


def die_after(step: int, run, copy):
    """A copy of a run as it was when `checkpoint-{step}` was its newest."""
    shutil.copytree(run, copy)
    for name in ("all_results.json", "model.safetensors"):
        (copy / name).unlink()
    for checkpoint in list_numbered(copy):
        if int(checkpoint.name.split("-")[1]) > step:
            shutil.rmtree(checkpoint)
    return copy


@pytest.fixture
def train_on(train_words, tmp_path, capfd):
    """train_on(2, "name", *words) trains with two processes; returns the run's folder and what it said."""

    def train_on(num_processes: int, name: str, *words: str):
        words = [*train_words, "--output_dir", str(tmp_path / name), *words]
        if num_processes == 1:
            capfd.readouterr()
            train.main(words)
            return tmp_path / name, capfd.readouterr().out
        return tmp_path / name, launch(num_processes, "train.py", *words)

    return train_on


@pytest.mark.parametrize(
    ("deepspeed", "path"),
    [
        (ZERO_2, (1, 2, 1)),
        (ZERO_3, (4, 2)),
        pytest.param(ZERO_2, (4, 2), marks=pytest.mark.slow),
        pytest.param(ZERO_3, (1, 2, 1), marks=pytest.mark.slow),
        pytest.param(NO_ZERO, (1, 2, 1), marks=pytest.mark.slow),
    ],
)
@pytest.mark.process
def test_another_number_of_processes_changes_nothing(train_on, tmp_path, deepspeed, path):
    words = [*WORDS, "--deepspeed", deepspeed, "--per_device_train_batch_size", str(8 // path[0])]
    whole, _ = train_on(path[0], "whole", *words)
    run = whole
    for number, num_processes in enumerate(path[1:], start=1):
        run = die_after(4 * number, run, tmp_path / f"run-{number}")
        _, output = train_on(num_processes, run.name, *words)
        assert f"Resuming from {run}/checkpoint-{4 * number}" in output
        conversions = re.findall(r"checkpoint-\d+ was saved by (\d) process.*converting", output)
        assert conversions == ([] if deepspeed == NO_ZERO else [str(path[number - 1])])
        assert {*run.glob("checkpoint-*")} == {*list_checkpoints(run)}, "something was left behind"
    assert len(losses(run)) == 12
    difference = max(abs(a - b) for a, b in zip(losses(run), losses(whole), strict=True))
    print(f"{deepspeed} on {path} processes: losses differ by at most {difference:.1e}")
    assert difference <= 1e-6
    assert results(run)["eval_loss"] == pytest.approx(results(whole)["eval_loss"], abs=1e-6)
    assert_same_weights(run, whole, atol=1e-5, rtol=1e-4)


@pytest.fixture
def checkpoint(run):
    return run("run", "--max_steps", "2", "--eval_strategy", "no") / "checkpoint-2"


@pytest.mark.parametrize("small_disk", ["2m"], indirect=True)
def test_a_conversion_checks_the_free_space_first(checkpoint, small_disk):
    with pytest.raises(ValueError, match="the conversion takes"):
        convert(checkpoint, small_disk / f"checkpoint-2{UNIVERSAL}")
    assert not list(small_disk.glob(f"*{UNIVERSAL}"))
    assert find_corruption(checkpoint, checksums=True) is None


def test_what_deepspeed_would_not_load_is_refused(checkpoint):
    nvme = {"stage": 2, "offload_optimizer": {"device": "nvme"}}
    check_loadable(checkpoint, {"stage": 1}, 4)
    check_loadable(checkpoint, nvme, 1)
    for zero, num_processes, reason in (
        ({}, 1, "ZeRO stage 2.* does not fit stage 0"),
        ({"stage": 3}, 1, "ZeRO stage 2.* does not fit stage 3"),
        (nvme, 2, r"saved by 1 process\(es\) with the optimizer on NVMe"),
    ):
        with pytest.raises(ValueError, match=reason):
            check_loadable(checkpoint, zero, num_processes)
