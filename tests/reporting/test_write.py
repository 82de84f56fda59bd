"""Reports and cards are written over nothing that is not ours, and no run fails because of them."""

import json
import shutil
from pathlib import Path

import pytest

from neoflix.report import main
from neoflix.reporting.formats import side_by_side
from neoflix.reporting.history import Record
from neoflix.reporting.pages import REPORT_FILE
from neoflix.reporting.write import finish_run, write_report


@pytest.fixture
def run(finished_run, tmp_path) -> Path:
    """A copy of a finished run, to be changed."""
    return shutil.copytree(finished_run, tmp_path / "run")


def test_what_is_not_ours_is_left_alone(run, capsys):
    (run / "README.md").write_text("mine")
    (run / REPORT_FILE).unlink()
    assert write_report(str(run)) == run / REPORT_FILE
    assert (run / "README.md").read_text() == "mine"
    assert "warning: no report: " in capsys.readouterr().out
    other = run / "other.html"
    other.write_text("mine")
    with pytest.raises(ValueError, match=r"other\.html: is not a file that neoflix wrote"):
        main([str(run), "--output", str(other)])


def test_a_run_does_not_fail_for_its_report(run, capsys):
    (run / REPORT_FILE).unlink()
    (run / REPORT_FILE).mkdir()
    (run / "trainer_state.json").write_text('{"log_history": [{"eval_loss": "?", "step": 0}]}')
    finish_run(str(run), json.loads((run / "all_results.json").read_text()))
    said = capsys.readouterr().out.splitlines()
    assert all(line.startswith("warning: no report") for line in said[:-1])
    assert said[-1].startswith(f"Best model in {run}, perplexity ")


def test_a_card_of_ours_is_replaced(run):
    mark = "<!-- Written by neoflix, and written anew by its next run; without this line it is left alone. -->"
    (run / "README.md").write_text(f"{mark}\n\nby an earlier version")
    write_report(str(run))
    assert "earlier version" not in (run / "README.md").read_text()


def test_a_run_ends_with_samples_before_and_after(run, capsys):
    finish_run(str(run), json.loads((run / "all_results.json").read_text()))
    record = Record.read(run)
    texts = {row["step"]: row["text"] for row in reversed(record.samples)}  # the first text of each step
    pairs = record.before_and_after()
    assert pairs[0] == (texts[0], texts[record.best["step"]])
    assert len(pairs) == 4
    columns = shutil.get_terminal_size().columns
    assert side_by_side(("before training", "after"), pairs, columns) in capsys.readouterr().out
