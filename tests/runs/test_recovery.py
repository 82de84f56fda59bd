"""Whatever ends a run early, the same command goes on to the same result: stops, kills, full disks, other numbers of
processes. Through train.main, and through the real `deepspeed` launcher with two processes."""

import argparse
import re
import shutil
import signal
from pathlib import Path

import pytest
from conftest import PYTHON, ROOT, losses, results, run_program
from forked import launch
from soak import Life, compare, fingerprint
from soak import train_words as train_words_of

import train
from neoflix.checkpoints.find import list_checkpoints, list_numbered
from neoflix.runtime.errors import RUN_ME_AGAIN, StoppedEarly
from neoflix.runtime.processes import exit_code_of
from neoflix.training import saving
from neoflix.training.callbacks import StopOnRequest

# Dropout, so that random states count; an evaluation within each of three epochs of seven steps and at its end.
RESTLESS = ["--model_name_or_path", "demo", "--num_train_epochs", "3", "--early_stopping_patience", "1"]


def assert_same_run(one, other) -> None:
    assert not compare(fingerprint(one), fingerprint(other))
    mine, others = results(one), results(other)
    for key in ("eval_loss", "perplexity", "saved_step", "global_step", "epoch"):
        assert mine[key] == others[key], key


@pytest.fixture
def stop_after(monkeypatch):
    """stop_after(3, 7): a request to stop comes during the third step, and again during the seventh."""

    def stop_after(*steps: int) -> None:
        steps, on_step_end = list(steps), StopOnRequest.on_step_end

        def request(self, args, state, control, **kwargs):
            if steps and state.global_step == steps[0]:
                steps.pop(0)
                (Path(args.output_dir) / "STOP").touch()
            on_step_end(self, args, state, control, **kwargs)

        monkeypatch.setattr(StopOnRequest, "on_step_end", request)

    return stop_after


@pytest.mark.parametrize(
    ("deepspeed", "words"),
    [
        ("ds_config.json", ["--eval_strategy", "epoch", "--save_strategy", "epoch"]),
        ("ds_configs/cpu.json", ["--eval_strategy", "epoch", "--save_strategy", "steps", "--save_steps", "7"]),
    ],
    ids=["zero-2", "zero-0"],
)
def test_stopped_anywhere_is_never_stopped(run, tmp_path, stop_after, deepspeed, words):
    """Within an epoch, at the end of one (whose evaluation still counts), and one step before the last."""
    words = [*RESTLESS, "--deepspeed", deepspeed, *words]
    whole = run("whole", *words)
    stops = (3, 7, 20)
    stop_after(*stops)
    for step in stops:
        with pytest.raises(StoppedEarly, match=f"after step {step} .STOP in .*the same command"):
            run("stopped", *words)
        assert list_checkpoints(tmp_path / "stopped")[-1].name == f"checkpoint-{step}"
        assert not (tmp_path / "stopped" / "STOP").exists()
        report = (tmp_path / "stopped" / "report.html").read_text()
        assert f"not finished: step {step} of 21" in report
    stopped = run("stopped", *words)
    assert losses(stopped, "eval_loss") == losses(whole, "eval_loss")
    assert_same_run(stopped, whole)


def test_a_run_that_died_after_its_last_checkpoint_takes_no_step_more(run, tmp_path):
    words = ["--max_steps", "10", "--eval_strategy", "epoch", "--save_strategy", "steps", "--save_steps", "5"]
    whole = run("whole", *words)
    died = tmp_path / "died"
    shutil.copytree(whole, died)
    (died / "all_results.json").unlink()
    (died / "model.safetensors").unlink()
    run("died", *words)
    assert results(died)["global_step"] == 10
    assert [path.name for path in list_numbered(died)] == ["checkpoint-5", "checkpoint-10"]
    assert_same_run(died, whole)


def test_a_run_that_died_after_it_had_stopped_early_stays_stopped(run, tmp_path):
    """--early_stopping_patience is counted out in the last checkpoint: another epoch would be another run."""
    words = ["--num_train_epochs", "9", "--learning_rate", "1", "--early_stopping_patience", "1"]
    whole = run("whole", *words)
    assert results(whole)["epoch"] < 9
    died = tmp_path / "died"
    shutil.copytree(whole, died)
    (died / "all_results.json").unlink()
    run("died", *words)
    assert_same_run(died, whole)


