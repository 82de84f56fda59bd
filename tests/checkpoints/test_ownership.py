"""Which files are a run's own: by its list and, for runs of older versions, by what is certain."""

import os
import shutil
from pathlib import Path

import pytest
from conftest import save_checkpoint

from neoflix.checkpoints.names import LIST_FILE, RESULTS_FILE, RUN_FILE
from neoflix.checkpoints.output_dir import check_output_dir
from neoflix.checkpoints.ownership import is_own, read_list, temporary
from neoflix.checkpoints.run_folder import claim
from neoflix.checkpoints.storage import export_best
from neoflix.runtime.files import write_json

OTHER = "EleutherAI/gpt-neo-125m"  # a base model that is not a folder
OLDER_RUN = {"model": "demo", "architecture": {}, "tokenizer": "1", "data": "2"}


@pytest.mark.parametrize("content", ["", "[]", '{"id": "3f9a1c2b"}', '{"id": "../..", "files": {}}'])
def test_what_is_not_a_list_of_files_is_none(tmp_path, content):
    assert read_list(tmp_path) is None
    (tmp_path / LIST_FILE).write_text(content)
    assert read_list(tmp_path) is None


def test_temporary_names_carry_the_runs_id(folder):
    owner = read_list(folder)["id"]
    assert temporary(folder, "checkpoint-2", ".part") == folder / f"checkpoint-2.{owner}.part"


def test_a_run_owns_what_it_saved(folder, tmp_path):
    mine = save_checkpoint(folder / "checkpoint-2", 2)
    assert is_own(mine, folder)
    assert not is_own(shutil.copytree(mine, folder / "checkpoint-3"), folder)
    claim(str(tmp_path / "other"))
    assert not is_own(mine, tmp_path / "other")


def older_run(folder: Path) -> None:
    folder.mkdir()
    write_json(folder / RUN_FILE, OLDER_RUN)
    save_checkpoint(folder / "checkpoint-2", 2, **{"config.json": "{}"})
    for name in ("model.safetensors", "config.json"):
        os.link(folder / "checkpoint-2" / name, folder / name)


def test_a_run_without_a_list_is_gone_on_with(tmp_path):
    folder = tmp_path / "run"
    older_run(folder)
    (folder / "starts.json").write_text("[]")
    (folder / "notes.safetensors").write_text("the user's")
    check_output_dir(str(folder), OTHER)
    claim(str(folder))
    export_best(save_checkpoint(folder / "checkpoint-4", 4), folder)
    assert (folder / "model.safetensors").read_text() == "weights of step 4"
    assert (folder / "notes.safetensors").read_text() == "the user's"
    assert not (folder / "config.json").exists()
    assert not list(folder.glob("*.kept"))


def test_a_finished_run_without_list_and_checkpoints_is_known_by_its_results(tmp_path):
    folder = tmp_path / "run"
    older_run(folder)
    shutil.rmtree(folder / "checkpoint-2")
    with pytest.raises(ValueError, match=r"model\.safetensors \(and 1 more\)"):
        check_output_dir(str(folder), OTHER)
    (folder / RESULTS_FILE).write_text("{}")
    check_output_dir(str(folder), OTHER)


def test_a_model_that_was_put_into_an_older_runs_folder_is_refused(tmp_path):
    folder = tmp_path / "run"
    older_run(folder)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").write_text("the user's")
    with pytest.raises(ValueError, match=r"model\.safetensors.* not written"):
        check_output_dir(str(folder), OTHER)
