import io
import os
import subprocess

import pytest
from conftest import PYTHON, ROOT

from neoflix.runtime import console
from neoflix.runtime.console import log_to_own_file, printable, progress, say, shout, write_beside_progress


def test_only_the_main_process_prints(monkeypatch, capsys):
    for rank, printed in (("1", ""), ("0", "hello\nbeside\n")):
        monkeypatch.setenv("RANK", rank)
        say("hello")
        write_beside_progress("beside")
        assert capsys.readouterr().out == printed


def test_any_process_can_print_to_the_log_of_the_run(monkeypatch, tmp_path):
    with (tmp_path / "log").open("wb") as log:
        monkeypatch.setattr(console, "_console", log.fileno())
        monkeypatch.setenv("RANK", "3")
        shout("failed \ud83d")
        shout("")
    assert (tmp_path / "log").read_bytes() == b"failed \\ud83d\n"


@pytest.mark.process
def test_other_processes_log_to_their_own_files(tmp_path):
    """In a program of its own: its output goes to the file from then on, but for what it shouts."""
    code = f"from neoflix.runtime.console import *; {log_to_own_file.__name__}(); print('mine'); shout('for all')"
    env = os.environ | {"RANK": "2", "NEOFLIX_LOG_DIR": str(tmp_path / "logs")}
    done = subprocess.run([PYTHON, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("", "for all\n")
    assert (tmp_path / "logs" / "rank-2.log").read_text() == "mine\n"


def test_control_characters_are_not_printed():
    assert printable("a\x1b[31m\tb\nc\r\u0085é") == "a [31m b\nc  é"


@pytest.mark.parametrize(("rank", "is_silent"), [("0", False), ("1", True)])
def test_progress_in_a_log_file_is_lines(monkeypatch, rank, is_silent):
    monkeypatch.setenv("RANK", rank)
    file = io.StringIO()
    assert list(progress(range(3), desc="Reading", file=file, mininterval=0, miniters=1)) == [0, 1, 2]
    assert (not file.getvalue()) == is_silent
    if not is_silent:
        assert file.getvalue().count("\n") > 2
        assert "Reading: 100%" in file.getvalue()
        assert "\r" not in file.getvalue()
