"""The machine of a benchmark, its limits, and the line of JSON that records the figures."""

import json
import os
import platform
import random
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import torch

TRIES = 10  # the best counts: a limit is what the machine does when nothing else disturbs it


def hardware() -> str:
    """Names the GPU with its memory, or the CPU, and the number of CPU cores of this process."""
    cores = f"{len(os.sched_getaffinity(0))} CPU cores"
    if not torch.cuda.is_available():
        return f"{_cpu_model()}, {cores}"
    gpu = torch.cuda.get_device_properties(torch.cuda.current_device())
    return f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, {cores}"


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()  # ARM's cpuinfo names no model


def versions() -> dict[str, str]:
    packages = {name: version(name) for name in ("torch", "transformers", "deepspeed", "accelerate")}
    return {"python": platform.python_version(), **packages}


def product_flops_per_second(device: str | torch.device, dtype: torch.dtype) -> float:
    """Multiplications and additions per second in a product of square matrices, measured now.

    A GPU needs 8,192 columns to show its best (1.1 TFLOP: 2 ms on an H100 in bf16); a CPU is there at 1,024
    (2.1 GFLOP: 13 ms on one core of a 2023 Xeon in fp32).
    """
    size = 8192 if torch.device(device).type == "cuda" else 1024
    left, right = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
    product = torch.empty_like(left)
    return 2 * size**3 / _best_seconds(lambda: torch.mm(left, right, out=product))


def copy_bytes_per_second(device: str | torch.device) -> float:
    """Bytes read plus bytes written per second in a copy larger than any cache, measured now."""
    num_bytes = 2**30 if torch.device(device).type == "cuda" else 2**28
    source = torch.ones(num_bytes, dtype=torch.uint8, device=device)  # written: unwritten pages would all be one page
    target = torch.empty_like(source)
    return 2 * num_bytes / _best_seconds(lambda: target.copy_(source))


def _best_seconds(work: Callable) -> float:
    seconds = []
    for _ in range(TRIES):
        began = now()
        work()
        seconds.append(now() - began)
    return min(seconds)


def now() -> float:
    """The time in seconds, after all work of the GPU is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def cap_device_memory(gib: float | None) -> None:
    """Limits this process to so much of the GPU's memory; None, no GPU, or one with less: no limit. Of a card's 24 GB
    CUDA sees 23.7 GiB."""
    if gib and torch.cuda.is_available():
        whole = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(gib * 2**30 / whole, 1.0))


def run_job(script: str, words: list[str], num_processes: int = 1, **environment: str) -> None:
    """Runs a script with the `deepspeed` launcher of this Python; exits with its output if it fails."""
    programs = Path(sys.executable).parent
    launcher = [sys.executable, str(programs / "deepspeed"), "--quiet", "--num_accelerators", str(num_processes)]
    launcher += ["--master_port", str(random.randint(20_000, 30_000))]
    environment |= {"PATH": f"{programs}{os.pathsep}{os.environ['PATH']}"}  # one ninja for all: see distributed.py
    environment |= {"DS_ACCELERATOR": "cuda" if torch.cuda.is_available() else "cpu"}
    done = subprocess.run(
        [*launcher, script, *words], env=os.environ | environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(f"error: {script} {shlex.join(words)} failed:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")


def command() -> str:
    """The command line of this benchmark."""
    return shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])


def write_line(figures: dict, output: str | None) -> None:
    """Prints a benchmark's figures as one line of JSON with hardware, versions, command and date.

    Args:
        output: a JSON lines file to append the line to.
    """
    line = json.dumps(
        {
            "benchmark": Path(sys.argv[0]).stem,
            "command": command(),
            "hardware": hardware(),
            "versions": versions(),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            **figures,
        }
    )
    print(line)
    if output:
        Path(output).parent.mkdir(parents=True, exist_ok=True)
        with open(output, "a", encoding="utf-8") as file:
            file.write(line + "\n")
