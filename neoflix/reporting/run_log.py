"""What a run writes down as it goes: how it was started, and the texts of each evaluation."""

import json
import os
import platform
import re
import shlex
import time
from importlib.metadata import version
from pathlib import Path

import torch

from neoflix.checkpoints.names import LIVE_SAMPLES_FILE, STARTS_FILE
from neoflix.runtime.files import read_json, write_json, write_text
from neoflix.runtime.redaction import redact_command


def log_start(output_dir: str, facts: dict) -> None:
    """Adds to the run's folder how it was started this time, on what machine and with which versions. A start from the
    beginning forgets those before it. One process.

    Args:
        facts: of this start; `from_step`: how far the run was.
    """
    before = read_json(Path(output_dir, STARTS_FILE), []) if facts["from_step"] else []
    command = redact_command(shlex.split(facts["command"]))
    facts = {"time": time.strftime("%Y-%m-%d %H:%M:%S %z"), **facts, "command": command}
    packages = ("torch", "transformers", "deepspeed", "accelerate")
    facts["versions"] = {"python": platform.python_version()} | {name: version(name) for name in packages}
    write_json(Path(output_dir, STARTS_FILE), [*before, facts | {"hardware": describe_hardware()}])


def describe_hardware() -> str:
    """This node's devices, or its processor, cores and memory, in a few words."""
    memory = f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB of memory"
    names = re.findall(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    host = f"{len(os.sched_getaffinity(0))} cores of {names[0] if names else platform.machine()}, {memory}"
    if not torch.cuda.is_available():
        return host
    properties = torch.cuda.get_device_properties(0)
    device = f"{torch.cuda.device_count()} x {properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    return f"{device}; {host}"


def read_live_samples(output_dir: str | Path) -> list[dict]:
    """The rows of a run's file of samples; what a kill left of one is left out."""
    rows = []
    try:
        lines = Path(output_dir, LIVE_SAMPLES_FILE).read_text(encoding="utf-8").split("\n")  # a text may hold U+2028
    except FileNotFoundError:
        return []
    for line in lines:
        try:
            row = json.loads(line)
            rows.append(
                {"step": int(row["step"]), "epoch": float(row["epoch"])} | {k: str(row[k]) for k in ("prompt", "text")}
            )
        except (ValueError, KeyError, TypeError):
            continue
    return rows


def write_live_samples(output_dir: str | Path, rows: list[dict]) -> None:
    """All rows or, where that fails (OSError), those that were there before."""
    path = Path(output_dir, LIVE_SAMPLES_FILE)
    if not rows:
        path.unlink(missing_ok=True)
        return
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
