"""CONTRIBUTING.md knows every module and its floor, and what it names is there."""

import re

from conftest import ROOT
from test_structure import FLOORS

PAGE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def test_the_tour_has_every_module_on_its_floor():
    paragraphs = re.findall(r"^\d+\. (.+\n(?:   .+\n)*)", PAGE, re.MULTILINE)
    told = [
        {name for name in re.findall(r"`(\w+)`", text) if (ROOT / "neoflix" / f"{name}.py").is_file()}
        for text in paragraphs
    ]
    assert told == FLOORS


def test_what_the_table_names_is_there():
    """Files, and functions and constants that are named beside one file."""
    rows = PAGE.split("## Where do I change")[1].splitlines()
    num_names = 0
    for row in rows:
        files = re.findall(r"`((?:neoflix|tests|docs|benchmarks|ds_configs|recipes)/[\w./-]+)`", row)
        files = [name for name in files if "NAME" not in name]
        for name in files:
            assert (ROOT / name).exists(), name
        sources = "".join((ROOT / name).read_text(encoding="utf-8") for name in files if name.endswith(".py"))
        for module, name in re.findall(r"`(checkpoint|plan)\.(\w+)`", row):
            assert re.search(rf"^(def )?{name}\b", (ROOT / "neoflix" / f"{module}.py").read_text(), re.MULTILINE), name
        for name in re.findall(r"`([A-Za-z_]+)`", row):
            if name not in {"auto", "GenerationConfig", "TokenTrainer", "ExportableState"}:
                assert re.search(rf"^(?:\s*def |\s*class |){name}\b", sources, re.MULTILINE), name
                num_names += 1
    assert num_names > 20
