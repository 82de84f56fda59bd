"""Trials as child processes: how they end, and how they are stopped."""

import math
import os
import signal
import subprocess
import sys
import time

import pytest

from neoflix.runtime.errors import StoppedEarly, UserError
from neoflix.runtime.files import STOP_FILE
from neoflix.tuning import trials
from neoflix.tuning.trials import Stops, launcher, train_to

PROGRAM = """
import json, os, pathlib, sys, time
words = sys.argv[1:]
run, steps = pathlib.Path(words[words.index("--output_dir") + 1]), int(words[words.index("--max_steps") + 1])
"""


@pytest.fixture
def stops():
    """Requests to stop; the handlers of before come back."""
    before = {number: signal.getsignal(number) for number in trials.SIGNALS}
    yield Stops()
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def train_by(tmp_path, monkeypatch, stops):
    """train_by(code): trains to step 4 by a train.py with this code."""

    def train(code: str) -> float:
        (tmp_path / "train.py").write_text(PROGRAM + code)
        monkeypatch.setattr(trials, "ROOT", tmp_path)
        return train_to(4, tmp_path / "0.yaml", 1, stops)

    return train


FINISH = """
run.mkdir()
(run / "all_results.json").write_text("{}")
(run / "trainer_state.json").write_text(json.dumps({"log_history": [{"step": steps, "eval_loss": 2.5}]}))
"""


@pytest.mark.process
def test_the_loss_of_the_last_step_is_returned(train_by):
    assert train_by(FINISH) == 2.5


@pytest.mark.process
@pytest.mark.parametrize("code", ["sys.exit(3)", "pathlib.Path(os.environ['NEOFLIX_EXIT_CODE_FILE']).write_text('3')"])
def test_a_run_that_diverged_has_an_infinite_loss(train_by, code):
    """Also where the launcher loses the exit code."""
    assert math.isinf(train_by(code))


@pytest.mark.process
def test_a_user_error_is_the_trials_own(train_by):
    with pytest.raises(UserError) as error:
        train_by('print("plan"); print("error: --x y: no such\\n  or z", file=sys.stderr); sys.exit(2)')
    assert str(error.value) == "--x y: no such\n  or z"


@pytest.mark.process
def test_a_crash_is_no_user_error(train_by):
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        train_by("1 / 0")


@pytest.mark.process
def test_a_trial_is_asked_to_save_and_stop_until_it_does(train_by):
    """A run removes the file when it begins to train; Ctrl-C does not reach it."""
    code = f"""
run.mkdir()
os.kill(os.getppid(), {signal.SIGINT:d})
for _ in range(2):
    while not (run / "{STOP_FILE}").exists(): time.sleep(0.01)
    (run / "{STOP_FILE}").unlink()
sys.exit(75)
"""
    with pytest.raises(StoppedEarly, match="SIGINT"):
        train_by(code)


@pytest.mark.process
def test_a_second_ctrl_c_does_not_wait(train_by):
    code = f"""
for _ in range(2):
    os.kill(os.getppid(), {signal.SIGINT:d})
    time.sleep(0.5)
time.sleep(600)
"""
    with pytest.raises(StoppedEarly):
        train_by(code)


@pytest.mark.process
def test_a_trial_that_somebody_else_stopped_stops_the_search(train_by):
    with pytest.raises(StoppedEarly):
        train_by("sys.exit(75)")


@pytest.mark.process
def test_a_killed_search_leaves_no_trial_behind(tmp_path):
    """The kernel sends the trial SIGTERM."""
    code = f"""
import signal
signal.signal(signal.SIGTERM, lambda *_: (pathlib.Path({str(tmp_path / "stopped")!r}).touch(), sys.exit(75)))
pathlib.Path({str(tmp_path / "begun")!r}).touch()
time.sleep(600)
"""
    (tmp_path / "train.py").write_text(PROGRAM + code)
    search = f"""
import pathlib
from neoflix.tuning import trials
trials.ROOT = pathlib.Path({str(tmp_path)!r})
trials.train_to(4, trials.ROOT / "0.yaml", 1, trials.Stops())
"""
    program = subprocess.Popen([sys.executable, "-c", search])
    while not (tmp_path / "begun").exists():
        assert program.poll() is None
        time.sleep(0.05)
    program.kill()
    program.wait()
    while not (tmp_path / "stopped").exists():  # the test's own time limit ends this
        time.sleep(0.05)


def test_the_launcher_is_that_of_a_user(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert launcher(1) == [sys.executable]
    words = launcher(2)
    assert os.path.basename(words[1]) == "deepspeed"
    assert words[-2:] == ["--num_accelerators", "2"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    assert "--num_accelerators" not in launcher(2)
