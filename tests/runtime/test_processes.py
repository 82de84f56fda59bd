"""Two real processes that agree and end: small programs in the place of a training run."""

import subprocess

import pytest
from conftest import PYTHON, ROOT, environment_without_launcher

pytestmark = pytest.mark.process


def test_all_goes_well(run_two):
    codes, said = run_two("""
assert run_on_main_process(lambda: RANK) == 0  # before the processes are connected
connect_processes()
with main_process_first():
    print("now", RANK)
assert run_on_main_process(lambda: RANK + 5) == 5
""")
    assert (codes, said) == ([0, 0], ["now 0\n", "now 1\n"])


def test_the_main_process_waits_for_the_others_and_they_do_not_wait(run_two, tmp_path):
    codes, said = run_two(f"""
from pathlib import Path
if RANK == 0:
    while not Path({str(tmp_path / "passed")!r}).exists():  # rank 1 passes although rank 0 is not there
        time.sleep(0.01)
for count in range(2):
    wait_for_others()
    Path({str(tmp_path)!r}, "passed" if RANK else f"waited {{count}}").touch()
    while RANK and not Path({str(tmp_path)!r}, f"waited {{count}}").exists():
        time.sleep(0.01)
""")
    assert (codes, said) == ([0, 0], ["", ""])


@pytest.mark.parametrize("before", ["", "connect_processes()"], ids=["unconnected", "connected"])
@pytest.mark.parametrize(
    "others",
    ["connect_processes()", "run_on_main_process(time.sleep, 600)", "wait_for_others()", "time.sleep(600)"],
)
def test_a_user_error_on_another_rank_is_printed_with_its_rank_and_ends_all(run_two, tmp_path, before, others):
    code = f'if RANK == 1: raise UserError("no such file")\n{others}'
    codes, said = run_two(f"{before}\n{code}", NEOFLIX_EXIT_CODE_FILE=str(tmp_path / "code"))
    assert codes == [2, 2]
    assert said[0] == ""
    assert said[1].startswith("error: rank 1 (process ")
    assert said[1].endswith("): no such file\n")
    assert (tmp_path / "code").read_text() == "2\n"


def test_the_same_user_error_on_all_ranks_is_printed_once(run_two):
    codes, said = run_two('time.sleep(1 - RANK)\nraise UserError("no such file")')
    assert (codes, said) == ([2, 2], ["error: no such file\n", ""])


def test_a_user_error_in_what_rank_0_does_for_all_crosses(run_two):
    codes, said = run_two("""
def fail():
    raise UserError("no such file")
try:
    run_on_main_process(fail)
except UserError as error:
    print("caught", error)
    raise
""")
    assert (codes, said) == ([2, 2], ["caught no such file\nerror: no such file\n", "caught no such file\n"])


def test_a_divergence_in_what_rank_0_does_for_all_ends_all_with_its_code(run_two):
    codes, said = run_two("""
from neoflix.runtime.errors import DivergedError
def fail():
    raise DivergedError("the loss is nan")
run_on_main_process(fail)
""")
    assert (codes, said) == ([3, 3], ["error: the loss is nan\n", ""])


@pytest.mark.parametrize("error", ["OSError(28, 'No space left')", "RuntimeError('x')", "ValueError('x')"])
def test_any_exception_in_what_rank_0_does_for_all_ends_all(run_two, error):
    codes, said = run_two(f"""
def fail():
    raise {error}
connect_processes()
run_on_main_process(fail)
""")
    assert codes == [1, 1]
    assert said[0].count("Traceback (most recent call last)") == 1
    assert f"failed ({error.partition('(')[0]}: " in said[0]
    assert said[1] == ""


@pytest.mark.parametrize("rank", [0, 1])
def test_an_exception_while_the_others_wait_for_their_turn_ends_all(run_two, rank):
    codes, said = run_two(f"""
connect_processes()
with main_process_first():
    if RANK == {rank}: raise ZeroDivisionError("of our own making")
gather(None)
""")
    assert codes == [1, 1]
    assert said[rank].count("Traceback") == 1
    assert f"error: rank {rank} (process " in said[rank]
    assert said[1 - rank] == ""


def test_a_stop_on_request_is_no_failure(run_two):
    codes, said = run_two('connect_processes()\nraise StoppedEarly("Stopped before a step was taken")')
    assert (codes, said) == ([75, 75], ["Stopped before a step was taken\n", ""])


def test_help_is_no_failure(run_two):
    assert run_two("sys.exit(0)") == ([0, 0], ["", ""])


def run_alone(code: str, **env: str) -> subprocess.CompletedProcess:
    words = [PYTHON, "-c", f"from neoflix.runtime.processes import run_and_exit\n{code}\nrun_and_exit(main)"]
    return subprocess.run(words, env=environment_without_launcher() | env, cwd=ROOT, capture_output=True, timeout=120)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8", "ascii:strict"])
def test_no_terminal_ends_a_program(encoding):
    """Japanese, an emoji, and half a surrogate pair, on both streams and from the error's sentence."""
    code = r"""
import sys
from neoflix.runtime.errors import UserError
text = "\u3042 \U0001f600 \ud83d"
def main():
    print(text)
    print(text, file=sys.stderr)
    raise UserError(text + " \x1b[31m")
"""
    program = run_alone(code, PYTHONIOENCODING=encoding)
    assert program.returncode == 2, program.stderr
    assert b"\\ud83d" in program.stdout
    assert program.stderr.count(b"\\ud83d") == 2
    assert b"\x1b" not in program.stderr


@pytest.mark.parametrize("error", ["ValueError('deep inside')", "KeyError('x')", "OSError(2, 'No such file')"])
def test_a_bug_keeps_its_traceback(error):
    program = run_alone(f"def main():\n    raise {error}")
    assert program.returncode == 1
    assert b"Traceback (most recent call last)" in program.stderr


def test_traceback_of_a_user_error_on_request():
    code = "from neoflix.runtime.errors import UserError\ndef main():\n    raise UserError('no such file')"
    program = run_alone(code, NEOFLIX_TRACEBACK="1")
    assert program.returncode == 2
    assert b"Traceback (most recent call last)" in program.stderr
    assert program.stderr.endswith(b"error: no such file\n")
