"""`sbatch launch.sh` on a real SLURM of two nodes: what becomes of a job, and of its run, whatever happens to it."""

import re
import signal
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from conftest import ROOT
from fake_machine import RTX_3090
from slurm_cluster import Cluster, why_not
from soak import compare, fingerprint, role

from neoflix.checkpoints.find import list_checkpoints

pytestmark = pytest.mark.xdist_group("slurm")
SECONDS = 400  # for a start on a machine that has other things to do

FLAGS = {
    "config": "recipes/demo.yaml",  # dropout and ZeRO-0: a resumed run has random states to find again
    "max_steps": 40,
    "per_device_train_batch_size": 4,
    "eval_strategy": "no",
    "save_strategy": "steps",
    "save_steps": 40,
    "logging_steps": 1,
    "report_to": "none",
    "disable_tqdm": "true",
}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    if reason := why_not():
        pytest.skip(reason)
    with Cluster(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


class Job:
    """`sbatch launch.sh`, from its submission to its end; an array's task is one by its own number."""

    def __init__(self, cluster: Cluster, number: str, log: Path):
        self.cluster, self.number, self.log = cluster, number, log

    @classmethod
    def submit(cls, cluster: Cluster, run: Path, *options, script="launch.sh", words=(), **flags) -> "Job":
        flags = FLAGS | {"output_dir": run, "cache_dir": cluster.folder / "cache"} | flags
        words = words or [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
        options = ("--partition=main", "--gpus-per-node=0", "--cpus-per-task=1", *options)
        log = run.with_name(f"{run.name}-%a.out" if any("array" in option for option in options) else f"{run.name}.out")
        number = cluster.run("sbatch", "--parsable", f"--output={log}", *options, ROOT / script, *words)
        return cls(cluster, number, log)

    def task(self, number: int) -> "Job":
        return Job(self.cluster, f"{self.number}_{number}", Path(str(self.log).replace("%a", str(number))))

    def said(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def shown(self) -> dict[str, str]:
        return self.cluster.job(self.number)

    def await_steps(self, count: int, life: int = 0) -> None:
        """Waits for steps of training; those of life 1 come after the job was queued again."""

        def has_come() -> bool:
            assert self.shown()["JobState"] not in ("COMPLETED", "FAILED"), self.said()
            lives = self.said().split("Resuming from")
            return len(lives) > life and lives[life].count("'loss'") >= count

        self.cluster.wait_for(has_come, f"step in life {life}", SECONDS, self.said)

    def await_state(self, *states: str) -> None:
        self.cluster.wait_for(lambda: self.shown()["JobState"] in states, f"job {states}", SECONDS, self.said)

    def await_end(self) -> dict[str, str]:
        self.await_state("COMPLETED", "FAILED", "CANCELLED")
        self.cluster.wait_for(lambda: not list(self.cluster.processes(self.number)), "end of its processes", 30)
        return self.shown()


@pytest.fixture(scope="module")
def untouched(cluster) -> Job:
    job = Job.submit(cluster, cluster.folder / "untouched", "--nodes=2")
    job.await_end()
    return job


def test_two_nodes_train_and_sample(cluster, untouched):
    shown, said = untouched.shown(), untouched.said()
    assert (shown["JobState"], shown["ExitCode"], shown["Restarts"]) == ("COMPLETED", "0:0", "0"), said
    assert said.count("Best model in") == 1
    assert len(re.findall(r"^ +\d+\. ", said, re.MULTILINE)) == 20
    assert list_checkpoints(cluster.folder / "untouched")[-1].name == "checkpoint-40"
    logs = cluster.folder / "logs" / f"slurm-{untouched.number}"
    assert (logs / "hosts").read_text() == "n1 slots=1\nn2 slots=1\n"
    assert (logs / "rank-1.log").read_text().count("'loss'") == 40
    assert not (logs / "rank-0.log").exists()


def test_a_job_that_is_told_to_stop_goes_on_by_itself_to_the_same_result(cluster, untouched):
    run = cluster.folder / "stopped"
    job = Job.submit(cluster, run, "--nodes=2")
    job.await_steps(2)
    cluster.run("scancel", "--signal=USR1", "--batch", job.number)  # what `--signal=B:USR1@600` does
    shown, said = job.await_end(), job.said()
    assert (shown["JobState"], shown["Restarts"]) == ("COMPLETED", "1"), said
    step = re.search(r"Stopped after step (\d+) \(SIGUSR1\)", said)[1]
    assert f"Resuming from {run}/checkpoint-{step}" in said
    assert "Exited with exit code 75" in said  # the launcher outlived the signal
    assert not compare(fingerprint(run), fingerprint(cluster.folder / "untouched"))


def test_an_apptainer_job_that_is_told_to_stop_goes_on_by_itself(cluster):
    """Without Apptainer: a command of that name runs launch.sh in place."""
    programs, run = cluster.folder / "programs", cluster.folder / "in-apptainer"
    programs.mkdir()
    (programs / "apptainer").write_text(f'#!/bin/sh\nshift 5\nexec {ROOT}/launch.sh "$@"\n')
    (programs / "apptainer").chmod(0o755)
    options = (f"--chdir={programs}", f"--export=ALL,PATH={programs}:{cluster.env['PATH']}")
    job = Job.submit(cluster, run, *options, script="jobs/apptainer.sbatch")
    job.await_steps(2)
    cluster.run("scancel", "--signal=USR1", "--batch", job.number)
    shown, said = job.await_end(), job.said()
    assert (shown["JobState"], shown["Restarts"]) == ("COMPLETED", "1"), said
    step = re.search(r"Stopped after step (\d+) \(SIGUSR1\)", said)[1]
    assert f"Resuming from {run}/checkpoint-{step}" in said
    assert len(re.findall(r"^ +\d+\. ", said, re.MULTILINE)) == 20


def test_a_killed_process_ends_the_job_and_is_named(cluster):
    # Without live samples: within a second of them its last words would be "writing samples".
    job = Job.submit(cluster, cluster.folder / "killed", "--nodes=2", max_steps=10_000, num_progress_samples=0)
    job.await_steps(1)
    for process in cluster.processes(job.number):
        with suppress(psutil.Error):
            if role(process.cmdline()) == "rank 0" and process.environ().get("SLURM_NODEID") == "1":
                process.send_signal(signal.SIGKILL)
    cluster.wait_for(lambda: job.shown()["JobState"] != "RUNNING", "end of the job", 60, job.said)
    shown, said = job.await_end(), job.said()
    assert (shown["JobState"], shown["ExitCode"], shown["Restarts"]) == ("FAILED", "1:0", "0"), said
    named = r"^error: rank 1 \(process \d+ on \S+\) was killed or crashed; .*: \w+, step"
    assert len(re.findall(named, said, re.MULTILINE)) == 1, said


def test_tasks_of_an_array_are_runs_of_their_own(cluster):
    """One makes room for an urgent job and is queued again alone, though its job's number is the whole array's; the
    other is cancelled, and stays so."""
    array = Job.submit(cluster, cluster.folder / "array", "--nodes=1", "--exclusive", "--array=1,2", max_steps=10_000)
    preempted, cancelled = array.task(2), array.task(1)
    assert preempted.shown()["JobId"] == array.number
    for job in (preempted, cancelled):
        job.await_steps(1)
    node = f"--nodelist={preempted.shown()['NodeList']}"
    cluster.run("sbatch", "--partition=urgent", node, "--exclusive", "--output=/dev/null", "--wrap", "true")
    preempted.await_state("PENDING")
    assert cancelled.shown()["JobState"] == "RUNNING"
    cluster.run("scancel", cancelled.number)
    assert cancelled.await_end()["JobState"] == "CANCELLED"
    assert (preempted.shown()["Restarts"], cancelled.shown()["Restarts"]) == ("1", "0")
    assert f"Requeueing job {array.number}_2" in preempted.said()  # before SLURM had to end it
    assert "Requeueing" not in cancelled.said()
    for job, folder in ((cancelled, "1"), (preempted, "2")):
        step = re.search(r"Stopped after step (\d+) \(SIGTERM\)", job.said())[1]
        assert list_checkpoints(cluster.folder / "array" / folder)[-1].name == f"checkpoint-{step}"
    cluster.run("scancel", preempted.number)


def test_dry_run_of_an_array(cluster):
    words = ("--config", "recipes/article.yaml", "--seed", "%a")
    array = Job.submit(
        cluster, cluster.folder / "dry", "--nodes=2", "--array=3,4", "--export=ALL,DRY_RUN=1", words=words
    )
    for number in (3, 4):
        array.task(number).await_end()
        said = array.task(number).said()
        logs = cluster.folder / "logs" / f"slurm-{array.number}_{number}"
        assert f"{logs}/hosts: 1 process(es) on each of n1 n2\n" in said
        assert "srun --nodes=2 --ntasks=2 --ntasks-per-node=1 " in said
        assert f"--hostfile {logs}/hosts --no_ssh --master_addr 127.0.0.1 --master_port 2" in said
        run = f"results-article/{number}"
        assert f"train.py --config recipes/article.yaml --seed {number} --output_dir {run} \n" in said
        assert f"python generate.py --config recipes/article.yaml --output_dir {run} \n" in said
        assert not logs.exists()


def test_gpus_that_deepspeed_would_not_take_are_refused(cluster, machine_of, monkeypatch):
    three = [RTX_3090.replace("aa11", f"aa{number}") for number in range(3)]
    for name, value in (machine_of(*three) | {"CUDA_VISIBLE_DEVICES": "2"}).items():
        monkeypatch.setitem(cluster.env, name, value)
    job = Job.submit(cluster, cluster.folder / "gpus", "--export=ALL")
    assert job.await_end()["ExitCode"] == "2:0"
    assert len(re.findall(r"error: .*GPUs 0, .*n1 .* 2: .*--exclusive", job.said())) == 1
