"""Figures of a rehearsal in words: memory by phase beside the plan's, and counts by step and token.

python tests/rehearsal/table.py    # the tables of docs/memory.md, from benchmarks/results/rehearsal.jsonl
"""

import json
import re
import sys
from pathlib import Path

from cases import SETUPS, SIZES

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from neoflix.model.shape import Shape
from neoflix.planning.device_memory import device_memory
from neoflix.planning.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
GIB = 2**30
# DeepSpeed, what reads its norms, accelerate's loader of the epoch in which a run is resumed, and, once per batch, the
# groups of texts on cards without flash attention.
MAY_WAIT = r"deepspeed/|accelerate/utils/(deepspeed|operations)\.py|neoflix/(training/deepspeed|model/attention)\.py"
TOLERANCE, LEAST = 0.05, GIB // 10  # between a phase and its plan: a share, or bytes
# Phases of the device: which phases of the plan they are the largest of.
PLANNED = {
    "start": ("start",),
    "forward": ("forward", "forward, at the head"),
    "backward": (
        "backward of the loss",
        "backward",
        "first reduction",
        "backward of the first layer",
        "backward's end",
    ),
    "step": ("norm", "step"),
    "evaluate": ("evaluate", "evaluate, at the head"),
    "sample": ("sample",),
    "save the best": ("save",),
}


def compare_phases(figures: dict) -> dict[str, tuple[int, int]]:
    """(bytes by the plan, bytes that torch allocated) by phase."""
    shape, settings = Shape(**figures["plan"]["shape"]), Settings(**figures["plan"]["settings"])
    plan = {phase: sum(parts.values()) for phase, parts in device_memory(shape, settings).items()}
    return {
        phase: (max(plan[name] for name in names if name in plan), figures["phases"][phase]["allocated"])
        for phase, names in PLANNED.items()
        if phase in figures["phases"] and any(name in plan for name in names)
    }


def faults_of(figures: dict) -> list[str]:
    """What is not as planned in a case's memory and counts, in words."""
    return [*memory_faults(figures.get("compared", {})), *step_faults(figures), *decoding_faults(figures["phases"])]


def memory_faults(compared: dict[str, tuple[int, int]]) -> list[str]:
    return [
        f"{phase}: {measured / GIB:.2f} GiB, planned {planned / GIB:.2f}"
        for phase, (planned, measured) in compared.items()
        if abs(planned - measured) > max(LEAST, TOLERANCE * measured)
    ]


def step_faults(figures: dict) -> list[str]:
    """A step waits only where DeepSpeed does; with offload at stages 1 and 2 it sends each gradient in fp32, and with
    accumulated batches in bf16 down and up again for each."""
    step, plan = figures["phases"].get("whole step"), figures.get("plan")
    if not step or not plan:
        return []
    faults = [f"a step waits at {place}" for place in step["waits"] if not re.match(MAY_WAIT, place)]
    shape, settings = Shape(**plan["shape"]), Settings(**plan["settings"])
    if settings.stage in (1, 2) and settings.offload("offload_optimizer") == "cpu" and settings.num_processes == 1:
        trained, batches, b = settings.num_trainable(shape), settings.accumulation, settings.weight_bytes
        expected = {
            "bytes_up": batches * b * trained,
            "bytes_down": (4 + (batches * b if batches > 1 else 0)) * trained,
        }
        faults += [
            f"a step has {step[name]:,} {name}, not {count:,}"
            for name, count in expected.items()
            if abs(step[name] - count) > 0.01 * count
        ]
    return faults


def decoding_faults(phases: dict) -> list[str]:
    """A token is one graph, and nothing waits for it."""
    counts = phases.get("decode a token")
    is_one_graph = not counts or (counts["graph_launches"], counts["launches"], counts["syncs"]) == (1, 0, 0)
    return [] if is_one_graph else [f"a token takes {describe_counts(counts)}"]


def print_case(name: str, figures: dict) -> None:
    print(f"\n== {name} ({figures['card']}, {figures['seconds']} s)")
    for phase, (planned, measured) in figures.get("compared", {}).items():
        both = f"planned {planned / GIB:7.2f} GiB, allocated {measured / GIB:7.2f}"
        print(f"   {phase:<14} {both}, {planned / measured - 1:+.1%}")
    for phase in ("whole step", "decode a token"):
        if counts := figures["phases"].get(phase):
            print(f"   {phase}: {describe_counts(counts)}")
    for fault in figures["faults"][:20]:
        print(f"   FAULT {fault}")
    print(end="", flush=True)


def describe_counts(counts: dict) -> str:
    waits = "".join(f"; {count} at {place}" for place, count in counts["waits"].items())
    ways = [
        f"{counts[f'bytes_{way}'] / GIB:.2f} GiB {way} in {counts[f'copies_{way}']} copies "
        f"({counts[f'pageable_{way}']} not pinned)"
        for way in ("up", "down")
    ]
    launches = f"{counts['launches']} launches, {counts['graph_launches']} graphs"
    return f"{launches}, {', '.join(ways)}, {counts['syncs']} waits{waits}"


def main() -> None:
    """Prints both tables in Markdown."""
    lines = [json.loads(line) for line in (ROOT / "benchmarks/results/rehearsal.jsonl").read_text().splitlines()]
    by_case = {line["case"]: line for line in lines}
    print(f"| planned / allocated, GiB | {' | '.join(SIZES)} | largest difference of a phase, GiB |")
    print("|---" * (len(SIZES) + 2) + "|")
    for setup in SETUPS:
        compared = [compare_phases(by_case[f"{size} {setup}"]) for size in SIZES]
        fullest = [max(phases.values(), key=lambda both: both[1]) for phases in compared]
        cells = [f"{planned / GIB:.2f} / {measured / GIB:.2f}" for planned, measured in fullest]
        worst = max((p - m for phases in compared for p, m in phases.values()), key=abs) / GIB
        print(
            f"| `{setup.replace(', ', '`, ', 1)}{'' if ', ' in setup else '`'} | {' | '.join(cells)} | {worst:+.2f} |"
        )
    print(f"\n| a step of {SIZES[-1]} | kernels | GiB to the card | GiB to the host | waits |")
    print("|---" * 5 + "|")
    for setup in SETUPS:
        counts = by_case[f"{SIZES[-1]} {setup}"]["phases"]["whole step"]
        cells = f"{counts['launches']:,} | {counts['bytes_up'] / GIB:.2f} | {counts['bytes_down'] / GIB:.2f}"
        print(f"| `{setup.replace(', ', '`, ', 1)}{'' if ', ' in setup else '`'} | {cells} | {counts['syncs']} |")


if __name__ == "__main__":
    main()
