"""The image's context holds what a run needs and nothing else; the Dockerfile starts launch.sh as process 1.

Docker is not needed: these tests read both files as it does.
"""

import json
import os
import re
import shlex
import shutil
from pathlib import Path

import pytest
from conftest import ROOT, run_program


def matches(pattern: str, path: str) -> bool:
    """Whether a line of .dockerignore names a path or a folder above it."""
    parts = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*"}
    words = re.split(r"(\*\*/|\*\*|\*)", pattern)
    return re.fullmatch("".join(parts.get(word, re.escape(word)) for word in words) + "(?:/.*)?", path) is not None


def is_sent(path: str) -> bool:
    """Whether Docker sends a file to the build: of the lines that match it, the last decides."""
    sent = True
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        if line and not line.startswith("#") and matches(line.removeprefix("!"), path):
            sent = line.startswith("!")
    return sent


def instructions() -> list[tuple[str, str]]:
    """(instruction, its words) of the Dockerfile, in order."""
    text = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE).replace("\\\n", "")
    return [tuple(line.split(maxsplit=1)) for line in text.splitlines() if line.strip()]


def last(name: str) -> str:
    return [words for instruction, words in instructions() if instruction == name][-1]


@pytest.mark.parametrize(
    "path",
    [
        *(".env", ".git/config", ".venv/bin/python", "hosts", "my-texts.csv", "samples.jsonl", "wandb/run/config.yaml"),
        *(
            "data/netflix_titles.csv",
            "data/README.md",
            "data/private/texts.csv",
            "ds_configs/cpu.md",
            "jobs/skypilot.yaml",
        ),
        *("neoflix/__pycache__/report.pyc", "neoflix/model/__pycache__/load.pyc", "recipes/__pycache__/x"),
        *("results/model.safetensors", "results-lora/run.json", "runs/bench/results.jsonl", "tests/conftest.py"),
    ],
)
def test_data_runs_caches_and_secrets_stay_outside(path):
    assert not is_sent(path)


@pytest.mark.process
def test_what_is_sent_trains_and_samples(tmp_path):
    for folder, folders, files in os.walk(ROOT):
        folders[:] = set(folders) - {".git", ".venv", "runs"}
        for path in (Path(folder, name) for name in files):
            copy = tmp_path / path.relative_to(ROOT)
            if is_sent(str(path.relative_to(ROOT))):
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, copy)
    assert {path.name for path in (tmp_path / "recipes").iterdir()} == {
        path.name for path in (ROOT / "recipes").iterdir()
    }
    (tmp_path / ".venv").symlink_to(ROOT / ".venv")
    output = run_program(tmp_path / "launch.sh", "--config", "recipes/demo.yaml", "--max_steps", "2")
    assert " 20. " in output
    assert (tmp_path / "results" / "report.html").is_file()


def test_what_the_dockerfile_copies_is_sent():
    copies = [shlex.split(words)[:-1] for name, words in instructions() if name == "COPY"]
    assert copies[-1] == ["."]
    for path in (path for words in copies[:-1] for path in words):
        assert (ROOT / path).is_file(), path
        assert is_sent(path), path


def test_launch_sh_is_process_1_and_not_root():
    """A string instead of a list would start a shell, which keeps SIGTERM to itself."""
    entry = json.loads(last("ENTRYPOINT"))
    assert entry == [f"{last('WORKDIR')}/launch.sh"]
    assert os.access(ROOT / "launch.sh", os.X_OK)
    assert last("USER").partition(":")[0] not in ("0", "root")
