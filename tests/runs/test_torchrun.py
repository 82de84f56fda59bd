"""torchrun in the place of DeepSpeed's launcher: the same run, on one node and on two, stopped and restarted."""

import argparse
import re
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
from conftest import PYTHON, ROOT, environment_without_launcher, free_port
from forked import launch
from soak import compare, fingerprint
from soak import train_words as train_words_of

from neoflix.checkpoints.find import list_checkpoints
from neoflix.runtime.errors import RUN_ME_AGAIN

STEPS = argparse.Namespace(steps=24, deepspeed="ds_config.json")  # a checkpoint every second step
ON_ONE_NODE = ["--nproc_per_node", "2", "--max_restarts", "1"]


class Torchrun:
    """`torchrun words train.py ...`, which writes its exit code and log beside the run's folder."""

    def __init__(self, run: Path, *words: str, node: int = 0, more: tuple[str, ...] = ()):
        self.log, self.code = run.with_suffix(f".log{node}"), run.with_suffix(".code")
        command = [PYTHON, Path(PYTHON).with_name("torchrun"), *words, *train_words_of(run, STEPS), *more]
        with self.log.open("w") as log:
            self.program = psutil.Popen(
                command,
                cwd=ROOT,
                env=environment_without_launcher() | {"NEOFLIX_EXIT_CODE_FILE": str(self.code)},
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in (*self.program.children(), self.program) if self.program.is_running() else ():
            process.kill()
        self.program.wait()

    def worker(self, rank: int) -> psutil.Process:
        return next(each for each in self.program.children() if each.environ()["RANK"] == str(rank))

    def await_first_step(self) -> None:
        while "'loss'" not in self.said():
            assert self.program.poll() is None, self.said()
            time.sleep(0.05)

    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def errors(self) -> list[str]:
        return re.findall(r"^error: .*", self.said(), re.MULTILINE)

    def wait(self) -> tuple[int, int]:
        """torchrun's exit code, and the run's own."""
        return self.program.wait(300), int(self.code.read_text())


@pytest.fixture(scope="module")
def untouched(tmp_path_factory):
    """The run as DeepSpeed's launcher starts it."""
    run = tmp_path_factory.mktemp("two") / "untouched"
    launch(2, *train_words_of(run, STEPS))
    return run


@pytest.mark.xdist_group("torchrun")
def test_a_stop_and_a_restart_change_nothing(untouched, tmp_path):
    run = tmp_path / "run"
    with Torchrun(run, *ON_ONE_NODE) as stopped:
        stopped.await_first_step()
        stopped.worker(1).send_signal(signal.SIGUSR1)
        assert stopped.wait() == (1, RUN_ME_AGAIN)
    step = re.search(r"Stopped after step (\d+) \(SIGUSR1\)", stopped.said())[1]
    assert list_checkpoints(run)[-1].name == f"checkpoint-{step}"
    assert "Resuming" not in stopped.said(), "torchrun has started the processes again"

    with Torchrun(run, *ON_ONE_NODE) as killed:
        killed.await_first_step()
        killed.worker(1).kill()
        assert killed.wait() == (0, 0)
    assert killed.said().count("Resuming from") == 2
    assert len(killed.errors()) == 1
    assert re.match(r"error: rank 1 \(process \d+ on \S+\) was killed or crashed", killed.errors()[0])
    assert not compare(fingerprint(run), fingerprint(untouched))


@pytest.mark.xdist_group("torchrun")
def test_two_nodes_are_one(untouched, tmp_path):
    """SIGTERM to one torchrun stops both nodes."""
    run = tmp_path / "run"
    words = ["--nnodes", "2", "--nproc_per_node", "1", "--rdzv_backend", "c10d", "--rdzv_id", "test"]

    def start() -> tuple[Torchrun, Torchrun]:
        endpoint = ["--rdzv_endpoint", f"127.0.0.1:{free_port()}"]
        return Torchrun(run, *words, *endpoint), Torchrun(run, *words, *endpoint, node=1)

    one, other = start()
    with one, other:
        one.await_first_step()
        other.program.terminate()
        for code, own_code in (one.wait(), other.wait()):
            assert code != 0  # mostly 1; a torchrun whose partner ends first may abort
            assert own_code == RUN_ME_AGAIN
    assert "(SIGTERM); the same command resumes" in one.said() + other.said()
    one, other = start()
    with one, other:
        assert (one.wait(), other.wait()) == ((0, 0), (0, 0))
    assert "Resuming from" in one.said() + other.said()
    assert not compare(fingerprint(run), fingerprint(untouched))


def test_a_user_error_is_said_once_and_not_tried_again(tmp_path):
    with Torchrun(tmp_path / "run", *ON_ONE_NODE, more=("--text_column", "synopsis")) as failed:
        assert failed.wait() == (1, 2)
    assert len(failed.errors()) == 1
    assert "not a column of" in failed.errors()[0]
