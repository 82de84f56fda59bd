"""notebooks/first_look.ipynb, cell by cell in a kernel of its own. pip is not run: it would change this environment."""

import re
import shutil
import subprocess
import tarfile
from html import unescape
from pathlib import Path

import nbformat
import pytest
from conftest import PYTHON, ROOT, environment_without_launcher, run_program
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

from neoflix.checkpoints.find import find_model
from neoflix.reporting.history import Record
from neoflix.runtime.driver import TORCH_BUILDS, TORCH_INDEX

NOTEBOOK = ROOT / "notebooks" / "first_look.ipynb"
COPIED = ("data", "neoflix", "recipes", "ds_configs", "ds_config.json", "train.py", "generate.py")
T4 = "Tesla T4|GPU-t4|15360|14913|75|-1|0"
ON_CPU = "HAS_GPU, RECIPE, EPOCHS = False, 'recipes/demo.yaml', 0.2\n"


def read_notebook() -> nbformat.NotebookNode:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    return notebook


def code_cells() -> dict[str, nbformat.NotebookNode]:
    return {cell.id: cell for cell in read_notebook().cells if cell.cell_type == "code"}


@pytest.fixture
def execute(tmp_path, monkeypatch):
    """execute(settings, *cells, folder=F) -> what each cell printed or showed, by its id, when the notebook lies in F.
    `settings` is Python that runs after the settings cell."""
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "jupyter"))
    monkeypatch.setenv("JUPYTER_PLATFORM_DIRS", "1")
    environment = environment_without_launcher() | {"CUDA_VISIBLE_DEVICES": ""}

    def execute(settings: str, *names: str, folder: Path) -> dict[str, str]:
        cells = code_cells()
        first = nbformat.v4.new_code_cell(f"{cells['settings'].source}\n{settings}")
        chosen = {"settings": first} | {name: cells[name] for name in names}
        notebook = nbformat.v4.new_notebook(cells=list(chosen.values()))
        client = NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(folder)}})
        client.execute(env=environment)
        return {name: "".join(map(shown, cell.outputs)) for name, cell in chosen.items()}

    return execute


def shown(output) -> str:
    return output.text if output.output_type == "stream" else output.data.get("text/html", "")


@pytest.fixture
def project(tmp_path) -> Path:
    """A copy of the project's folder, by links."""
    folder = tmp_path / "project"
    (folder / "notebooks").mkdir(parents=True)
    for name in COPIED:
        (folder / name).symlink_to(ROOT / name)
    return folder


def test_notebook_trains_reports_and_samples(execute, project, tmp_path):
    names = [name for name, cell in code_cells().items() if "install" not in cell.metadata.get("tags", [])]
    output = execute(f"{ON_CPU}OUTPUT_DIR = 'first look'\n", *names[1:], folder=project / "notebooks")

    run = project / "first look"
    results = Record.read(str(run)).results
    assert results["perplexity"] < results["untouched_perplexity"]
    assert output["texts"].index("Garo Hills Circle:\n") < output["texts"].index("Posted to Meghalaya")
    assert "total" in output["plan"]
    assert "perplexity" in output["train"]
    assert "\x1b" not in output["train"]  # a notebook does not understand all that a terminal does
    report = unescape(output["report"])
    assert "<svg" in report
    assert "It worked" in report
    assert re.search(r"^ +5\. ", output["sample"], re.MULTILINE)
    assert output["sampler"].count("Thrillers | The Last Ferry: ") == 3
    with tarfile.open(project / "first look.tar.gz") as archive:
        archive.extractall(tmp_path / "kept", filter="data")
    kept = tmp_path / "kept" / "first look"
    assert not list(kept.glob("checkpoint-*"))
    assert find_model(str(kept)) == kept
    assert (kept / "report.html").is_file()


def test_notebook_reads_texts_without_other_columns(execute, project, tmp_path):
    dataset = tmp_path / "my texts.csv"
    dataset.write_text("poem\n" + "".join(f"The {number} roses wither in the long rain.\n" for number in range(60)))
    settings = f"{ON_CPU}DATASET, TEMPLATE, FIELDS = {str(dataset)!r}, '', {{}}\n"
    output = execute(settings, "project", "texts", "plan", folder=project)
    assert "The 0 roses wither" in output["texts"]
    assert "total" in output["plan"]


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_notebook_clones_the_project(execute, tmp_path):
    """Outside a copy of it; a second run finds the clone."""
    repository, desk = tmp_path / "repository", tmp_path / "desk"
    repository.mkdir()
    desk.mkdir()
    shutil.copy(ROOT / "train.py", repository)
    git = ["git", "-C", str(repository), "-c", "user.name=a", "-c", "user.email=a@example.com"]
    for words in (["init", "--quiet"], ["add", "train.py"], ["commit", "--quiet", "--message", "train.py"]):
        subprocess.run([*git, *words], check=True)
    for address in (repository.as_uri(), "no-such-address"):
        output = execute(f"REPOSITORY = {address!r}\n", "project", folder=desk)
        assert output["project"].strip() == str(desk / "neoflix")
    assert (desk / "neoflix" / "train.py").is_file()


def test_notebook_stops_at_an_address_that_cannot_be_cloned(execute, tmp_path):
    with pytest.raises(CellExecutionError, match="REPOSITORY = 'no-such-address'"):
        execute("REPOSITORY = 'no-such-address'\n", "project", "machine", folder=tmp_path)


def plan_settings(machine: dict, has_gpu: bool) -> str:
    """The plan of a run with the first cell's settings."""
    settings = {}
    source = code_cells()["settings"].source
    assert 'os.path.exists("/dev/nvidia0")' in source
    exec(source.replace('os.path.exists("/dev/nvidia0")', str(has_gpu)), settings)
    words = ["--config", settings["RECIPE"], "--dataset", settings["DATASET"], "--template", settings["TEMPLATE"]]
    words += ["--num_train_epochs", str(settings["EPOCHS"]), "--output_dir", "no-run"]
    return run_program(PYTHON, "train.py", "--plan", *words, env=machine)


def test_settings_fit_a_t4(machine_of):
    """In fp16, without offload, with the small memory of Colab's hosts, and with the driver that its torch needs."""
    machine = machine_of(T4, driver="550.54.15", torch="2.13.0+cu126", cuda="12.6", host_gib=11, disk_gib=60)
    plan = plan_settings(machine, has_gpu=True)
    assert "no_offload.json" in plan
    assert "half precision" in plan


def test_settings_fit_a_laptop():
    """Without a GPU: a pretrained model all the same."""
    plan = plan_settings({"CUDA_VISIBLE_DEVICES": ""}, has_gpu=False)
    assert "4.9 million trainable (LoRA)" in plan
    assert "cpu.json" in plan


def test_progress_is_printed_in_a_notebook(execute):
    """Not drawn by tqdm's widgets, which take another form of bars."""
    code = "from neoflix.runtime.console import progress\nassert len(list(progress('abc', desc='Counting'))) == 3\n"
    assert "Counting: 100%" in execute(code, folder=ROOT)["settings"]


def test_notebook_installs_a_torch_that_the_driver_knows():
    assert f" --extra-index-url {TORCH_INDEX}/{TORCH_BUILDS[12, 6]}\n" in code_cells()["install"].source


def test_notebook_is_committed_without_outputs():
    for name, cell in code_cells().items():
        assert not cell.outputs, name
        assert cell.execution_count is None, name
