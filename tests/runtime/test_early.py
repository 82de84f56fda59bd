"""What a program answers without torch."""

import pytest

from neoflix.runtime.early import answer_early, run_without_torch
from neoflix.runtime.errors import DivergedError, UserError


def refuse(error: Exception):
    def answer() -> None:
        raise error

    return answer


@pytest.mark.parametrize(("error", "code"), [(UserError("--seed x"), 2), (DivergedError("--seed x"), 3)])
@pytest.mark.parametrize("run", [answer_early, run_without_torch])
def test_a_user_error_ends_the_program(run, error, code, capsys, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(SystemExit) as end:
        run(refuse(error))
    assert end.value.code == code
    assert capsys.readouterr().err == "error: --seed x\n"


@pytest.mark.parametrize("name", ["RANK", "NEOFLIX_TRACEBACK"])
def test_the_program_itself_reports_it_elsewhere(name, capsys, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv(name, "1")
    answer_early(refuse(UserError("--seed x")))
    assert not capsys.readouterr().err


def test_a_whole_program_reports_everywhere(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(SystemExit):
        run_without_torch(refuse(UserError("--seed x")))
    assert capsys.readouterr().err == "error: --seed x\n"
    monkeypatch.setenv("NEOFLIX_TRACEBACK", "1")
    with pytest.raises(UserError):
        run_without_torch(refuse(UserError("--seed x")))


def test_a_bug_is_no_user_error():
    with pytest.raises(ZeroDivisionError):
        answer_early(lambda: 1 / 0)
