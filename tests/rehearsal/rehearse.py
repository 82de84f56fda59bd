"""Rehearses the GPU side on a machine without one: `make rehearse`.

    python tests/rehearsal/rehearse.py                      # all cases, about an hour on two cores
    python tests/rehearsal/rehearse.py --only "125M.*"      # those whose name matches

Each case runs train.py or generate.py with torch's CUDA build on the stand-in (standin.py). A case fails if the command
fails, if the stand-in refused a call or did not know one, or if a phase took 5% more or less of the device than the
plan says (and 0.1 GiB). Figures go to benchmarks/results/rehearsal.jsonl, one line for each case.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import torch
from cases import NVME, Case, all_cases
from models import build_folder, write_texts
from standin import build
from table import compare_phases, faults_of, print_case

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
WORK = ROOT / "runs" / "rehearsal"
TOOLKIT = "/usr/local/cuda"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=".*", help="a regular expression for names of cases")
    parser.add_argument("--output", default=str(ROOT / "benchmarks/results/rehearsal.jsonl"), help="'' writes none")
    parser.add_argument("--again", action="store_true", help="only compare the figures in the file with today's plan")
    args = parser.parse_args()
    if args.again:
        compare_again(Path(args.output))
        return
    if torch.version.cuda is None:
        print(f"skipped: torch {torch.__version__} is not a CUDA build, and there is none for this platform")
        return
    cases = [case for case in all_cases() if re.fullmatch(args.only, case.name)]
    if not cases:
        names = ", ".join(case.name for case in all_cases())
        parser.error(f"--only: no case is named {args.only!r}; there are: {names}")
    build(WORK / "standin")
    write_texts(WORK / "texts.csv", 1200)
    (ROOT / NVME).mkdir(parents=True, exist_ok=True)
    passed, failed = 0, []
    for case in cases:
        if case.needs and not Path(case.needs).exists():
            print(f"\n== {case.name}: skipped, because {case.needs} is missing")
            continue
        figures = rehearse(case)
        print_case(case.name, figures)
        if args.output:
            write_line(Path(args.output), figures)
        if figures["faults"]:
            failed.append(case.name)
        else:
            passed += 1
    print(f"{passed} of {len(cases)} cases passed" + (f"; failed: {', '.join(failed)}" if failed else ""))
    sys.exit(bool(failed))


def rehearse(case: Case) -> dict:
    """Runs a case; returns its figures, with `faults` in words."""
    folder = WORK / "cases" / re.sub(r"\W+", "-", case.name)
    run_folder = WORK / "cases" / re.sub(r"\W+", "-", case.after) / "run" if case.after else folder / "run"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    log, output = folder / "standin.log", folder / "figures.json"
    began = time.perf_counter()
    with open(folder / "output.txt", "w") as screen:
        environment = os.environ | case.card.environment(WORK / "standin") | {"STANDIN_LOG": str(log)}
        environment.setdefault("CUDA_HOME", TOOLKIT)  # for NVMe's operator; nvcc on the PATH may be a link
        words = command(case, output, run_folder)
        code = subprocess.run(words, cwd=ROOT, env=environment, stdout=screen, stderr=subprocess.STDOUT).returncode
    figures = json.loads(output.read_text()) if output.is_file() else {"phases": {}}
    if case.script.endswith(".sh"):
        code = code or int(not is_complete((folder / "output.txt").read_text()))
    faults = sorted(set(log.read_text().splitlines())) if log.is_file() else []
    if code:
        faults.insert(0, f"exit code {code}: {folder / 'output.txt'}")
    figures = {"case": case.name, "card": case.card.name, "seconds": round(time.perf_counter() - began)} | figures
    if not case.after and not any(other.after == case.name for other in all_cases()):
        shutil.rmtree(run_folder, ignore_errors=True)  # a model of 2.7B takes 5 GiB
    if case.setup and not code:
        figures["compared"] = compare_phases(figures)
    return figures | {"log": faults, "faults": faults + faults_of(figures)}


def is_complete(output: str) -> bool:
    """Whether each part of gpu.sh ended well. Tests and operators.py may fail, because they compare numbers."""
    failed = [line for line in output.splitlines() if line.startswith("FAILED: ")]
    others = [line for line in failed if " pytest " not in line and "operators.py" not in line]
    compares = "operators.py" not in "".join(failed) or "gradients differ by" in output
    is_broken = others or not compares or "INTERNALERROR" in output or "ERROR tests/" in output
    return "In all " in output and "SKIPPED" not in output and not is_broken


def command(case: Case, output: Path, run_folder: Path) -> list[str]:
    """The command line of a case."""
    if case.script.endswith(".sh"):
        settings = {"PYTHON": sys.executable, "OUTPUT": str(output.with_suffix(".jsonl")), "LARGE": case.size}
        settings |= {"MIDDLE": case.size, "MINUTES": "120"}
        return ["env", *(f"{name}={value}" for name, value in settings.items()), "bash", case.script]
    probe = [str(HERE / "probe.py"), str(output), case.script]
    words = [sys.executable, *probe]
    if case.num_processes > 1:
        launcher = [sys.executable, str(Path(sys.executable).with_name("deepspeed")), "--quiet", "--no_local_rank"]
        words = [*launcher, "--num_accelerators", str(case.num_processes), *probe]
    if case.script == "generate.py":
        return [*words, "--model_dir", str(run_folder), *case.flags]
    if "--eval_only" in case.flags:
        return [*words, *case.flags, "--model_name_or_path", str(run_folder), "--dataset", str(WORK / "texts.csv")]
    is_demo = case.size == "demo"
    model = "demo" if is_demo else str(build_folder(WORK / "models" / case.size, case.size))
    texts = ("--model_name_or_path", model, "--dataset", "sample" if is_demo else str(WORK / "texts.csv"))
    return [*words, *case.flags, *texts, "--output_dir", str(run_folder), "--report_to", "none"]


def compare_again(file: Path) -> None:
    """Compares cases that were rehearsed with the plan as it is now."""
    for figures in [json.loads(line) for line in file.read_text().splitlines()]:
        if "compared" in figures:
            figures["compared"] = compare_phases(figures)
        figures["faults"] = figures["log"] + faults_of(figures)
        print_case(figures["case"], figures)
        write_line(file, figures)


def write_line(file: Path, figures: dict) -> None:
    """Puts a case's figures in the place of its older ones."""
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
    versions = {name: version(name) for name in ("torch", "transformers", "deepspeed", "accelerate")}
    hardware = f"no GPU: a stand-in for {figures['card']}, {os.cpu_count()} CPU cores"
    facts = {"benchmark": "rehearsal", "command": "make rehearse", "hardware": hardware, "versions": versions}
    facts |= {"date": datetime.now(UTC).isoformat(timespec="seconds")}
    lines = [line for line in lines if line["case"] != figures["case"]] + [facts | figures]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))


if __name__ == "__main__":
    main()
