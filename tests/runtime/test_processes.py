"""Two real processes that agree, fail, hang and end: small programs in the place of a training run."""

import os
import re
import signal
import socket
import subprocess
import time
from contextlib import contextmanager, suppress

import pytest
from conftest import PYTHON, ROOT, environment_without_launcher, free_port
from forked import start_ranks

PROGRAM = """
import os, sys, time
import torch.distributed as dist
from neoflix.runtime import watchdog
from neoflix.runtime.processes import run_on_main_process, gather, main_process_first, run_and_exit
from neoflix.runtime.errors import StoppedEarly, UserError
RANK = int(os.environ["RANK"])
def connect_processes():
    dist.init_process_group("gloo")
    gather(None)
def main():
    print("started", os.getpid(), flush=True)
{main}
run_and_exit(main)
"""


@pytest.fixture
def start(tmp_path):
    """start(code) -> two processes, with ranks 0 and 1, that run `code` as their main function."""
    started = []

    def start(code: str, **env: str) -> list:
        script = tmp_path / "program.py"
        script.write_text(PROGRAM.format(main="\n".join(f"    {line}" for line in code.splitlines())))
        logs = [tmp_path / f"log-{rank}" for rank in range(2)]
        started.extend(start_ranks(2, script, env=environment_without_launcher() | env, logs=logs))
        return started

    yield start
    for program in started:
        program.kill()
        program.wait()


@pytest.fixture
def ends(start, tmp_path):
    """ends(code) -> the two exit codes and what the two processes printed, without "started"."""

    def ends(code: str, **env: str) -> tuple[list[int], list[str]]:
        codes = [program.wait(timeout=90) for program in start(code, **env)]
        logs = [(tmp_path / f"log-{rank}").read_text() for rank in range(2)]
        return codes, [log.partition("\n")[2] for log in logs]

    return ends


def test_all_goes_well(ends):
    codes, said = ends("""
assert run_on_main_process(lambda: RANK) == 0  # before the processes are connected
connect_processes()
with main_process_first():
    print("now", RANK)
assert run_on_main_process(lambda: RANK + 5) == 5
""")
    assert (codes, said) == ([0, 0], ["now 0\n", "now 1\n"])


@pytest.mark.parametrize("before", ["", "connect_processes()"], ids=["unconnected", "connected"])
@pytest.mark.parametrize("others", ["connect_processes()", "run_on_main_process(time.sleep, 600)", "time.sleep(600)"])
def test_a_user_error_on_another_rank_is_printed_with_its_rank_and_ends_all(ends, tmp_path, before, others):
    code = f'if RANK == 1: raise UserError("no such file")\n{others}'
    codes, said = ends(f"{before}\n{code}", NEOFLIX_EXIT_CODE_FILE=str(tmp_path / "code"))
    assert codes == [2, 2]
    assert said[0] == ""
    assert said[1].startswith("error: rank 1 (process ")
    assert said[1].endswith("): no such file\n")
    assert (tmp_path / "code").read_text() == "2\n"


def test_the_same_user_error_on_all_ranks_is_printed_once(ends):
    codes, said = ends('time.sleep(1 - RANK)\nraise UserError("no such file")')
    assert (codes, said) == ([2, 2], ["error: no such file\n", ""])


def test_a_user_error_in_what_rank_0_does_for_all_crosses(ends):
    codes, said = ends("""
def fail():
    raise UserError("no such file")
try:
    run_on_main_process(fail)
except UserError as error:
    print("caught", error)
    raise
""")
    assert (codes, said) == ([2, 2], ["caught no such file\nerror: no such file\n", "caught no such file\n"])


def test_a_divergence_in_what_rank_0_does_for_all_ends_all_with_its_code(ends):
    codes, said = ends("""
from neoflix.runtime.errors import DivergedError
def fail():
    raise DivergedError("the loss is nan")
run_on_main_process(fail)
""")
    assert (codes, said) == ([1, 1], ["error: the loss is nan\n", ""])