def test_a_stop_file_from_before_the_start_means_nothing(run, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "STOP").touch()
    assert results(run("run", "--max_steps", "2"))["global_step"] == 2


def test_asked_to_stop_before_the_first_step_it_takes_none(run, tmp_path, monkeypatch):
    monkeypatch.setattr("neoflix.runtime.stop_requests._requests", ["SIGUSR1"])
    with pytest.raises(StoppedEarly, match=r"before a step was taken \(SIGUSR1\)"):
        run("run")
    assert list_numbered(tmp_path / "run") == []


# ---- full disks -------------------------------------------------------------------------------------------------

EVERY_SECOND = ["--max_steps", "6", "--eval_strategy", "no", "--save_strategy", "steps", "--save_steps", "2"]


@pytest.fixture
def disk_fills_up_in_save(small_disk, monkeypatch):
    """disk_fills_up_in_save(4): after checkpoint-4 has found its space free, something else takes it."""
    ballast = small_disk / "ballast"

    def fill_up_in(*steps: int):
        steps, make_folder = list(steps), saving.make_folder

        def make_folder_and_fill(unfinished, *args):
            ballast.unlink(missing_ok=True)
            make_folder(unfinished, *args)
            step = int(re.match(r"checkpoint-(\d+)", unfinished.name)[1])
            if step in steps:
                steps.remove(step)
                ballast.write_bytes(bytes(shutil.disk_usage(small_disk).free - 200_000))

        monkeypatch.setattr(saving, "make_folder", make_folder_and_fill)
        return ballast

    return fill_up_in


def test_a_disk_too_small_for_the_checkpoints_is_refused_at_once(train_words, small_disk, capfd):
    words = [*train_words, "--output_dir", str(small_disk / "run"), "--model_name_or_path", "demo"]
    assert exit_code_of(lambda: train.main(words)) == 2
    assert re.search(r"too large: .* GiB of disk, .* 3 checkpoints", capfd.readouterr().err)  # by the plan
    assert exit_code_of(lambda: train.main([*words, "--plan_must_fit", "false"])) == 2
    said = capfd.readouterr()
    assert "warning: by its plan this run does not fit" in said.out
    assert "3 checkpoints side by side need another" in said.err  # by the model itself
    assert "'loss'" not in said.out


@pytest.mark.parametrize("small_disk", ["16m"], indirect=True)
def test_a_disk_that_fills_up_stops_the_run_and_harms_nothing(run, disk_fills_up_in_save, small_disk, capfd):
    whole = run("whole", *EVERY_SECOND)
    words = [*EVERY_SECOND, "--output_dir", str(small_disk / "run")]
    ballast = disk_fills_up_in_save(4)
    with pytest.raises(ValueError, match=r"checkpoint-4 .*written"):
        run("", *words)
    assert [path.name for path in (small_disk / "run").glob("checkpoint-*")] == ["checkpoint-2"]
    ballast.unlink()
    capfd.readouterr()
    run("", *words)
    assert "Resuming from" in capfd.readouterr().out
    assert_same_run(small_disk / "run", whole)


# ---- two processes ----------------------------------------------------------------------------------------------

TWO = argparse.Namespace(steps=24, deepspeed="ds_config.json")  # a checkpoint every second step, soak.py's run


@pytest.fixture(scope="module")
def untouched(tmp_path_factory):
    run = tmp_path_factory.mktemp("two") / "untouched"
    launch(2, *train_words_of(run, TWO))
    return run


