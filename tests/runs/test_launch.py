"""launch.sh says what it would run, for hardware that is there and hardware that is not."""

import os
import re
import shutil
import signal
import stat
import subprocess
import time

import pytest
from conftest import PYTHON, ROOT, environment_without_launcher, run_program

from neoflix.checkpoints.find import list_checkpoints
from neoflix.runtime.errors import RUN_ME_AGAIN


@pytest.fixture
def dry_run(tmp_path, monkeypatch):
    """dry_run(*words, gpus=[MiB, ...], host=GiB, **env) -> what a dry run prints; nvidia-smi and free report these."""

    for name in ("SLURM_JOB_ID", "SLURM_ARRAY_TASK_ID", "CUDA_VISIBLE_DEVICES", "NGPU", "HOSTFILE"):
        monkeypatch.delenv(name, raising=False)  # these tests may run in a job

    def dry_run(*words, gpus=(), host=64, expect=0, **env):
        memory = f"echo Mem: 999999 1 1 1 1 {host * 1024}\n" if host else "exit 1\n"
        for name, lines in (("nvidia-smi", "".join(f"echo {mib}\n" for mib in gpus) or "exit 9\n"), ("free", memory)):
            program = tmp_path / name
            program.write_text(f"#!/bin/sh\n{lines}")
            program.chmod(program.stat().st_mode | stat.S_IXUSR)
        path = f"{tmp_path}:{os.environ['PATH']}"
        return run_program("./launch.sh", *words, env={"DRY_RUN": "1", "PATH": path, **env}, expect=expect)

    return dry_run


@pytest.mark.parametrize(
    ("gpus", "host", "recipe", "processes"),
    [
        ([], 64, "recipes/demo.yaml", 1),
        ([24576], 64, "recipes/gpt-neo-2.7b.yaml", 1),  # RTX 3090, RTX 4090
        ([24576], None, "recipes/gpt-neo-2.7b.yaml", 1),  # nothing known of the host: the plan will say
        ([24576], 30, "recipes/gpt-neo-2.7b-lora.yaml", 1),
        ([24564, 24564], 64, "recipes/gpt-neo-2.7b.yaml", 2),
        ([81559] * 8, 64, "recipes/gpt-neo-2.7b.yaml", 8),
        ([12288], 64, "recipes/gpt-neo-1.3b.yaml", 1),
        ([12288], 24, "recipes/gpt-neo-125m.yaml", 1),
        ([6144], 64, "recipes/gpt-neo-125m.yaml", 1),
        ([24576, 11264], 64, "recipes/gpt-neo-1.3b.yaml", 2),  # the smallest decides
    ],
)
def test_recipe_follows_the_hardware(dry_run, gpus, host, recipe, processes):
    output = dry_run(gpus=gpus, host=host)
    explanation = output.partition(" train.py ")[0]  # before the commands
    assert recipe in explanation
    assert ("recipes/gpt-neo-125m.yaml" in explanation) == (not gpus or recipe == "recipes/gpt-neo-125m.yaml")
    assert ("No GPU" in explanation) == (not gpus)
    assert f"--num_accelerators {processes} " in output
    assert f"train.py --config {recipe} \n" in output
    assert f"python generate.py --config {recipe} \n" in output


@pytest.mark.parametrize(
    ("recipe", "device", "host"),
    [("gpt-neo-2.7b", 24000, 54000), ("gpt-neo-2.7b-lora", 24000, 8000), ("gpt-neo-1.3b", 8000, 30500)],
)
def test_recipes_fit_what_they_are_taken_for(recipe, device, host):
    assert f"host_mib >= {host}" in (ROOT / "launch.sh").read_text()
    sizes = ["--plan_device_memory", f"{device}MiB", "--plan_host_memory", f"{host}MiB"]
    run_program(PYTHON, "train.py", "--plan", "--config", f"recipes/{recipe}.yaml", *sizes)


def test_arguments_go_to_train_and_the_run_to_generate(dry_run):
    output = dry_run("--config", "recipes/article.yaml", "--seed", "3", "--output_dir=my run", NGPU="2")
    assert "--num_accelerators 2 " in output
    assert r"train.py --config recipes/article.yaml --seed 3 --output_dir=my\ run " in output
    assert r"generate.py --config recipes/article.yaml --output_dir my\ run " in output
    assert "GPU" not in output  # nothing is chosen


def test_of_several_output_dirs_the_last_counts(dry_run):
    output = dry_run("--output_dir", "a", "--seed", "3", "--output_dir=b")
    assert "generate.py --output_dir b \n" in output


@pytest.mark.parametrize(
    "words",
    [
        ["--output-dir", "b"],
        ["--output-dir=b"],
        ["--output_dir=a", "--output-dir", "b"],
        ["--output-dir=a", "--output_dir=b"],
    ],
)
def test_output_dir_is_seen_in_each_of_its_spellings(dry_run, words):
    assert "generate.py --config r.yaml --output_dir b \n" in dry_run("--config", "x.yaml", "--config=r.yaml", *words)


@pytest.mark.parametrize(
    ("words", "samples"),
    [
        (["--plan"], False),
        (["--plan", "--seed", "3"], False),
        (["--plan=true"], False),
        (["--plan", "false"], True),
        (["--plan", "--plan", "no"], True),
        (["--eval_only"], False),
        (["--eval-only", "--plan", "false"], False),
        (["--eval-only=False"], True),
    ],
)
def test_only_a_run_that_trains_is_sampled_from(dry_run, words, samples):
    assert ("generate.py" in dry_run("--config", "recipes/demo.yaml", *words)) == samples


