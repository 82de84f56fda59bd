"""`train.py --tune` with real trials of a small model."""

import json
import signal
import subprocess
import time

import pytest
from conftest import ON_CPU, PYTHON, ROOT, environment_without_launcher, results, run_program
from forked import launch

import train
from neoflix.arguments.reader import read_train_flags
from neoflix.checkpoints.find import list_numbered
from neoflix.runtime.errors import RUN_ME_AGAIN
from neoflix.runtime.files import read_json
from neoflix.tuning.search import read_search
from neoflix.tuning.tuner import new_search, tune

USELESS, GOOD, DIVERGES = 1e-9, 3e-3, 1e30


@pytest.fixture
def tune_words(train_words):
    """Three rates, of which the middle one is the best, and rungs of 2, 4 and 8 steps."""
    rates = [str(rate) for rate in (USELESS, GOOD, DIVERGES)]
    return [*train_words, *ON_CPU, "--tune", "--tune_steps", "8", "--tune_rates", *rates]


def starts_of(run) -> list[int]:
    """The steps from which a run was started."""
    return [start["from_step"] for start in json.loads((run / "starts.json").read_text())]


def test_the_best_rate_of_a_search_that_was_stopped(tune_words, tmp_path):
    """Stopped by SIGTERM in its second trial, continued by the same command: nothing is trained twice. The rate that
    diverges does not end it. The recipe that it writes is that of a run."""
    search, trials = tmp_path / "run" / "tune", tmp_path / "run" / "tune" / "trials"
    program = subprocess.Popen([PYTHON, "train.py", *tune_words], cwd=ROOT, env=environment_without_launcher())
    while not (trials / "1" / "run.json").exists() and not (trials / "1" / "all_results.json").exists():
        assert program.poll() is None
        time.sleep(0.01)
    program.send_signal(signal.SIGTERM)
    assert program.wait(timeout=120) == RUN_ME_AGAIN
    first = read_search(search).trials[0].losses
    assert set(first) == {2}
    assert not (trials / "2").exists(), "no trial is started after the request"

    said = run_program(PYTHON, "train.py", *tune_words)
    assert "diverged" in said
    useless, good, diverged = read_search(search).trials
    assert useless.losses[2] == first[2]
    assert [set(each.losses) for each in (useless, good, diverged)] == [{2, 4}, {2, 4, 8}, {2}]
    assert diverged.has_diverged
    assert starts_of(trials / "0") == [0, 2]
    assert sorted(set(starts_of(trials / "1")) - {1}) == [0, 2, 4], "from its own checkpoints"
    assert useless.losses[4] > good.losses[4] > good.losses[8]
    assert not [path for number in "012" for path in list_numbered(trials / number)], "no checkpoint is left"
    assert not list(trials.rglob("*.safetensors"))
    assert f"{GOOD:g}" in (search / "tune.html").read_text()

    assert "Trials" not in run_program(PYTHON, "train.py", *tune_words), "there is nothing left to train"
    best = tmp_path / "best"
    train.main(["--config", str(search / "best.yaml"), "--num_train_epochs", "1", "--output_dir", str(best)])
    assert read_json(best / "run.json", {})["arguments"]["learning_rate"] == GOOD


def test_a_longer_trial_continues_a_shorter_one(tune_words, tmp_path):
    """Bit for bit: the rate does not depend on the rung."""
    words = tune_words[:-3]
    flags = read_train_flags([*words, str(GOOD)])
    search = new_search(flags, [*words, str(GOOD)], tmp_path / "tune", None)
    search.save()
    recipe = str(search.recipe(search.trials[0]))
    for steps in (2, 4, 8):
        train.main(["--config", recipe, "--output_dir", str(tmp_path / "rungs"), "--max_steps", str(steps)])
    train.main(["--config", recipe, "--output_dir", str(tmp_path / "whole")])
    assert results(tmp_path / "rungs")["eval_loss"] == results(tmp_path / "whole")["eval_loss"]
    assert results(tmp_path / "rungs")["global_step"] == 8


def test_a_user_error_of_a_trial_ends_the_search_with_its_sentence(tune_words, tmp_path):
    (tmp_path / "few.csv").write_text("description\n" + "The same few words.\n" * 2)
    said = run_program(PYTHON, "train.py", *tune_words, "--dataset", str(tmp_path / "few.csv"), expect=2)
    assert said.count("error: ") == 1
    assert "one distinct text" in said
    assert "Traceback" not in said
    assert "Trials" in said, "the plan did not know it"


def test_a_launcher_cannot_start_a_search(tune_words, tmp_path):
    said = launch(1, "train.py", *tune_words, expect=2)
    assert said.count("error: --tune") == 1
    assert not (tmp_path / "run").exists()


def test_an_array_is_written_trained_and_read(tune_words, train_words, tmp_path, capsys, monkeypatch):
    def search(*words: str) -> str:
        capsys.readouterr()
        words = [*tune_words, *words]
        tune(read_train_flags(words), words)
        return capsys.readouterr().out

    trials = tmp_path / "run" / "tune" / "trials"
    assert f"sbatch --array=0-2 launch.sh --config {trials}/%a.yaml" in search("--tune", "array")
    monkeypatch.setattr("neoflix.tuning.tuner.train_to", lambda *_: pytest.fail("only SLURM trains an array's trials"))
    for number in (0, 1):
        train.main(["--config", str(trials / f"{number}.yaml"), "--output_dir", str(trials / str(number))])
    said = search()
    assert "sbatch --array=2 " in said, "the one without a result"
    assert f"Best: rate {GOOD:g}" in said
    assert read_search(tmp_path / "run" / "tune").trials[1].losses.keys() == {8}