@pytest.mark.xdist_group("untouched")
def test_a_run_asked_to_stop_in_any_way_goes_on_to_the_same_result(untouched, tmp_path, monkeypatch):
    """DeepSpeed's launcher loses the exit code where it is itself killed; the run leaves it in a file of its own."""
    code = tmp_path / "code"
    monkeypatch.setenv("NEOFLIX_EXIT_CODE_FILE", str(code))
    folder = tmp_path / "run"
    for target, number, exit_code, reason in (
        ("rank 1", signal.SIGUSR1, RUN_ME_AGAIN, "SIGUSR1"),
        ("launcher", signal.SIGTERM, 1, "SIGTERM"),
        ("command", signal.SIGTERM, -signal.SIGTERM, "DeepSpeed's launcher is gone"),
    ):
        life = Life(folder, TWO)
        assert life.await_first_step()
        life.kill(target, number)
        assert life.wait() == exit_code
        assert code.read_text() == f"{RUN_ME_AGAIN}\n"
        step = re.search(r"Stopped after step (\d+) \(" + reason, life.log.read_text())[1]
        assert list_checkpoints(folder)[-1].name == f"checkpoint-{step}"
        code.unlink()
    launch(2, *train_words_of(folder, TWO))
    assert code.read_text() == "0\n"
    assert_same_run(folder, untouched)


@pytest.mark.xdist_group("untouched")
def test_kills_change_nothing(untouched, tmp_path):
    """A rank that is killed ends the job and is named; the last kill falls into a save. `make soak` has thirty, at
    random moments."""
    folder = tmp_path / "run"
    for target, in_save in (("rank 0", False), ("rank 1", False), ("all ranks", True)):
        newest = next(iter(list_checkpoints(folder)[::-1]), None)
        life = Life(folder, TWO)
        assert life.await_first_step()
        assert life.await_moment(0.1, in_save)
        assert life.kill(target) < 60
        assert life.wait() != 0
        assert life.chosen() == newest
        said = re.findall(r"^error: .*", life.log.read_text(), re.MULTILINE)
        if target != "all ranks":
            assert len(said) == 1, "not one sentence, once"
            named = rf"error: {target} \(process \d+ on \S+\) was killed or crashed; .*: \S+"
            assert re.match(named, said[0])
    launch(2, *train_words_of(folder, TWO))
    assert_same_run(folder, untouched)


def driver(tmp_path, code: str) -> str:
    """train.py with a few lines before it: what goes wrong in one of its processes."""
    script = tmp_path / "driver.py"
    script.write_text(f"import os, sys\nsys.path.insert(0, {str(ROOT)!r})\n{code}\nimport train\n")
    with script.open("a") as file:
        file.write("from neoflix.runtime.processes import run_and_exit\nrun_and_exit(train.main)\n")
    return str(script)


def test_a_rank_that_fails_ends_the_job_in_its_own_words(train_words, tmp_path):
    script = driver(
        tmp_path,
        """
from neoflix.training.callbacks import StopOnRequest
def fail(self, args, state, control, **kwargs):
    if state.global_step == 3 and os.environ["RANK"] == "1":
        raise ZeroDivisionError("of our own making")
StopOnRequest.on_step_end = fail
""",
    )
    output = launch(2, script, *train_words, expect=1)
    pattern = (
        r"error: rank 1 \(process \d+ on \S+\) failed \(ZeroDivisionError: of our own making\); .*training, step 3"
    )
    assert len(re.findall(pattern, output)) == 1


@pytest.mark.parametrize("small_disk", ["24m"], indirect=True)
def test_a_full_disk_ends_two_processes_with_one_sentence(train_words, small_disk, tmp_path):
    script = driver(
        tmp_path,
        f"""
import shutil
from neoflix.training import saving
make_folder = saving.make_folder
def make_folder_and_fill(unfinished, *args):
    make_folder(unfinished, *args)
    if unfinished.name.startswith("checkpoint-4."):
        open("{small_disk}/ballast", "wb").write(bytes(shutil.disk_usage("{small_disk}").free - 200_000))
saving.make_folder = make_folder_and_fill
""",
    )
    words = [*train_words, *EVERY_SECOND, "--output_dir", small_disk / "run"]
    output = launch(2, script, *words, expect=2)
    assert output.count("could not be written") == 1
    assert "Traceback" not in output
    assert [path.name for path in (small_disk / "run").glob("checkpoint-*")] == ["checkpoint-2"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "deepspeed",
    ["ds_config.json", "ds_configs/cpu.json", "ds_configs/zero3_offload.json", "ds_configs/one_card.json"],
)
def test_thirty_kills_change_nothing(deepspeed):
    run_program(PYTHON, "benchmarks/soak.py", "--kills", "30", "--deepspeed", deepspeed, timeout=1800)
