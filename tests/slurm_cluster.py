"""A real SLURM on this one host, for tests: munged, slurmctld and two slurmd that stand for two nodes.

All of it has its own ports, keys and folders, so that it meets no other SLURM, and ends with the tests.
"""

import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
from conftest import environment_without_launcher

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "setpriv")
NODES = ("n1", "n2")


def why_not() -> str | None:
    """Why no cluster can be started here, or None."""
    missing = [name for name in PROGRAMS if not _find(name)]
    if missing:
        return f"{', '.join(missing)} not found (apt install slurm-wlm munge)"
    return None if os.geteuid() == 0 else "slurmd wants to be root"


def _find(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/usr/local/sbin")


class Cluster:
    """Entered, it runs; `sbatch`, `scancel` and the others are called by `run`."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.config = folder / "slurm.conf"
        # Nor what a job gives that these tests may run in.
        inherited = environment_without_launcher().items()
        self.env = {name: value for name, value in inherited if not name.startswith("SLURM")}
        self.env |= {"SLURM_CONF": str(self.config), "NEOFLIX_LOG_DIR": str(folder / "logs")}
        self._daemons: list[subprocess.Popen] = []

    def __enter__(self) -> "Cluster":
        try:
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_) -> None:
        self.stop()

    def _start(self) -> None:
        self.folder.chmod(0o755)  # munged wants its socket to be reachable
        (self.folder / "munge.key").write_bytes(secrets.token_bytes(128))
        (self.folder / "munge.key").chmod(0o400)
        self.config.write_text(self._describe())
        files = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        words = [f"--{option}={self.folder}/munge.{name}" for option, name in files.items()]
        # --force: it would rather have an owner of its own, and its log elsewhere.
        self._start_daemon("munged", "--foreground", "--force", *words)
        self.wait_for(lambda: (self.folder / "munge.socket").exists(), "munged's socket", 20)
        self._start_daemon("slurmctld", "-D")
        for node in NODES:
            self._start_daemon("slurmd", "-D", "-N", node)
        self.wait_for(lambda: self._states() == {"idle"}, "two idle nodes", 60)

    def _start_daemon(self, name: str, *words: str) -> None:
        with (self.folder / f"{name}{len(self._daemons)}.out").open("w") as out:
            # Whatever ends the tests, SIGKILL too, ends the daemons.
            command = ["setpriv", "--pdeathsig", "TERM", _find(name), *words]
            self._daemons.append(
                subprocess.Popen(command, env=self.env, stdin=subprocess.DEVNULL, stdout=out, stderr=out)
            )

    def _describe(self) -> str:
        """slurm.conf: as little as two nodes on one host need, and as little waiting as can be."""
        host = socket.gethostname()
        controller, *ports = _free_ports(1 + len(NODES))
        nodes = "\n".join(
            f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=2 State=UNKNOWN"
            for node, port in zip(NODES, ports, strict=True)
        )
        return f"""\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# cred_expire: a requeued job waits that long, 120 s by default
AuthInfo=socket={self.folder}/munge.socket,cred_expire=5
StateSaveLocation={self.folder}/state
SlurmdSpoolDir={self.folder}/spool-%n
SlurmctldPidFile={self.folder}/slurmctld.pid
SlurmdPidFile={self.folder}/slurmd-%n.pid
SlurmctldLogFile={self.folder}/slurmctld.log
SlurmdLogFile={self.folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
JobCompType=jobcomp/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=2,sched_min_interval=100000,bf_interval=2
KillWait=30
ReturnToService=2
# launch.sh takes a port by the job's number: two such clusters on one host should not count alike
FirstJobId={1 + secrets.randbelow(9000)}
{nodes}
# Jobs of `urgent` take the nodes of those of `main`, which have a minute to save themselves.
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=main Nodes=ALL Default=YES PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=ALL PriorityTier=2
"""

    def _states(self) -> set[str]:
        done = subprocess.run(
            ["sinfo", "--noheader", "--Node", "--format=%T"], env=self.env, capture_output=True, text=True
        )
        return set(done.stdout.split())

    def run(self, *words) -> str:
        """A client command's output."""
        done = subprocess.run([str(word) for word in words], env=self.env, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, f"{words}: {done.stderr}\n{self.logs()}"
        return done.stdout.strip()

    def wait_for(self, condition: Callable[[], object], what: str, seconds: float, show=lambda: ""):
        """What `condition` returns once that is true; an assertion with the logs after `seconds`."""
        deadline = time.monotonic() + seconds
        while not (found := condition()):
            assert time.monotonic() < deadline, f"no {what} within {seconds} s\n{show()}\n{self.logs()}"
            time.sleep(0.1)
        return found

    def job(self, number: str) -> dict[str, str]:
        """`scontrol show job`, as a dictionary."""
        words = self.run("scontrol", "--oneliner", "show", "job", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def processes(self, number: str | None = None) -> Iterator[psutil.Process]:
        """All that runs of a job, or of all jobs, wherever it stands in the tree of processes."""
        ours = {f"SLURM_CONF={self.config}"} | ({f"SLURM_JOB_ID={number}"} if number else set())
        for process in psutil.process_iter():
            with suppress(psutil.Error, OSError):
                environment = Path(f"/proc/{process.pid}/environ").read_bytes().decode(errors="replace").split("\0")
                if ours <= set(environment) and process.status() != psutil.STATUS_ZOMBIE:
                    yield process

    def logs(self) -> str:
        """The ends of the daemons' logs."""
        files = sorted([*self.folder.glob("*.log"), *self.folder.glob("*.out")])
        return "\n".join(f"---- {file.name}\n{file.read_text(errors='replace')[-3000:]}" for file in files)

    def stop(self) -> None:
        if len(self._daemons) > 1:
            with suppress(subprocess.SubprocessError, OSError):
                subprocess.run(["scancel", "--user=root"], env=self.env, timeout=10, capture_output=True)
        for daemon in reversed(self._daemons):
            daemon.terminate()
        for daemon in self._daemons:
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        for process in list(self.processes()):  # what a job left, and the slurmstepd that watched it
            with suppress(psutil.Error):
                process.send_signal(signal.SIGKILL)


def _free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports
