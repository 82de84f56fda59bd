"""The cost of complete checkpoints: a save with and without a manifest.

    python benchmarks/checkpoint.py --gib 2

Both save the same state, of Adam's shape, and flush it to the disk (fsync): DeepSpeed with torch.save to a path, this
project with torch.save through a hash, then the manifest. The two take turns on the disk of --folder. The check
before a resume, which reads and hashes every file, is measured too.
"""

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from machine import write_line

from neoflix.checkpoints.manifest import Files, find_corruption, num_bytes, write_manifest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=2.0, help="size of the checkpoint")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--folder", help="where to write; default: a temporary folder")
    parser.add_argument("--output", help="JSON lines file to append to")
    args = parser.parse_args()
    num_weights = int(args.gib * 2**30 / 12)
    state = {name: torch.randn(num_weights) for name in ("fp32", "exp_avg", "exp_avg_sq")}
    seconds = {"without": [], "with": [], "check": []}
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        for _ in range(args.turns):
            seconds["without"].append(clock(save_without, state, Path(folder, "checkpoint")))
            seconds["with"].append(clock(save_with, state, Path(folder, "checkpoint")))
            seconds["check"].append(clock(find_corruption, Path(folder, "checkpoint"), checksums=True))
            size = num_bytes(Path(folder, "checkpoint"))
    medians = {f"seconds_{name}": round(statistics.median(values), 2) for name, values in seconds.items()}
    ratios = [ours / theirs for ours, theirs in zip(seconds["with"], seconds["without"], strict=True)]
    write_line({"bytes": size, **medians, "ratio": round(statistics.median(ratios), 3), "ratios": ratios}, args.output)


def clock(work, *args, **kwargs) -> float:
    began = time.perf_counter()
    work(*args, **kwargs)
    return time.perf_counter() - began


def save_without(state: dict, folder: Path) -> None:
    empty(folder)
    torch.save(state, folder / "states.pt")
    with (folder / "states.pt").open("rb") as file:
        os.fsync(file.fileno())


def save_with(state: dict, folder: Path) -> None:
    empty(folder)
    files = Files(folder)
    files.save(state, folder / "states.pt")
    write_manifest(folder, {"step": 1}, files.entries)


def empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()


if __name__ == "__main__":
    main()