@pytest.mark.parametrize("content", ["output_dir:", "seed: 3", "- x", "a: [", None])
def test_an_array_of_a_recipe_without_a_folder_takes_results(dry_run, tmp_path, content):
    recipe = tmp_path / "r.yaml"
    if content:
        recipe.write_text(content)
    output = dry_run("--config", str(recipe), SLURM_ARRAY_TASK_ID="7")
    assert f"generate.py --config {recipe} --output_dir results/7 \n" in output
    assert "Traceback" not in output


@pytest.mark.parametrize(
    ("ngpu", "launcher"),
    [("", "deepspeed --quiet --master_port"), ("1", "deepspeed --quiet --num_accelerators 1 ")],
    ids=["those it names", "NGPU wins"],
)
def test_named_gpus_are_left_to_deepspeed(dry_run, ngpu, launcher):
    assert launcher in dry_run(gpus=[24576], CUDA_VISIBLE_DEVICES="1", NGPU=ngpu)


def test_no_gpu_is_taken_where_all_are_hidden(dry_run):
    output = dry_run(gpus=[24576], CUDA_VISIBLE_DEVICES="")
    assert "No GPU" in output


def test_hostfile_is_handed_on(dry_run, tmp_path):
    hosts = tmp_path / "hosts"
    hosts.write_text("node1 slots=8\nnode2 slots=8\n")
    output = dry_run("--config", "recipes/demo.yaml", HOSTFILE=str(hosts))
    assert f"deepspeed --quiet --hostfile {hosts} train.py" in output
    assert "num_accelerators" not in output


def test_a_missing_hostfile_is_one_sentence(dry_run):
    """DeepSpeed would go on with this machine alone."""
    output = dry_run("--config", "recipes/demo.yaml", HOSTFILE="missing", expect=2)
    assert output.startswith("error: HOSTFILE=missing")
    assert "train.py" not in output


@pytest.mark.parametrize(("gpus", "numactl_works"), [([24576], True), ([24576], False), ([], True)])
def test_cores_are_bound_to_ranks_where_that_can_be(dry_run, tmp_path, gpus, numactl_works):
    numactl = tmp_path / "numactl"
    numactl.write_text(f"#!/bin/sh\nexit {0 if numactl_works else 1}\n")
    numactl.chmod(0o755)
    all_cores_are_ours = len(os.sched_getaffinity(0)) == os.cpu_count()
    expected = bool(gpus) and numactl_works and all_cores_are_ours
    output = dry_run(gpus=gpus, OMP_NUM_THREADS="")  # nproc heeds it: who sets it wants no binding
    assert ("--bind_cores_to_rank" in output) == expected


def test_dry_run_runs_nothing(dry_run):
    before = set(ROOT.iterdir())
    dry_run()
    assert set(ROOT.iterdir()) == before


def test_help_says_how_to_call_it():
    output = run_program("./launch.sh", "--help")
    for word in ("--setup-only", "sbatch launch.sh", "NGPU=2", "DRY_RUN=1", "HOSTFILE=hosts"):
        assert word in output
    assert "SBATCH" not in output


def test_sbatch_from_elsewhere_is_one_sentence(tmp_path):
    """sbatch runs a copy from its spool, where the call was made."""
    shutil.copy(ROOT / "launch.sh", tmp_path)
    output = run_program("bash", "-c", f"cd {tmp_path} && ./launch.sh", expect=2)
    assert output.startswith(f"error: {tmp_path}")
    assert "--chdir" in output


def test_old_python_is_one_sentence(tmp_path):
    """A clone without .venv, and a python3 that says it is too old."""
    shutil.copy(ROOT / "launch.sh", tmp_path)
    shutil.copy(ROOT / "requirements.txt", tmp_path)
    old = tmp_path / "python3.8"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    output = run_program(tmp_path / "launch.sh", "--setup-only", env={"PYTHON": str(old)}, expect=2)
    assert "error: Python 3.11" in output
    assert not (tmp_path / ".venv").exists()


def test_setup_only_has_nothing_to_do_twice():
    assert run_program("./launch.sh", "--setup-only") == ""


def test_main_command_trains_and_samples(tmp_path):
    """The whole road, cut short: real launcher, real recipe, samples on the screen."""
    output = run_program(
        *("./launch.sh", "--config", "recipes/demo.yaml", "--output_dir", tmp_path / "run", "--max_steps", "4")
    )
    assert " 20. " in output
    assert (tmp_path / "run" / "model.safetensors").is_file()
    assert f"{tmp_path / 'run'}/report.html" in output.splitlines()[-1]
    assert (tmp_path / "run" / "report.html").is_file()


def test_sigterm_to_the_shell_alone_saves_a_checkpoint(tmp_path):
    """What `docker stop` does: the shell is process 1 there, and no other process gets the signal."""
    folder, log = tmp_path / "run", tmp_path / "log"
    words = ["./launch.sh", "--config", "recipes/demo.yaml", "--output_dir", folder]
    words += ["--logging_steps", "1", "--disable_tqdm", "true"]
    with log.open("w") as out:
        shell = subprocess.Popen(
            words, cwd=ROOT, env=environment_without_launcher(), stdout=out, stderr=out, start_new_session=True
        )
    while shell.poll() is None and "'loss'" not in log.read_text():
        time.sleep(0.1)
    shell.send_signal(signal.SIGTERM)
    assert shell.wait(300) == RUN_ME_AGAIN
    output = log.read_text()
    step = re.search(r"Stopped after step (\d+) \(SIGUSR1\)", output)[1]
    assert list_checkpoints(folder)[-1].name == f"checkpoint-{step}"
    assert "generate.py" not in output
