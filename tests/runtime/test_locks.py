"""One process at a time holds a lock file; a lock that a dead one left holds up nobody."""

import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import PYTHON, ROOT

from neoflix.runtime import locks
from neoflix.runtime.locks import Lock, acquire, describe_owner

HOLDER = """
import sys, time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from neoflix.runtime.locks import acquire
lock = acquire(Path(sys.argv[1]), "{owner}")
print("held", flush=True)
time.sleep(600)
"""


@contextmanager
def locked(path: Path, message: str) -> Iterator[Lock]:
    lock = acquire(path, message)
    try:
        yield lock
    finally:
        lock.release()


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "x.lock"


@pytest.fixture
def hold(path):
    """hold() starts a process that holds the lock, and returns it."""
    holders = []

    def hold() -> subprocess.Popen:
        words = [PYTHON, "-c", HOLDER, str(path)]
        holders.append(subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True))
        assert holders[-1].stdout.readline() == "held\n"
        return holders[-1]

    yield hold
    for holder in holders:
        holder.kill()
        holder.wait()
        holder.stdout.close()


def write_as(path: Path, age: float = 0, **facts) -> None:
    """A lock file of another owner, whose last sign of life was `age` seconds ago."""
    path.write_text(json.dumps(describe_owner() | {"id": "another"} | facts))
    os.utime(path, (time.time() - age,) * 2)


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(locks, "BEAT", 0.1)
    monkeypatch.setattr(locks, "PATIENCE", 1.5)


def test_it_is_gone_when_the_context_ends(path):
    with locked(path, "{owner}") as lock:
        assert path.is_file()
        assert lock.is_held()
    assert list(path.parent.iterdir()) == []
    with pytest.raises(KeyError), locked(path, "{owner}"):
        raise KeyError
    assert list(path.parent.iterdir()) == []


@pytest.mark.process
def test_a_second_process_is_told_host_and_process(path, hold):
    holder = hold()
    with pytest.raises(ValueError, match=rf"^busy: process {holder.pid} on .+, since 20") as error:
        acquire(path, "busy: {owner}")
    assert os.uname().nodename in str(error.value)
    assert json.loads(path.read_text())["process"] == holder.pid
    assert [each.name for each in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("reaped", [True, False])
@pytest.mark.process
def test_after_a_kill_it_is_free_at_once(path, hold, reaped):
    """Without an end of its own; a launcher may not have reaped it yet."""
    holder = hold()
    os.kill(holder.pid, signal.SIGKILL)
    if reaped:
        holder.wait()
    else:
        os.waitid(os.P_PID, holder.pid, os.WEXITED | os.WNOWAIT)
    began = time.monotonic()
    with locked(path, "{owner}") as lock:
        assert lock.is_held()
    assert time.monotonic() - began < 5


def test_another_process_of_the_same_number_is_another(path):
    write_as(path, began=1)
    with locked(path, "{owner}"):
        pass


def test_a_lock_from_before_a_reboot_is_free(path):
    write_as(path, age=600, kernel="before")
    with locked(path, "{owner}"):
        pass


def test_a_torn_lock_file_is_recovered(path, impatient):
    path.write_text("")
    with locked(path, "{owner}"):
        pass


def test_a_dead_job_on_another_node_is_waited_for(path, impatient, capsys):
    write_as(path, host="node7", kernel="node7's", flock=False)
    began = time.monotonic()
    with locked(path, "{owner}"):
        assert 1 < time.monotonic() - began < 30
    assert "held by process" in capsys.readouterr().out


def test_a_living_job_on_another_node_is_refused(path, impatient):
    write_as(path, host="node7", kernel="node7's")
    over = threading.Event()

    def beat():
        while not over.wait(0.1):
            os.utime(path)

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(ValueError, match="on node7"):
            acquire(path, "{owner}")
    finally:
        over.set()
        thread.join()
    assert json.loads(path.read_text())["id"] == "another"


def test_the_owner_gives_signs_of_life(path, impatient):
    with locked(path, "{owner}"):
        os.utime(path, (1, 1))
        deadline = time.monotonic() + 30
        while path.stat().st_mtime < 1000 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert time.time() - path.stat().st_mtime < 30


@pytest.mark.process
def test_a_container_of_the_same_machine_is_seen_by_its_flock(path, hold):
    holder = hold()
    facts = json.loads(path.read_text()) | {"processes": 1}
    path.write_text(json.dumps(facts))  # the same file, which its owner still holds
    with pytest.raises(ValueError, match=str(holder.pid)):
        acquire(path, "{owner}")
    holder.kill()
    holder.wait()
    with locked(path, "{owner}"):
        pass


@pytest.mark.process
def test_of_many_that_start_at_once_one_gets_a_stale_lock(path, tmp_path):
    write_as(path, began=1)
    code = HOLDER.replace('print("held", flush=True)', 'open(f"{sys.argv[1]}.{time.time()}.won", "w")')
    words = [PYTHON, "-c", code.replace("600", "3"), str(path)]
    programs = [subprocess.Popen(words, cwd=ROOT, stderr=subprocess.DEVNULL) for _ in range(6)]
    assert sorted(program.wait() for program in programs) == [0, 1, 1, 1, 1, 1]
    assert len(list(tmp_path.glob("*.won"))) == 1


def test_one_that_lost_its_lock_knows_and_leaves_the_new_one_alone(path):
    lock = acquire(path, "{owner}")
    path.unlink()
    write_as(path, host="node7")
    assert not lock.is_held()
    lock.release()
    assert json.loads(path.read_text())["host"] == "node7"
