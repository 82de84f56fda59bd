"""A run's folder is open for one run at a time."""

import os

import pytest
from conftest import list_names
from forked import launch

import train
from neoflix.checkpoints import run_folder
from neoflix.checkpoints.names import LIST_FILE, LOCK_FILE
from neoflix.checkpoints.ownership import read_list
from neoflix.checkpoints.run_folder import check_held, claim, open_run_folder
from neoflix.runtime.errors import UserError
from neoflix.runtime.processes import exit_code_of


def test_a_folder_is_claimed_once(tmp_path):
    claim(str(tmp_path / "run"))
    owned = read_list(tmp_path / "run")
    claim(str(tmp_path / "run"))
    assert read_list(tmp_path / "run") == owned
    assert list_names(tmp_path / "run") == []


def test_a_lost_lock_is_noticed_before_anything_is_saved(tmp_path, monkeypatch):
    with open_run_folder(str(tmp_path / "run")):
        check_held(tmp_path / "run")
        monkeypatch.setattr(run_folder.Lock, "is_held", lambda self: False)
        with pytest.raises(UserError, match="suspended"):
            check_held(tmp_path / "run")
        monkeypatch.undo()


@pytest.mark.process
def test_a_second_run_in_a_folder_is_refused_and_touches_nothing(train_words, tmp_path):
    run = tmp_path / "run"
    with open_run_folder(str(run)):
        before = {path.name: path.read_bytes() for path in run.iterdir()}
        output = launch(0, "train.py", *train_words, "--deepspeed", "ds_configs/cpu.json", expect=2)
        assert {path.name: path.read_bytes() for path in run.iterdir()} == before
        assert LOCK_FILE in before
    sentence = next(line for line in output.splitlines() if line.startswith("error:"))
    assert f"--output_dir {run}: another run works there (process {os.getpid()} on {os.uname().nodename}" in sentence
    assert "Traceback" not in output


def test_a_run_that_comes_to_nothing_leaves_no_folder(train_words, tmp_path):
    (tmp_path / "same.csv").write_text("description\n" + "the same text in every row\n" * 20)
    words = [*train_words, "--dataset", str(tmp_path / "same.csv"), "--deepspeed", "ds_configs/cpu.json"]
    assert exit_code_of(lambda: train.main(words)) == 2
    assert not (tmp_path / "run").exists()
    (tmp_path / "run").mkdir()
    assert exit_code_of(lambda: train.main(words)) == 2
    assert [path.name for path in (tmp_path / "run").iterdir()] == [LIST_FILE]
