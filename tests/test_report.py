"""`python -m neoflix.report`: one run or several, to the right file."""

import shutil

import pytest

from neoflix.report import main, parse_report_args


def test_one_run_is_reported_in_its_folder_and_several_where_asked(finished_run, tmp_path, capsys):
    run = shutil.copytree(finished_run, tmp_path / "run")
    (run / "report.html").unlink()
    main([str(run)])
    assert (run / "report.html").is_file()
    main([str(run), str(finished_run), "--output", str(tmp_path / "both.html")])
    assert (tmp_path / "both.html").is_file()
    assert str(tmp_path / "both.html") in capsys.readouterr().out


def test_too_many_runs_for_one_page():
    with pytest.raises(ValueError, match=r"7 runs: .* 6"):
        main(["run"] * 7)


def test_a_run_must_be_named():
    with pytest.raises(ValueError, match="RUN"):
        parse_report_args([])
