"""Which checkpoint a run goes on from, which are kept, which one is sampled."""

import shutil

import pytest
from conftest import save_checkpoint

from neoflix.checkpoints.find import find_model, find_resume_point, list_checkpoints
from neoflix.checkpoints.manifest import MANIFEST, write_manifest
from neoflix.checkpoints.names import RESULTS_FILE, RUN_FILE


@pytest.fixture
def save(tmp_path):
    """save(step) makes a small complete checkpoint of the run in tmp_path."""

    def save(step: int, name: str = "checkpoint-{}", best_step: int | None = None):
        folder = tmp_path / name.format(step)
        folder.mkdir()
        (folder / "model.safetensors").write_text(f"weights of step {step}")
        write_manifest(folder, {"step": step, "best_step": best_step}, {})
        return folder

    return save


def names(run) -> list[str]:
    return [path.name for path in list_checkpoints(run)]


def test_newest_is_by_number_not_by_name_or_time(save, tmp_path):
    for step in (10, 9, 100):
        save(step)
    save(2)
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-9", "checkpoint-10", "checkpoint-100"]
    assert find_resume_point(str(tmp_path), None) == str(tmp_path / "checkpoint-100")


def test_damaged_ones_are_passed_over_by_name_and_left_alone(save, tmp_path):
    save(1)
    (save(2) / MANIFEST).unlink()
    (save(3) / "model.safetensors").write_text("WEIGHTS of step 3")  # the same size
    said = []
    assert find_resume_point(str(tmp_path), None, said.append) == str(tmp_path / "checkpoint-1")
    assert ["checkpoint-3" in said[0], "checksum" in said[0]] == [True, True]
    assert ["checkpoint-2" in said[1], "interrupted" in said[1]] == [True, True]
    assert (tmp_path / "checkpoint-2").is_dir()
    assert (tmp_path / "checkpoint-3").is_dir()


def test_no_run_no_resume(tmp_path):
    assert find_resume_point(str(tmp_path / "nowhere"), None) is None


def test_a_damaged_one_asked_for_by_name_is_refused(save, tmp_path):
    save(1)
    (save(2) / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"checkpoint-2.*model.safetensors is missing"):
        find_resume_point(str(tmp_path), str(tmp_path / "checkpoint-2"))


def test_an_older_model_at_the_top_is_not_what_an_unfinished_run_is_sampled_from(save, tmp_path):
    for name in ("config.json", "model.safetensors", RUN_FILE):
        (tmp_path / name).write_text("{}")
    checkpoint = save(2)
    assert find_model(str(tmp_path)) == checkpoint
    (tmp_path / RESULTS_FILE).write_text("{}")
    assert find_model(str(tmp_path)) == tmp_path


def test_an_unfinished_run_is_sampled_from_its_best_checkpoint(save, tmp_path):
    (tmp_path / RUN_FILE).write_text("{}")
    for name in ("config.json", "model.safetensors"):  # of an earlier end, or half of a new one
        (tmp_path / name).write_text("{}")
    save(1, best_step=1)
    save(2, best_step=1)
    assert find_model(str(tmp_path)).name == "checkpoint-1"
    (tmp_path / RESULTS_FILE).write_text("{}")
    assert find_model(str(tmp_path)) == tmp_path


def test_where_the_best_is_gone_the_newest_is_sampled(save, tmp_path):
    (tmp_path / RUN_FILE).write_text("{}")
    save(2, best_step=1)
    save(3, best_step=1)
    assert find_model(str(tmp_path)).name == "checkpoint-3"


def test_a_copy_under_another_number_is_not_resumed_from(folder):
    shutil.copytree(save_checkpoint(folder / "checkpoint-4", 4), folder / "checkpoint-9")
    said = []
    assert find_resume_point(str(folder), None, said.append) == str(folder / "checkpoint-4")
    assert "checkpoint-9" in said[0]
    assert "copy" in said[0]
