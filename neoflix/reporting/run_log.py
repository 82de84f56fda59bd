"""What a run records while it goes on: its starts, and the texts of each evaluation."""

import json
import os
import platform
import re
import shlex
import time
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

from neoflix.checkpoints.names import LIVE_SAMPLES_FILE, STARTS_FILE
from neoflix.data.rows import FileError
from neoflix.data.tables import parse_json_lines
from neoflix.runtime.files import read_json, write_json, write_text
from neoflix.runtime.gpus import read_gpus
from neoflix.runtime.redaction import redact_command


def log_start(output_dir: str, facts: dict) -> None:
    """Adds a start to the run's starts.json, with hardware and versions. A start from step 0 replaces earlier ones.

    To be called in one process.

    Args:
        facts: facts of this start, among them `command` and `from_step`.
    """
    before = read_json(Path(output_dir, STARTS_FILE), []) if facts["from_step"] else []
    command = redact_command(shlex.split(facts["command"]))
    facts = {"time": time.strftime("%Y-%m-%d %H:%M:%S %z"), **facts, "command": command}
    packages = ("torch", "transformers", "deepspeed", "accelerate")
    facts["versions"] = {"python": platform.python_version()} | {name: version(name) for name in packages}
    write_json(Path(output_dir, STARTS_FILE), [*before, facts | {"hardware": describe_hardware()}])


def describe_hardware() -> str:
    """This node's GPUs, if there are any, and its processor, cores and memory, in a few words."""
    memory = f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB of memory"
    names = re.findall(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    host = f"{len(os.sched_getaffinity(0))} cores of {names[0] if names else platform.machine()}, {memory}"
    if not (gpus := read_gpus()):
        return host
    return f"{len(gpus)} x {gpus[0].name}, {gpus[0].memory / 2**30:.0f} GiB; {host}"


def read_live_samples(output_dir: str | Path) -> list[dict]:
    """The rows of a run's file of samples, up to a line that a killed process left unfinished."""
    rows = []
    path = Path(output_dir, LIVE_SAMPLES_FILE)
    damage = (FileNotFoundError, FileError, ValueError, KeyError, TypeError)
    with suppress(*damage), path.open(encoding="utf-8") as lines:
        for _, row in parse_json_lines(lines):
            numbers = {"step": int(row["step"]), "epoch": float(row["epoch"])}
            rows.append(numbers | {name: str(row[name]) for name in ("prompt", "text")})
    return rows


def write_live_samples(output_dir: str | Path, rows: list[dict]) -> None:
    """Replaces the run's file of samples. If that fails (OSError), the old file stays."""
    path = Path(output_dir, LIVE_SAMPLES_FILE)
    if not rows:
        path.unlink(missing_ok=True)
        return
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
