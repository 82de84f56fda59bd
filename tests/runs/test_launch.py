"""launch.sh says what it would run, for hardware that is there and hardware that is not."""

import os
import re
import shutil
import signal
import subprocess
import time

import pytest
from conftest import PYTHON, ROOT, environment_without_launcher, run_program
from fake_machine import IN_MIG_MODE, RTX_3090

from neoflix.checkpoints.find import list_checkpoints
from neoflix.runtime.errors import RUN_ME_AGAIN


def card(mib: int, number: int = 0, free: int | None = None) -> str:
    """A GPU of so many MiB, almost all of them free, as fake_nvml.c reads it."""
    return f"NVIDIA Card {mib}|GPU-{number}{number}|{mib}|{mib - 400 if free is None else free}|86|-1|0"


def turing(mib: int) -> str:
    """A GPU without bf16."""
    return card(mib).replace("|86|", "|75|")


@pytest.fixture
def dry_run(machine_of, monkeypatch, tmp_path):
    """dry_run(*words, gpus=[MiB, ...], host=GiB, **env) -> what a dry run prints on a machine with these, in the
    project's folder without runs: a plan depends on the run in `results`."""
    project = tmp_path / "project"
    project.mkdir()
    for path in ROOT.iterdir():
        if not path.name.startswith("results"):
            (project / path.name).symlink_to(path)
    for name in ("SLURM_JOB_ID", "SLURM_ARRAY_TASK_ID", "SLURM_NNODES", "NGPU", "HOSTFILE"):
        monkeypatch.delenv(name, raising=False)  # these tests may run in a job
    for name in ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER"):
        monkeypatch.delenv(name, raising=False)

    def dry_run(*words, gpus=(), host=64, disk=500, driver="580.95.05", expect=0, **env):
        cards = [gpu if isinstance(gpu, str) else card(gpu, number) for number, gpu in enumerate(gpus)]
        machine = machine_of(*cards, driver=driver, host_gib=host, disk_gib=disk, has_gpu=bool(gpus))
        return run_program(project / "launch.sh", *words, env={"DRY_RUN": "1", **machine, **env}, expect=expect)

    return dry_run


@pytest.mark.parametrize(
    ("gpus", "host", "recipe", "processes"),
    [
        ([], 64, "first-look", 1),
        ([], 2, "demo", 1),
        ([24576], 64, "gpt-neo-2.7b-one-card", 1),  # RTX 3090, RTX 4090
        ([23028], 64, "gpt-neo-2.7b-one-card", 1),  # A10, L4
        ([24576], 9, "gpt-neo-2.7b-one-card", 1),
        ([turing(24576)], 64, "gpt-neo-2.7b", 1),  # no bf16
        ([turing(24576)], 30, "gpt-neo-2.7b-lora", 1),
        ([24564, 24564], 80, "gpt-neo-2.7b-one-card", 2),
        ([81559] * 8, 256, "gpt-neo-2.7b-one-card", 8),
        ([16376], 16, "gpt-neo-1.3b-one-card", 1),
        ([12288], 64, "gpt-neo-1.3b-one-card", 1),
        ([turing(11264)], 64, "gpt-neo-1.3b", 1),
        ([6144], 64, "gpt-neo-125m", 1),
        ([24576, 11264], 64, "gpt-neo-1.3b", 2),  # the smallest decides
        ([card(24576), card(24576, 1, free=9000)], 64, "gpt-neo-1.3b", 2),  # and what is free of it
    ],
)
def test_recipe_follows_the_hardware(dry_run, gpus, host, recipe, processes):
    output = dry_run(gpus=gpus, host=host)
    explanation = output.partition(" train.py --config")[0]  # before the commands
    assert f"sing recipes/{recipe}.yaml" in explanation
    assert ("No GPU" in explanation) == (not gpus)
    assert f"--num_accelerators {processes} " in output
    assert f"train.py --config recipes/{recipe}.yaml \n" in output
    assert f"python generate.py --config recipes/{recipe}.yaml \n" in output


