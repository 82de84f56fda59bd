"""Kills a run of two processes again and again, at random moments and inside saves, and checks the result.

    python benchmarks/soak.py --kills 30          # 6 minutes on 2 CPU cores
    python benchmarks/soak.py --kills 3 --seed 7  # the seed decides targets and moments

First an undisturbed run. Then the same run is started, killed with SIGKILL (one rank, all ranks, DeepSpeed's
launcher, the `deepspeed` command) and started again by the same command until its end, and again from the beginning
until there were enough kills. Checked: after each kill nothing runs after 60 s; each start resumes from the newest
checkpoint whose files all match their checksums; each finished run equals the undisturbed one bit for bit: weights,
optimizer, schedule, random states, losses. Exit code 1 at the first difference. Ends with a line of JSON; --output
also appends it to a file.
"""

import argparse
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import psutil
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from machine import write_line

from neoflix.arguments.deepspeed_file import is_compact, read_ds_config
from neoflix.checkpoints.find import list_numbered
from neoflix.checkpoints.manifest import find_corruption, read_manifest
from neoflix.checkpoints.names import RESULTS_FILE, STATE_FILE

TARGETS = ("rank 0", "rank 1", "all ranks", "launcher", "command")
TRAINING_SECONDS = 3.0  # within which a kill outside a save falls, after the first step


def main() -> None:
    args = parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write_line(soak(Path(folder), args), args.output)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--steps", type=int, default=60, help="steps of each run, with a save after every second one")
    parser.add_argument("--deepspeed", default="ds_config.json", help="DeepSpeed file of the runs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", help="JSON lines file to append to")
    return parser.parse_args()


def soak(folder: Path, args: argparse.Namespace) -> dict:
    rng, began = random.Random(args.seed), time.time()
    untouched = folder / "untouched"
    life = Life(untouched, args)
    check(life.wait() == 0, "the untouched run failed", life)
    expected = fingerprint(untouched)

    kills, seconds, runs, resumed, in_save, finished = Counter(), [], 0, 0, 0, False
    while kills.total() < args.kills or not finished:
        run = folder / f"run-{runs}"
        newest = next(
            (path for path in reversed(list_numbered(run)) if not find_corruption(path, checksums=True)), None
        )
        life, finished = Life(run, args), False
        if kills.total() < args.kills and life.await_first_step():
            target, wants_save = rng.choice(TARGETS), rng.random() < 0.5
            if life.await_moment(rng.uniform(0, TRAINING_SECONDS), wants_save):
                kills[target] += 1
                in_save += any(run.glob("checkpoint-*.part"))
                seconds.append(life.kill(target))
        life.wait()
        check(life.chosen() in (None, newest), f"resumed from {life.chosen()}, not {newest}", life)
        resumed += life.chosen() is not None
        finished = (run / RESULTS_FILE).is_file()
        if finished:
            difference = compare(fingerprint(run), expected)
            check(not difference, f"{run.name} is not the untouched run: {difference}", life)
            print(f"run {runs} finished after {kills.total()} kills, the same as never touched", flush=True)
            shutil.rmtree(run)
            runs += 1
    return {
        "deepspeed": args.deepspeed,
        "steps": args.steps,
        "kills": dict(kills),
        "kills_inside_a_save": in_save,
        "resumed": resumed,
        "runs_finished_identical": runs,
        "seconds_until_nothing_runs": {"median": sorted(seconds)[len(seconds) // 2], "longest": max(seconds)},
        "minutes": round((time.time() - began) / 60, 1),
    }


def train_words(run: Path, args: argparse.Namespace) -> list[str]:
    """The run: train.py with its flags."""
    flags = {
        "config": "recipes/demo.yaml",
        "deepspeed": args.deepspeed,
        "output_dir": run,
        "cache_dir": run.parent / "cache",
        "max_steps": args.steps,
        "per_device_train_batch_size": 4,
        "eval_strategy": "steps",
        "eval_steps": 10,
        "early_stopping_patience": 0,
        "save_strategy": "steps",
        "save_steps": 2,
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": "true",
        "bf16": str(is_compact(read_ds_config(args.deepspeed))).lower(),
    }
    return ["train.py", *(str(word) for name, value in flags.items() for word in (f"--{name}", value))]


class Life:
    """One start of the run, until it ends or is killed."""

    def __init__(self, run: Path, args: argparse.Namespace):
        self.run, self.log = run, run.with_suffix(".log")
        port = random.SystemRandom().randint(20_000, 30_000)  # not one that the system hands out meanwhile
        deepspeed = [sys.executable, Path(sys.executable).with_name("deepspeed")]
        with self.log.open("w") as log:
            self.command = subprocess.Popen(
                [*deepspeed, "--num_accelerators", "2", "--master_port", str(port), *train_words(run, args)],
                cwd=ROOT,
                env=os.environ | {"DS_ACCELERATOR": "cpu"},
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def processes(self) -> list[psutil.Process]:
        """All processes of this folder's run (command, launcher, ranks), by their command lines."""
        found = []
        for process in psutil.process_iter(["cmdline", "status"]):
            words = process.info["cmdline"] or []
            if str(self.run) in words and process.info["status"] != psutil.STATUS_ZOMBIE:
                found.append(process)
        return found

    def await_first_step(self) -> bool:
        while self.command.poll() is None:
            if "'loss'" in self.log.read_text():
                return True
            time.sleep(0.05)
        return False

    def await_moment(self, seconds: float, wants_save: bool) -> bool:
        """Waits for a save to begin, or for some time; False if the run ended before."""
        moment = time.time() + seconds
        while self.command.poll() is None:
            if any(self.run.glob("checkpoint-*.part")) if wants_save else time.time() > moment:
                time.sleep(seconds / 50 if wants_save else 0)  # not always the beginning of the save
                return self.command.poll() is None
            time.sleep(0.002)
        return False

    def kill(self, target: str, number: int = signal.SIGKILL) -> float:
        """Kills the run and returns the seconds until no process of it is left."""
        began = time.time()
        for process in self.processes():
            if role(process.cmdline()) == target or (target == "all ranks" and "rank" in role(process.cmdline())):
                process.send_signal(number)
        while self.processes():
            check(time.time() - began < 60, f"still running 60 s after signal {number} to {target}", self)
            self.command.poll()
            time.sleep(0.1)
        return round(time.time() - began, 1)

    def wait(self) -> int:
        return self.command.wait(600)

    def chosen(self) -> Path | None:
        match = re.search(r"Resuming from (\S+)", self.log.read_text())
        return Path(match[1]) if match else None


def role(words: list[str]) -> str:
    local_rank = next((word[-1] for word in words if word.startswith("--local_rank=")), None)
    if local_rank:
        return f"rank {local_rank}"
    return "launcher" if "deepspeed.launcher.launch" in words else "command"


def fingerprint(run: Path) -> dict:
    """What two equal runs share: the contents of the last checkpoint, and the losses."""
    last = list_numbered(run)[-1]
    names = [name for name in read_manifest(last)["files"] if name.endswith((".pt", ".pth"))]
    states = {name: digest(torch.load(last / name, weights_only=False)) for name in names if "args" not in name}
    state = json.loads((last / STATE_FILE).read_text())
    keys = ("step", "loss", "grad_norm", "learning_rate", "eval_loss")
    history = [{key: line[key] for key in keys if key in line} for line in state["log_history"]]
    # The best model, and the last one, whose weights are nowhere else if the run is without ZeRO.
    folders = {"best": run, "last": last}
    saved = {name: digest(load_file(folder / "model.safetensors")) for name, folder in folders.items()}
    return states | saved | {"losses": history, "callbacks": state["stateful_callbacks"]}


def digest(value) -> str:
    """A hash of the values: a file's bytes also depend on which objects were shared."""
    if isinstance(value, dict):
        parts = [str((key, digest(inner))) for key, inner in value.items()]
    elif isinstance(value, list | tuple):
        parts = [digest(inner) for inner in value]
    elif isinstance(value, torch.Tensor):
        parts = [str(value.dtype), str(tuple(value.shape)), value.contiguous().view(-1).view(torch.uint8).numpy()]
    elif isinstance(value, np.ndarray):
        parts = [str(value.dtype), np.ascontiguousarray(value)]
    elif type(value).__module__ == "builtins":
        parts = [repr(value)]
    else:
        parts = [type(value).__name__, digest(vars(value))]
    combined = hashlib.sha256()
    for part in parts:
        combined.update(part.encode() if isinstance(part, str) else part)
    return combined.hexdigest()


def compare(ours: dict, expected: dict) -> str:
    return ", ".join(sorted(key for key in ours.keys() | expected.keys() if ours.get(key) != expected.get(key)))


def check(holds: bool, sentence: str, life: Life) -> None:
    if not holds:
        log = life.log.read_text()
        for process in life.processes():
            process.kill()
        sys.exit(f"{log}\nsoak: {sentence}")


if __name__ == "__main__":
    main()
