"""The documents' commands and paths. Commands in README and docs/your-texts are run with a small model and few steps;
those on other pages are parsed. Lines with `# not run by a test: why` and ```sh blocks (other programs) are skipped.
"""

import dataclasses
import importlib
import os
import re
import shlex
import shutil
import subprocess

import pytest
from conftest import ROOT, parse_train_args, run_program
from torch.distributed.run import parse_args as parse_torchrun_args

import generate
import train
from neoflix.arguments.generate import parse_generate_args
from neoflix.arguments.reader import read_train_flags
from neoflix.arguments.training import TrainArguments
from neoflix.export import parse_export_args
from neoflix.report import main, parse_report_args
from neoflix.upload import parse_upload_args

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))  # tests/runs/test_notebook.py runs them
RUN = [ROOT / "README.md", *sorted((ROOT / "docs" / "your-texts").glob("*.md"))]
FOLDERS = ("docs", "recipes", "neoflix", "benchmarks", "ds_configs", "tests", "data", "jobs", "notebooks")
SMALL = {
    "--max_steps": "4",
    "--deepspeed": "ds_configs/cpu.json",
    "--use_cpu": "true",
    "--cache_dir": "cache",
    "--disable_tqdm": "true",
}


def commands(page) -> list[str]:
    """The commands in a page's ```bash blocks, without those that are marked as not run by a test."""
    blocks = re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", "").splitlines() if line.strip()]
    return [line for line in lines if "not run by a test" not in line and not line.lstrip().startswith("#")]


def split(line: str) -> tuple[dict[str, str], list[str]]:
    """(environment, words) of a command."""
    words = shlex.split(line, comments=True)
    env = {}
    while re.fullmatch(r"[A-Z_]+=.*", words[0]):
        name, _, value = words.pop(0).partition("=")
        env[name] = value
    return env, words


def paths(page) -> set[str]:
    """The paths of this repository that a page mentions (relative to its root), and the targets of its links."""
    text = page.read_text(encoding="utf-8")
    mentioned = re.findall(rf"(?<![\w/.-])((?:{'|'.join(FOLDERS)})/[\w./-]*\w)", text)
    linked = re.findall(r"\]\((?!http)([^)#]+)\)", text)
    return {*mentioned, *(os.path.relpath(page.parent / name, ROOT) for name in linked)}


def test_readme_has_commands():
    assert len(commands(ROOT / "README.md")) > 5


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


@pytest.mark.parametrize("page", [*PAGES, *NOTEBOOKS], ids=lambda page: str(page.relative_to(ROOT)))
def test_paths_on_a_page_exist(page):
    missing = {name for name in paths(page) if "NAME" not in name and not (ROOT / name).exists()}
    assert missing <= {"data/netflix_titles.csv"}  # downloaded


@pytest.mark.parametrize("page", [ROOT / "README.md", *NOTEBOOKS], ids=lambda page: page.name)
def test_flags_on_a_page_exist(page):
    known = {f"--{field.name}" for field in dataclasses.fields(TrainArguments)}
    for words in (parse_generate_args([]), parse_export_args(["--to", "gpt2", "RUN", "OUT"])):
        known |= {f"--{name}" for name in vars(words)}
    known |= {"--help", "--help-all", "--setup-only", "--doctor", "--num_accelerators", "--nodes"}
    lines = page.read_text(encoding="utf-8").splitlines()
    if page in NOTEBOOKS:
        known |= {"--quiet"}  # DeepSpeed's
        lines = [line for line in lines if not re.search(r"!git |!tar |-m pip ", line)]
    flags = set(re.findall(r"(?<![\w-])--[a-z][a-z_-]*", "\n".join(lines)))
    assert flags
    assert flags <= known, flags - known


@pytest.fixture(scope="module")
def desk(tmp_path_factory, model_dir):
    """A copy of the project's folder (by links) where commands can write."""
    folder = tmp_path_factory.mktemp("desk")
    for path in ROOT.iterdir():
        if path.name in {
            "data",
            "docs",
            "recipes",
            "ds_configs",
            "train.py",
            "generate.py",
            "neoflix",
            "ds_config.json",
        }:
            (folder / path.name).symlink_to(path)
    (folder / "poems.jsonl").write_text(
        "".join(f'{{"poem": "The {i} roses of the garden wither in the rain."}}\n' for i in range(60))
    )
    shutil.copytree(model_dir, folder / "tiny")
    return folder


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
@pytest.mark.process
def test_commands_on_a_page_work(page, desk, monkeypatch):
    monkeypatch.chdir(desk)
    for line in commands(page):
        env, words = split(line)
        (run_command if page in RUN else read_command)(line, env, words)


