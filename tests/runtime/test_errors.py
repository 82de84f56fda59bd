import pytest

from neoflix.runtime.errors import RUN_ME_AGAIN, DivergedError, MainProcessError, StoppedEarly, UserError
from neoflix.runtime.processes import exit_code_of


@pytest.mark.parametrize(
    ("error", "code"), [(UserError("x"), 2), (DivergedError("x"), 3), (StoppedEarly("x"), RUN_ME_AGAIN)]
)
def test_exit_codes(error, code, monkeypatch, capsys):
    def fail():
        raise error

    monkeypatch.delenv("RANK", raising=False)
    assert exit_code_of(fail) == code
    printed = capsys.readouterr()
    assert (printed.err or printed.out).splitlines() == ["x" if code == RUN_ME_AGAIN else "error: x"]


def test_bugs_are_not_user_errors():
    def fail():
        raise MainProcessError("x")

    with pytest.raises(MainProcessError):
        exit_code_of(fail)
    assert not issubclass(MainProcessError, UserError)
    assert not issubclass(StoppedEarly, UserError)
