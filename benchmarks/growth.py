"""How a run's cost grows with the rows of the data set and with processes, and where start-up time goes.

    python benchmarks/growth.py                                   # 1,000 to 1,000,000 rows, 1 to 4 processes
    python benchmarks/growth.py --rows 1000 --processes 1 2

Each line is a whole run of train.py with the demo recipe (a small GPT-Neo from scratch, its own tokenizer) on
generated descriptions, ended after some steps. Each number of rows runs twice: cold, when the texts are tokenized,
and warm, when they are in the cache. Start-up is the time from the process's start to the end of its first step:
imports, train.py's own steps, and DeepSpeed's engine. Each run ends with a line of JSON; --output also appends it to
a file.
"""

import argparse
import csv
import json
import os
import random
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

WORDS_PER_TEXT = 24  # of the real descriptions, on average
TEXTS_PER_STEP = 64


def main() -> None:
    args = parse_args()
    if args.child:
        measure(args.child, args.train_words)
        return
    with tempfile.TemporaryDirectory() as folder:
        for num_rows in args.rows:
            path = write_rows(Path(folder, f"{num_rows}.csv"), num_rows)
            for cache in ("cold", "warm"):
                figures = run(Path(folder), path, args.steps, num_processes=1)
                report({"rows": num_rows, "processes": 1, "cache": cache} | figures, args.output)
        path = write_rows(Path(folder, "processes.csv"), 10_000)
        run(Path(folder), path, 1, num_processes=1)  # fills the cache
        for num_processes in args.processes:
            figures = run(Path(folder), path, args.steps, num_processes)
            report({"rows": 10_000, "processes": num_processes, "cache": "warm"} | figures, args.output)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="*", default=[1_000, 10_000, 100_000, 1_000_000])
    parser.add_argument("--processes", type=int, nargs="*", default=[1, 2, 4])
    parser.add_argument("--steps", type=int, default=30, help="steps of each run")
    parser.add_argument("--output", help="JSON lines file to append to")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)
    parser.add_argument("train_words", nargs="*", help=argparse.SUPPRESS)
    return parser.parse_args()


def write_rows(path: Path, num_rows: int) -> Path:
    """Writes a CSV of generated descriptions, nearly all different, with the sample catalogue's words."""
    with open(ROOT / "data" / "sample_titles.csv", encoding="utf-8", newline="") as file:
        words = sorted({word for row in csv.DictReader(file) for word in row["description"].split()})
    rng = random.Random(0)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["description"])
        for _ in range(num_rows):
            writer.writerow([" ".join(rng.choices(words, k=max(4, round(rng.gauss(WORDS_PER_TEXT, 4)))))])
    return path


def run(folder: Path, dataset: Path, num_steps: int, num_processes: int) -> dict:
    """Runs train.py in `num_processes` processes for `num_steps` steps."""
    from machine import run_job  # not at the top: a run's own process imports torch by the clock

    figures, output_dir = folder / "figures.json", folder / f"run-{random.getrandbits(32)}"
    train_words = {
        "config": ROOT / "recipes" / "demo.yaml",
        "dataset": dataset,
        "cache_dir": folder / "cache",
        "output_dir": output_dir,
        "per_device_train_batch_size": TEXTS_PER_STEP // num_processes,
        "max_steps": num_steps,
        "validation_fraction": 0,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": "true",
    }
    words = [str(word) for name, value in train_words.items() for word in (f"--{name}", value)]
    run_job(__file__, ["--child", str(figures), "--", *words], num_processes, STARTED=str(time.time()))
    results = json.loads((output_dir / "all_results.json").read_text())
    return json.loads(figures.read_text()) | {
        "real_tokens_per_second": results["train_tokens_per_second"],
        "peak_host_gib": results["train_peak_host_bytes"] / 2**30,
    }


def measure(figures_path: str, train_words: list[str]) -> None:
    """Runs train.py in this process and times each part of its start."""
    parts = {"launcher": time.time() - float(os.environ["STARTED"])}

    def timed(name: str, function):
        def wrapper(*args, **kwargs):
            began = time.time()
            try:
                return function(*args, **kwargs)
            finally:
                parts[name] = parts.get(name, 0.0) + time.time() - began

        return wrapper

    timed("import torch", __import__)("torch")
    timed("import transformers", __import__)("transformers.trainer")
    timed("import deepspeed", __import__)("deepspeed")
    train = timed("import the rest", __import__)("train")
    for name in ("read_dataset", "split_texts", "find_tokenizer", "tokenize_split"):
        setattr(train, name, timed(name, getattr(train, name)))
    for name, part in (("read_all_flags", "arguments"), ("plan_run", "plan"), ("connect", "connect")):
        setattr(train, name, timed(part, getattr(train, name)))
    train.load_model = timed("load_model", train.load_model)
    trainer = train.TokenTrainer
    first_step, training_step = [], trainer.training_step

    def step(self, *args, **kwargs):
        if first_step:
            return training_step(self, *args, **kwargs)
        parts["engine"] = time.time() - train_began[0]
        loss = timed("first batch", training_step)(self, *args, **kwargs)
        first_step.append(time.time())
        return loss

    train_began, train_method = [], trainer.train
    trainer.training_step = step
    trainer.train = lambda self, **kwargs: train_began.append(time.time()) or train_method(self, **kwargs)
    train.main(train_words)
    total = first_step[0] - float(os.environ["STARTED"])
    if int(os.environ["RANK"]) == 0:
        parts["other"] = total - sum(parts.values())
        Path(figures_path).write_text(json.dumps({"start_up_seconds": total, "start_up": parts}))


def report(figures: dict, output: str | None) -> None:
    from machine import write_line

    print(
        f"{figures['rows']:>9,} rows, {figures['processes']} process(es), {figures['cache']}: "
        f"{figures['real_tokens_per_second']:,.0f} real tokens/s, {figures['peak_host_gib']:.2f} GiB of host memory, "
        f"first step after {figures['start_up_seconds']:.1f} s"
    )
    print("           " + ", ".join(f"{name} {seconds:.1f}" for name, seconds in figures["start_up"].items()))
    write_line(figures, output)


if __name__ == "__main__":
    main()