@pytest.mark.parametrize("error", ["OSError(28, 'No space left')", "RuntimeError('x')", "ValueError('x')"])
def test_any_exception_in_what_rank_0_does_for_all_ends_all(ends, error):
    codes, said = ends(f"""
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
def test_an_exception_while_the_others_wait_for_their_turn_ends_all(ends, rank):
    codes, said = ends(f"""
connect_processes()
with main_process_first():
    if RANK == {rank}: raise ZeroDivisionError("of our own making")
gather(None)
""")
    assert codes == [1, 1]
    assert said[rank].count("Traceback") == 1
    assert f"error: rank {rank} (process " in said[rank]
    assert said[1 - rank] == ""


def test_a_stop_on_request_is_no_failure(ends):
    codes, said = ends('connect_processes()\nraise StoppedEarly("Stopped before a step was taken")')
    assert (codes, said) == ([75, 75], ["Stopped before a step was taken\n", ""])


def test_help_is_no_failure(ends):
    assert ends("sys.exit(0)") == ([0, 0], ["", ""])


def test_a_rank_may_take_longer_to_end(ends):
    assert ends("connect_processes()\ntime.sleep(4 * RANK)") == ([0, 0], ["", ""])


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_killed_before_anything_is_connected_ends_all(start, tmp_path, rank):
    programs = start("time.sleep(600)")
    wait_until_started(tmp_path)
    time.sleep(3)  # a sign of life of each
    programs[rank].kill()
    assert programs[1 - rank].wait(timeout=60) == 1
    words = (tmp_path / f"log-{1 - rank}").read_text()
    pattern = (
        rf"^error: rank {rank} .process {programs[rank].pid} on \S+ was killed or crashed; it last said: starting$"
    )
    assert len(re.findall(pattern, words, re.MULTILINE)) == 1


def wait_until_started(tmp_path) -> None:
    deadline = time.monotonic() + 60
    while not all("started" in (tmp_path / f"log-{rank}").read_text() for rank in range(2)):
        assert time.monotonic() < deadline
        time.sleep(0.1)


IMPATIENT = "watchdog.PATIENCE = 4\n"


def test_a_process_that_computes_and_gives_no_sign_of_life_lives(ends):
    codes, said = ends(
        IMPATIENT
        + """
connect_processes()
began = time.monotonic()
if RANK == 1:
    while time.monotonic() < began + 10: max(range(5 * 10**8))  # no other thread of Python's runs meanwhile
gather(None)
"""
    )
    assert (codes, said) == ([0, 0], ["", ""])


def test_a_process_that_hangs_is_found_and_ended(start, tmp_path):
    programs = start(IMPATIENT + "connect_processes()\ngather(None) if RANK == 0 else time.sleep(600)")
    wait_until_started(tmp_path)
    time.sleep(5)
    programs[1].send_signal(signal.SIGSTOP)
    assert programs[0].wait(timeout=60) == 1
    assert programs[1].wait(timeout=10) == -signal.SIGKILL
    assert "has given no sign of life for 4 s; it last said: starting" in (tmp_path / "log-0").read_text()


def test_a_deadlock_that_holds_pythons_lock_is_found(ends):
    code = "import ctypes; time.sleep(3); ctypes.PyDLL(None).sleep(600)"  # PyDLL keeps the lock
    codes, said = ends(IMPATIENT + f"connect_processes()\nif RANK == 1: {code}\ngather(None)")
    assert codes == [1, -signal.SIGKILL]
    assert "error: rank 1 (process " in said[0]
    assert "no sign of life" in said[0]


def test_the_port_is_taken(ends):
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        programs = subprocess.run(
            [PYTHON, "-c", "from neoflix.runtime.processes import run_and_exit; run_and_exit(print)"],
            env={**os.environ, "RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
    assert programs.returncode == 2
    assert programs.stderr.startswith(f"error: port {port} is used by another program on ")
    assert len(programs.stderr.splitlines()) == 1


HELPED = """
import subprocess, sys
os.environ["LOCAL_SIZE"] = "1"  # as on two machines
watchdog.start_watchdog()
store = watchdog.connect(serves=False)
time.sleep(1)
assert store.check(["beat0"])
pulses = []
for _ in range(4):
    while not store.check(["pulse0"]): time.sleep(0.2)
    pulses.append(store.get("pulse0"))
    max(range(2 * 10**8))
print(len(set(pulses)), flush=True)
os._exit(0)
"""


def test_a_program_on_each_machine_vouches_for_a_process_that_holds_pythons_lock():
    code = "import os, time\nfrom neoflix.runtime import watchdog\n" + HELPED
    env = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    program = subprocess.run(
        [PYTHON, "-c", code], env={**os.environ, **env}, cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert int(program.stdout) >= 3, program.stderr


@contextmanager
def mute_store():
    """(a socket that listens at MASTER_PORT and never answers, the environment of a program that looks there)."""
    with socket.socket() as mute:
        mute.bind(("127.0.0.1", 0))
        mute.listen()
        mute.settimeout(90)
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(mute.getsockname()[1]), "WORLD_SIZE": "2"}
        yield mute, environment_without_launcher() | where


def test_the_vouching_program_ends_with_the_process_that_started_it():
    """Here while it waits for the store: what listens at its port never answers."""
    with mute_store() as (mute, env):
        code = "import time; from neoflix.runtime.vouching import start_vouching; start_vouching(); time.sleep(99)"
        starter = subprocess.Popen([PYTHON, "-c", code], env=env, cwd=ROOT)
        connection, _ = mute.accept()
        starter.kill()
        starter.wait()
        connection.settimeout(20)
        with connection, suppress(ConnectionResetError):
            while connection.recv(1024):  # nothing more comes once the program has ended
                pass


def test_the_vouching_program_ends_where_the_process_that_started_it_has_ended_before_it_began():
    """As in a run of a few seconds. What it prints to is closed once it has ended."""
    with mute_store() as (_, env):
        code = "import os; from neoflix.runtime.vouching import start_vouching; start_vouching(); os._exit(0)"
        subprocess.run([PYTHON, "-c", code], env=env, cwd=ROOT, capture_output=True, timeout=60)


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


@pytest.mark.parametrize(("name", "value"), [("RANK", "one"), ("WORLD_SIZE", "2"), ("MASTER_PORT", "-1")])
def test_variables_that_no_launcher_set_are_one_sentence(name, value):
    program = run_alone("main = print", **{name: value})
    assert program.returncode == 2
    assert program.stderr.startswith(b"error: the environment variable " + name.encode())
    assert len(program.stderr.splitlines()) == 1