@pytest.mark.process
def test_the_example_for_other_programs_runs(desk, monkeypatch, capsys):
    monkeypatch.chdir(desk)
    page = (ROOT / "docs" / "loading.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    exec(block.replace("EleutherAI/gpt-neo-125m", "tiny"), {})
    assert len(capsys.readouterr().out.splitlines()) >= 2


def without_launcher(words: list[str]) -> list[str]:
    """`deepspeed --num_accelerators 2 train.py ...` as `python train.py ...`; torchrun's flags are parsed."""
    if words[0] == "torchrun":
        assert parse_torchrun_args(words[1:]).training_script == "train.py"
    return ["python", *words[words.index("train.py") :]] if words[0] in ("deepspeed", "torchrun") else words


def read_command(line: str, env: dict, words: list[str]) -> None:
    """Parses a command; those without a parser are run."""
    match without_launcher(words):
        case _ if "..." in words:
            pass
        case ["python", "train.py", *rest] if "--tune" in rest:
            read_train_flags(rest)
        case ["python", "train.py", *rest]:
            parse_train_args([*rest, "--use_cpu", "true", "--deepspeed", "ds_configs/cpu.json"])
        case ["python", "generate.py", *rest]:
            parse_generate_args(rest)
        case ["python", "-m", "neoflix.export", *rest]:
            parse_export_args(rest)
        case ["python", "-m", "neoflix.report", *rest]:
            parse_report_args(rest)
        case ["python", "-m", "neoflix.upload", *rest]:
            parse_upload_args(rest)
        case _:
            run_command(line, env, words)


def run_command(line: str, env: dict, words: list[str]) -> None:
    """Runs a command with a small model and few steps; launch.sh and sbatch as a dry run."""
    match without_launcher(words):
        case _ if "..." in words:
            pass
        case ["python", "train.py", *rest] if "--tune" in rest:  # tests/runs/test_tune.py runs it
            read_train_flags(rest)
        case ["python", "train.py", *rest]:
            if "--eval_only" not in rest:  # each example is a run of its own
                shutil.rmtree("results", ignore_errors=True)
            train.main([*rest, *small_run(rest)])
        case ["python", "generate.py", *rest]:
            prepare_samples(rest)
            few = ["--num_samples", "2"] if "--judge" not in rest else []
            generate.main([*rest, *few, "--max_new_tokens", "8"])
        case ["python", "-m", "neoflix.report", *runs]:
            for run in runs[1:]:
                shutil.copytree(runs[0], run)
            main(runs)
        case ["python", "-m", module, *rest] if module.startswith("neoflix."):
            importlib.import_module(module).main(rest)
        case ["./launch.sh", *rest] | ["sbatch", *rest]:
            arguments = rest[rest.index("launch.sh") + 1 :] if "launch.sh" in rest else rest
            run_program("./launch.sh", *arguments, env={**env, "DRY_RUN": "1"})
        case ["make", target]:
            run_program("make", "--dry-run", target)
        case ["source", file]:
            assert file == ".venv/bin/activate"
        case ["python", "-c", _] | ["mkdir" | "touch" | "cp", *_]:
            path = f"{os.path.dirname(os.sys.executable)}:{os.environ['PATH']}"
            subprocess.run(line, shell=True, check=True, env={**os.environ, "PATH": path})
        case _:
            pytest.fail(f"unknown, and not marked as not run by a test: {line}")


def small_run(words: list[str]) -> list[str]:
    """Flags that make a run small; the data set and the demo model of a command stay."""
    flags = dict(SMALL)
    if "--eval_only" in words:
        return ["--use_cpu", "true", "--cache_dir", "cache"]
    if "demo" not in words:
        flags["--model_name_or_path"] = "tiny"
    if "netflix" in words or not ("--dataset" in words or re.search("own-|txt-", " ".join(words))):
        flags["--dataset"] = "sample"
    return [word for pair in flags.items() for word in pair]


def prepare_samples(words: list[str]) -> None:
    """Makes the checkpoint that a command names, as a copy of the newest."""
    folder = words[words.index("--model_dir") + 1] if "--model_dir" in words else ""
    if "checkpoint-" in folder and not os.path.isdir(folder):
        run = os.path.dirname(folder)
        newest = max(name for name in os.listdir(run) if name.startswith("checkpoint-"))
        shutil.copytree(os.path.join(run, newest), folder)
