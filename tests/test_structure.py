"""The rules of the code that a program can check."""

import ast
import subprocess
from pathlib import Path

import pytest
from conftest import PYTHON, ROOT

LIBRARY = sorted((ROOT / "neoflix").rglob("*.py"))
MODULES = [path for path in LIBRARY if path.name != "__init__.py"]
ENTRY_POINTS = [ROOT / "train.py", ROOT / "generate.py"]

# A package imports only from those listed before it. The front doors (doctor, export, report, upload) come last.
PACKAGES = (
    *("runtime", "data", "model", "checkpoints", "arguments", "planning", "sampling", "judging", "web", "reporting"),
    *("exporting", "training", "tuning"),
)
# Imported before torch is needed: `train.py --plan` answers in less time than torch takes to load.
WITHOUT_TORCH = (
    *("neoflix.arguments.reader", "neoflix.arguments.generate", "neoflix.runtime.early"),
    *("neoflix.planning.plan_run", "neoflix.planning.table", "neoflix.data.sources", "neoflix.data.split"),
    *("neoflix.doctor", "neoflix.runtime.driver", "neoflix.tuning.answer"),
)
MOST_LINES, MOST_CLASS_LINES, MOST_FUNCTION_LINES = 300, 220, 60


def name_of(path: Path) -> str:
    base = ROOT if path in ENTRY_POINTS else ROOT / "neoflix"
    return ".".join(path.relative_to(base).with_suffix("").parts)


def imported(path: Path) -> set[str]:
    """Every module that a file imports, anywhere in it, and every name as `module.name`."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names


def our_imports(path: Path) -> set[str]:
    """The modules of ours that a file imports, as `package.module`."""
    ours = {name.removeprefix("neoflix.") for name in imported(path) if name.startswith("neoflix.")}
    known = {name_of(module) for module in MODULES}
    return {name if name in known else name.rpartition(".")[0] for name in ours}


def rank(module: str) -> int:
    package = module.split(".")[0]
    return PACKAGES.index(package) if package in PACKAGES else len(PACKAGES)


def test_every_module_is_in_a_package():
    folders = {path.parent.name for path in MODULES} - {"neoflix"}
    assert folders == set(PACKAGES)
    assert {path.stem for path in MODULES if path.parent.name == "neoflix"} == {
        "doctor",
        "export",
        "first_look",
        "report",
        "upload",
    }
    for package in PACKAGES:
        assert len([path for path in MODULES if path.parent.name == package]) >= 3


def test_init_files_are_empty():
    assert not [str(path) for path in LIBRARY if path.name == "__init__.py" and path.read_text()]


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_packages_import_downwards(path):
    for module in our_imports(path):
        assert rank(module) <= rank(name_of(path)), f"{name_of(path)} imports {module}"
    assert not {"train", "generate"} & {name.split(".")[0] for name in imported(path)}


@pytest.mark.parametrize("package", PACKAGES)
def test_no_circle_within_a_package(package):
    imports = {name_of(path): our_imports(path) for path in MODULES if path.parent.name == package}
    while imports:
        leaves = {module for module, used in imports.items() if not used & imports.keys()}
        assert leaves, f"these import each other: {sorted(imports)}"
        imports = {module: used for module, used in imports.items() if module not in leaves}


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_files_classes_and_functions_stay_short(path):
    text = path.read_text()
    assert len(text.splitlines()) <= MOST_LINES
    for node in ast.walk(ast.parse(text)):
        most = {ast.ClassDef: MOST_CLASS_LINES, ast.FunctionDef: MOST_FUNCTION_LINES}.get(type(node))
        if most:
            assert node.end_lineno - node.lineno + 1 <= most, f"{path.name}: {node.name} is too long"


@pytest.mark.parametrize("path", ENTRY_POINTS, ids=lambda path: path.name)
def test_entry_points_stay_short(path):
    assert len(path.read_text().splitlines()) <= 80


@pytest.mark.parametrize("path", [*MODULES, *ENTRY_POINTS], ids=lambda path: path.stem)
def test_nothing_runs_at_import(path):
    """Top levels hold imports, constants, functions and classes; calls only where they make a constant."""
    if name_of(path) == "model.register":  # whose import is the call
        return
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Expr):
            assert isinstance(node.value, ast.Constant), f"{path.name}:{node.lineno} does something at import"
        if isinstance(node, ast.If):
            assert "__name__" in ast.unparse(node.test)


# DeepSpeed's internals: what begins with `_`, and these names, which are not part of its documented API.
INTERNALS = {"checkpoint_engine", "clip_fp32_gradients", "ds_numel", "ds_opt_adam", "ds_tensor", "zero_config"}
PUBLIC_DEEPSPEED = {"deepspeed", "deepspeed.zero"}  # deepspeed.zero.Init, deepspeed.zero.GatheredParameters


@pytest.mark.parametrize("path", [*MODULES, *ENTRY_POINTS], ids=lambda path: path.stem)
def test_deepspeeds_internals_are_touched_in_one_file(path):
    if name_of(path) == "training.deepspeed":
        return
    for node in ast.walk(ast.parse(path.read_text())):
        where = f"{path.name}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Import):
            assert {a.name for a in node.names if a.name.startswith("deepspeed")} <= PUBLIC_DEEPSPEED, where
        elif isinstance(node, ast.ImportFrom):
            assert not (node.module or "").startswith("deepspeed") or node.module in PUBLIC_DEEPSPEED, where
        elif isinstance(node, ast.Constant) and node.value in INTERNALS:  # getattr(weight, "ds_numel")
            raise AssertionError(f"{where} names {node.value}")
        elif isinstance(node, ast.Attribute):
            owner = ast.unparse(node.value)
            is_engine = owner.startswith("deepspeed") or owner.split(".")[-1] in ("engine", "model_wrapped")
            is_changed = isinstance(node.ctx, ast.Store) or node.attr.startswith("_")
            assert node.attr not in INTERNALS, f"{where} touches .{node.attr}"
            assert not (is_engine and is_changed), f"{where} touches {ast.unparse(node)}"


def loads(module: str, *unwanted: str) -> bool:
    code = f"import {module}, sys; sys.exit(bool({set(unwanted)} & sys.modules.keys()))"
    return bool(subprocess.run([PYTHON, "-c", code], cwd=ROOT, timeout=120).returncode)


@pytest.mark.process
def test_sampling_never_imports_deepspeed(model_dir):
    """It takes seconds, and a machine that only samples needs no compiler."""
    code = "import generate, sys; generate.main(sys.argv[1:]); sys.exit('deepspeed' in sys.modules)"
    words = ["--model_dir", model_dir, "--num_samples", "1", "--max_new_tokens", "2"]
    subprocess.run([PYTHON, "-c", code, *words], cwd=ROOT, check=True, timeout=120)


@pytest.mark.parametrize("module", WITHOUT_TORCH)
@pytest.mark.process
def test_the_plan_never_imports_torch(module):
    assert not loads(module, "torch", "transformers", "pandas")
