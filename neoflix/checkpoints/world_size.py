"""Converts a ZeRO checkpoint for another number of processes, to DeepSpeed's universal form.

ZeRO's files hold each process's share of the optimizer's flattened tensors; the universal form holds one tensor for
each weight (https://www.deepspeed.ai/tutorials/universal-checkpointing). It is made when a run is resumed by another
number of processes, is kept in the run's folder as `checkpoint-N.ID.universal` until all have read it, and is then
deleted.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from neoflix.checkpoints.manifest import read_manifest
from neoflix.checkpoints.names import LATEST_FILE, STATE_FILE
from neoflix.checkpoints.storage import check_space
from neoflix.runtime.console import progress, say
from neoflix.runtime.errors import UserError
from neoflix.runtime.files import without_wildcards


def needs_conversion(checkpoint: Path, num_processes: int) -> bool:
    """Whether the optimizer in this checkpoint is partitioned for another number of processes."""
    is_partitioned = any(checkpoint.glob("*/*_optim_states.pt"))  # not at ZeRO stage 0
    return is_partitioned and read_manifest(checkpoint)["num_processes"] != num_processes


def check_loadable(checkpoint: Path, zero: dict, num_processes: int) -> None:
    """UserError where DeepSpeed 0.19.8 would fail to load the optimizer, or would silently not load it.

    Args:
        zero: `zero_optimization` of the DeepSpeed file.
    """
    saved = read_manifest(checkpoint)
    alike = {0: {0}, 1: {1, 2}, 2: {1, 2}, 3: {3}}[saved["zero_stage"]]
    if zero.get("stage", 0) not in alike:
        raise UserError(
            f"{checkpoint} was saved at ZeRO stage {saved['zero_stage']}, and its optimizer does not fit stage "
            f"{zero.get('stage', 0)}; resume with the --deepspeed file it was saved with, or start again in another "
            "--output_dir"
        )
    is_on_nvme = zero.get("offload_optimizer", {}).get("device") == "nvme"
    if is_on_nvme and saved["num_processes"] != num_processes:
        raise UserError(
            f"{checkpoint} was saved by {saved['num_processes']} process(es) with the optimizer on NVMe, and "
            f"{num_processes} cannot load it; resume with {saved['num_processes']}, or start again in another "
            "--output_dir"
        )


def convert(checkpoint: Path, target: Path) -> Path:
    """Writes a checkpoint's universal form to the folder `target` and returns it. One process.

    The checkpoint itself is only read. UserError where the disk is too full.
    """
    tag = (checkpoint / LATEST_FILE).read_text().strip()
    optimizer_bytes = sum(path.stat().st_size for path in checkpoint.glob("*/*_optim_states.pt"))
    model_bytes = sum(path.stat().st_size for path in checkpoint.glob("*/*_model_states.pt"))
    needed = 2 * (optimizer_bytes + model_bytes)  # in slices first, then whole; tied weights once more
    saved_by = read_manifest(checkpoint)["num_processes"]
    say(f"{checkpoint.name} was saved by {saved_by} process(es); converting it takes {needed / 2**30:.1f} GiB of disk")
    check_space(target.parent, needed, "the conversion takes")
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    with without_wildcards(checkpoint) as source, without_wildcards(target) as readable:
        _convert_optimizer(source / tag, readable / tag, num_bytes=2 * optimizer_bytes)
    for name in (STATE_FILE, "scheduler.pt"):
        shutil.copyfile(checkpoint / name, target / name)
    return target


def _convert_optimizer(source: Path, target: Path, num_bytes: int) -> None:
    """Runs DeepSpeed's own program, in a separate process, so that its memory is returned to the system."""
    words = ["--input_folder", source, "--output_folder", target, "--inject_missing_state"]
    workers = ["--num_extract_workers", "1", "--num_merge_workers", "2"]  # each holds a process's whole share
    with (
        tempfile.TemporaryFile("w+") as log,
        progress(total=num_bytes, desc="Converting", unit="B", unit_scale=True) as bar,
    ):
        command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", *map(str, words), *workers]
        program = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        while program.poll() is None:
            time.sleep(0.5)
            bar.update(max(_num_bytes(target) - bar.n, 0))
        log.seek(0)
        said = log.read()
    if program.returncode:
        raise RuntimeError(f"DeepSpeed could not convert {source}:\n{said[-2000:]}")


def _num_bytes(folder: Path) -> int:
    """The size of all files under a folder while files come and go."""
    total = 0
    for parent, _, names in os.walk(folder):  # unlike rglob, it skips what has disappeared meanwhile
        for name in names:
            with suppress(FileNotFoundError):
                total += os.path.getsize(os.path.join(parent, name))
    return total
