"""The rules of the house that a program can check."""

import ast
import subprocess

import pytest
from conftest import PYTHON, ROOT

LIBRARY = sorted((ROOT / "neoflix").glob("*.py"))

# Imports run downwards: a module may import ours from the floors below its own, never from its own floor.
FLOORS = [
    {"console", "errors", "gpus", "hub_copies", "paths", "redaction", "shapes", "throughput", "words"},
    {"attention", "cache", "environment", "loss", "machine", "manifest", "preemption", "quality", "tables", "template"}
    | {"watchdog"},
    {"checkpoint", "distributed", "ds_config", "locks", "recipes", "slot_cache", "tokenizer"},
    {"divergence", "resumed_optimizer", "runs"},
    {
        "consolidation",
        "decoding",
        "flags",
        "lora",
        "optimizer",
        "reading",
        "record",
        "run_folder",
        "samples",
        "universal",
    },
    {"architectures", "output_dir"},
    {"plan"},
    {"config"},
    {"callbacks", "data", "model", "report"},
    {"export", "generation", "judging"},
    {"live_samples"},
    {"trainer"},
    {"evaluation"},
]
FLOOR = {module: number for number, floor in enumerate(FLOORS) for module in floor}


def imported(path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names


def our_modules(path) -> set[str]:
    return {name.split(".")[1] for name in imported(path) if name.startswith("neoflix.")}


def test_every_module_has_a_floor():
    assert {path.stem for path in LIBRARY} - {"__init__"} == set(FLOOR)


@pytest.mark.parametrize("path", LIBRARY, ids=lambda path: path.stem)
def test_imports_run_downwards(path):
    for module in our_modules(path):
        assert FLOOR[module] < FLOOR[path.stem], f"{path.stem} imports {module}"
    assert not {"train", "generate"} & {name.split(".")[0] for name in imported(path)}


@pytest.mark.parametrize("name", ["train.py", "generate.py"])
def test_entry_points_stay_short(name):
    assert len((ROOT / name).read_text().splitlines()) <= 80


@pytest.mark.parametrize("path", [*LIBRARY, ROOT / "train.py", ROOT / "generate.py"], ids=lambda path: path.stem)
def test_nothing_runs_at_import(path):
    """Top levels hold imports, constants, functions and classes; calls only where they make a constant."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Expr):
            assert isinstance(node.value, ast.Constant), f"{path.name}:{node.lineno} does something at import"
        if isinstance(node, ast.If):
            assert "__name__" in ast.unparse(node.test)


def test_sampling_never_imports_deepspeed():
    """It takes seconds, and a machine that only samples needs no compiler."""
    code = "import generate, sys; sys.exit('deepspeed' in sys.modules)"
    subprocess.run([PYTHON, "-c", code], cwd=ROOT, check=True, timeout=120)


def test_the_plan_never_imports_torch():
    """`train.py --plan` answers in less time than torch takes to load."""
    code = "import neoflix.plan, sys; sys.exit(bool({'torch', 'transformers', 'pandas'} & sys.modules.keys()))"
    subprocess.run([PYTHON, "-c", code], cwd=ROOT, check=True, timeout=120)