def test_a_recipe_that_is_passed_over_has_a_reason(dry_run):
    output = dry_run(gpus=[24576], disk=30)
    reason = r"^Passed over recipes/gpt-neo-2.7b-one-card.yaml: too large: .* GiB of disk, 30.0"
    assert re.search(reason, output, re.MULTILINE)
    assert "Using recipes/gpt-neo-1.3b-one-card.yaml" in output
    assert "  0 NVIDIA Card 24576, 24.0 GiB, 23.6 free\n" in output
    output = dry_run(gpus=[turing(24576)])
    reason = r"^Passed over recipes/gpt-neo-2.7b-one-card.yaml: --deepspeed: .* trains weights in bf16; .* has no bf16"
    assert re.search(reason, output, re.MULTILINE)


def test_no_recipe_fits(dry_run):
    output = dry_run(gpus=[card(24576, free=1000)], expect=2)
    assert re.search(r"^error: no recipe fits", output, re.MULTILINE)
    assert "other programs hold 23.0 GiB" in output
    assert "generate.py" not in output


def test_gpus_that_torch_cannot_use_end_it(dry_run):
    output = dry_run("--config", "recipes/demo.yaml", gpus=[24576], driver="570.86.15", expect=2)
    assert re.match(r"error: driver 570\.86\.15 .*/whl/cu126", output)
    assert "deepspeed" not in output


@pytest.mark.parametrize(
    ("recipe", "card", "device", "host"),
    [
        ("gpt-neo-2.7b-one-card", "24 GB with bf16 (RTX 3090)", 22.4, 8),
        ("gpt-neo-2.7b", "24 GB", 22.4, 53),
        ("gpt-neo-1.3b-one-card", "12 GB with bf16 (RTX 3060)", 11.4, 6),
        ("gpt-neo-2.7b-lora", "24 GB", 22.4, 8),
        ("gpt-neo-1.3b", "8 GB", 7.6, 30),
    ],
)
def test_recipes_fit_what_the_readme_says(recipe, card, device, host):
    """`device`: what the smallest cards of so many GB have free, as L4 and RTX 2080, in GiB."""
    assert f"| {card} | {host} GiB |" in (ROOT / "README.md").read_text()
    sizes = ["--plan_device_memory", f"{device}GiB", "--plan_host_memory", f"{host}GiB"]
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
        (["--tune"], False),
        (["--tune", "array"], False),
        (["--tune", "false"], True),
        (["--eval-only", "--plan", "false"], False),
        (["--eval-only=False"], True),
    ],
)
def test_only_a_run_that_trains_is_sampled_from(dry_run, words, samples):
    assert ("generate.py" in dry_run("--config", "recipes/demo.yaml", *words)) == samples


def test_a_search_starts_its_own_launchers_on_one_node(dry_run):
    words = ["--config", "recipes/demo.yaml", "--tune"]
    assert "\npython train.py --config recipes/demo.yaml --tune \n" in "\n" + dry_run(*words)
    assert "--nodes=1" in dry_run(*words, SLURM_NNODES="2", expect=2)


@pytest.mark.parametrize("content", ["output_dir:", "seed: 3", "- x", "a: [", None])
def test_an_array_of_a_recipe_without_a_folder_takes_results(dry_run, tmp_path, content):
    recipe = tmp_path / "r.yaml"
    if content:
        recipe.write_text(content)
    output = dry_run("--config", str(recipe), SLURM_ARRAY_TASK_ID="7")
    assert f"generate.py --config {recipe} --output_dir results/7 \n" in output
    assert "Traceback" not in output


@pytest.mark.parametrize(
    ("visible", "ngpu", "launcher"),
    [
        ("1", "", "--include localhost:1 "),
        ("1,0", "", r"--include localhost:1\,0 "),
        ("GPU-11", "", "--include localhost:1 "),
        ("GPU-11,GPU-00", "1", "--include localhost:1 "),
        ("1,0", "1", "--include localhost:1 "),
        ("1", "2", "--num_accelerators 2 "),  # more than it names: NGPU wins
    ],
)
def test_the_named_gpus_are_taken(dry_run, visible, ngpu, launcher):
    """By number: DeepSpeed reads no UUIDs, and would take the first ones where it is given their number."""
    output = dry_run(gpus=[24576, 24576], CUDA_VISIBLE_DEVICES=visible, NGPU=ngpu)
    assert f"deepspeed --quiet {launcher}" in output
    assert ("env -u CUDA_VISIBLE_DEVICES deepspeed" in output) == ("--include" in launcher)


