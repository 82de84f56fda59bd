"""Two real processes of which one dies or hangs: small programs in the place of a training run."""

import re
import signal
import time

import pytest

from neoflix.runtime.errors import UserError
from neoflix.runtime.watchdog import get_watchdog, start_watchdog


@pytest.mark.process
def test_a_rank_may_take_longer_to_end(run_two):
    assert run_two("connect_processes()\ntime.sleep(4 * RANK)") == ([0, 0], ["", ""])


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.process
def test_a_process_killed_before_anything_is_connected_ends_all(start_two, tmp_path, rank):
    programs = start_two("time.sleep(600)")
    wait_until_started(tmp_path)
    time.sleep(3)  # a sign of life of each
    programs[rank].kill()
    assert programs[1 - rank].wait(timeout=60) == 1
    words = (tmp_path / f"log-{1 - rank}").read_text()
    pattern = rf"^error: rank {rank} .process {programs[rank].pid} on \S+ was killed or crashed; .*: starting$"
    assert len(re.findall(pattern, words, re.MULTILINE)) == 1


def wait_until_started(tmp_path) -> None:
    deadline = time.monotonic() + 60
    while not all("started" in (tmp_path / f"log-{rank}").read_text() for rank in range(2)):
        assert time.monotonic() < deadline
        time.sleep(0.1)


IMPATIENT = "watchdog.PATIENCE = 4\n"


@pytest.mark.process
def test_a_process_that_computes_and_gives_no_sign_of_life_lives(run_two):
    codes, said = run_two(
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


@pytest.mark.process
def test_a_process_that_hangs_is_found_and_ended(start_two, tmp_path):
    programs = start_two(IMPATIENT + "connect_processes()\ngather(None) if RANK == 0 else time.sleep(600)")
    wait_until_started(tmp_path)
    time.sleep(5)
    programs[1].send_signal(signal.SIGSTOP)
    assert programs[0].wait(timeout=60) == 1
    assert programs[1].wait(timeout=10) == -signal.SIGKILL
    assert re.search(r"error: rank 1 .* 4 s; .*: starting", (tmp_path / "log-0").read_text())


@pytest.mark.process
def test_a_deadlock_that_holds_pythons_lock_is_found(run_two):
    code = "import ctypes; time.sleep(3); ctypes.PyDLL(None).sleep(600)"  # PyDLL keeps the lock
    codes, said = run_two(IMPATIENT + f"connect_processes()\nif RANK == 1: {code}\ngather(None)")
    assert codes == [1, -signal.SIGKILL]
    assert "error: rank 1 (process " in said[0]
    assert "no sign of life" in said[0]


@pytest.mark.parametrize(("name", "value"), [("RANK", "one"), ("WORLD_SIZE", "2"), ("MASTER_PORT", "-1")])
def test_variables_that_no_launcher_sets_are_refused(name, value, monkeypatch):
    for variable in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=rf"environment variable {name} .*{value}"):
        start_watchdog()
    assert get_watchdog() is None
