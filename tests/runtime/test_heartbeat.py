import os
import socket
import subprocess
import sys
import time
from contextlib import contextmanager, suppress

import pytest
from conftest import PYTHON, ROOT, environment_without_launcher, free_port

from neoflix.runtime.heartbeat import describe_process, is_gone, kill_hung, read_pulse

pytestmark = pytest.mark.process


HELPED = """
import subprocess, sys
os.environ["LOCAL_SIZE"] = "1"  # as on two machines
watchdog.start_watchdog()
store = connect(serves=False)
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


def test_a_program_on_each_machine_reports_for_a_process_that_holds_pythons_lock():
    code = "import os, time\nfrom neoflix.runtime import watchdog\nfrom neoflix.runtime.store import connect\n" + HELPED
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


def test_the_reporter_ends_with_the_process_that_started_it():
    """Here while it waits for the store: what listens at its port never answers."""
    with mute_store() as (mute, env):
        code = "import time; from neoflix.runtime import heartbeat; heartbeat.start_pulse_reporter(); time.sleep(99)"
        starter = subprocess.Popen([PYTHON, "-c", code], env=env, cwd=ROOT)
        connection, _ = mute.accept()
        starter.kill()
        starter.wait()
        connection.settimeout(20)
        with connection, suppress(ConnectionResetError):
            while connection.recv(1024):  # nothing more comes once the program has ended
                pass


def test_the_reporter_ends_if_the_process_that_started_it_has_already_ended():
    """As in a run of a few seconds. What it prints to is closed once it has ended."""
    with mute_store() as (_, env):
        code = "import os; from neoflix.runtime import heartbeat; heartbeat.start_pulse_reporter(); os._exit(0)"
        subprocess.run([PYTHON, "-c", code], env=env, cwd=ROOT, capture_output=True, timeout=60)


def test_a_process_is_watched_by_what_its_machine_sees():
    program = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    sign = describe_process() | {"process": program.pid}
    try:
        assert not is_gone(sign)
        time.sleep(0.5)
        assert read_pulse(program.pid)[0] > 0
        kill_hung(sign | {"machine": "another"})
        assert program.poll() is None
        kill_hung(sign)
        program.wait(timeout=20)
        assert is_gone(sign)
        assert not is_gone(sign | {"machine": "another"}), "nothing is known of it"
    finally:
        program.kill()
        program.wait()