def test_part_of_a_gpu_needs_no_launcher(dry_run):
    """DeepSpeed's launcher would replace the part's name by a number."""
    output = dry_run(gpus=[IN_MIG_MODE], CUDA_VISIBLE_DEVICES="MIG-12")
    assert "NVIDIA A100-SXM4-40GB MIG 3g.20gb, 20.0 GiB, 19.0 free" in output
    assert "\npython train.py --config recipes/gpt-neo-" in output


def test_gpus_have_the_numbers_of_nvidia_smi(dry_run):
    """Unlike by CUDA's own order, where the fastest comes first."""
    mixed = [card(16384, 0), card(24576, 1)]
    assert "--include localhost:1 " in dry_run("--config", "x.yaml", gpus=mixed, CUDA_VISIBLE_DEVICES="1")


def test_a_number_that_is_not_there_is_refused(dry_run):
    output = dry_run("--config", "recipes/demo.yaml", gpus=[24576], CUDA_VISIBLE_DEVICES="1", expect=2)
    assert output.startswith("error: CUDA_VISIBLE_DEVICES=1 ")


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
    path = f"{tmp_path}:{os.environ['PATH']}"
    output = dry_run(gpus=gpus, PATH=path, OMP_NUM_THREADS="")  # nproc heeds it: who sets it wants no binding
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


@pytest.fixture
def clone(tmp_path):
    """A folder with what launch.sh needs before it installs, and without .venv."""
    for name in ("launch.sh", "requirements.txt"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "neoflix").symlink_to(ROOT / "neoflix")
    return tmp_path


NO_PIP = {"PYTHON": PYTHON, "PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": "/dev/null", "PIP_FIND_LINKS": ""}
OLD_DRIVER = {"/proc/driver/nvidia/version": "NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.86.15  Fri Jan 24\n"}


@pytest.mark.parametrize("words", [["--setup-only"], ["--doctor"], []])
def test_an_old_driver_ends_it_before_anything_is_installed(clone, machine_of, words):
    """pip could install nothing: it has no index."""
    env = machine_of(torch=None, files=OLD_DRIVER) | {
        "PYTHON": PYTHON,
        "PIP_NO_INDEX": "1",
        "PIP_CONFIG_FILE": "/dev/null",
    }
    output = run_program(clone / "launch.sh", *words, env=env, expect=2)
    assert re.search(r"^error: driver 570\.86\.15 is older .*bin/python -m pip install torch==\S+cu126 ", output, re.M)
    assert "No matching distribution" not in output
    assert f"{clone}/.venv/bin/python -m pip" in output
    assert (clone / ".venv" / "bin" / "pip").exists(), "the command that it names must work"


def test_a_driver_is_no_matter_where_gpus_are_hidden(clone, machine_of):
    env = machine_of(torch=None, files=OLD_DRIVER) | NO_PIP | {"CUDA_VISIBLE_DEVICES": ""}
    output = run_program(clone / "launch.sh", "--doctor", env=env)
    assert "--setup-only" in output


def test_a_dry_run_without_an_environment(clone):
    output = run_program(clone / "launch.sh", env={"DRY_RUN": "1", "PYTHON": PYTHON})
    assert f"{PYTHON} -m venv .venv" in output
    assert "--setup-only" in output
    assert not (clone / ".venv").exists()


def test_doctor_has_a_table(machine_of):
    output = run_program("./launch.sh", "--doctor", env=machine_of(RTX_3090))
    assert re.search(r"^ok +GPU 0 +NVIDIA GeForce RTX 3090", output, re.MULTILINE)


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
