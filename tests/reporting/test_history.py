"""The record of a run: its evaluations, and the sizes of its files."""

import os

import pytest
from conftest import make_record

from neoflix.reporting.history import Record, file_sizes


def test_evaluations_before_and_after_training():
    record = make_record([6, 5], [8, 6, 7])
    assert record.baseline["eval_loss"] == 8
    assert [line["eval_loss"] for line in record.trained] == [6, 7]
    assert (record.best["step"], record.improved) == (10, True)
    assert record.curve("loss") == ([5, 15], [6, 5])
    assert (record.last("loss"), record.last("mfu")) == (5, None)


def test_the_best_of_a_finished_run_is_the_model_that_it_saved():
    record = make_record([6, 5], [8, 6, 7])
    record.results["saved_step"] = 20
    assert record.best["step"] == 20
    record.results["saved_step"] = 30
    assert record.best is None
    assert make_record([6, 5], [8, 7, 6], finished=False).best["step"] == 20


def test_a_file_with_two_names_is_counted_once(tmp_path):
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / "model").write_bytes(b"1234")
    os.link(tmp_path / "model", tmp_path / "checkpoint-1" / "model")
    (tmp_path / "checkpoint-1" / "state").write_bytes(b"12")
    assert file_sizes(tmp_path) == [("model", 4), ("checkpoint-1/", 2)]


def test_a_folder_without_a_run(tmp_path):
    with pytest.raises(ValueError, match=r"run\.json"):
        Record.read(tmp_path)
