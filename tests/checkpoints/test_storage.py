"""What is in a run's folder and not the run's is neither replaced nor deleted; what is the run's is replaced whole."""

import os
import shutil
from pathlib import Path

import pytest
from conftest import list_names, save_checkpoint

from neoflix.checkpoints.find import list_checkpoints
from neoflix.checkpoints.manifest import read_manifest
from neoflix.checkpoints.names import RESULTS_FILE, UNIVERSAL
from neoflix.checkpoints.ownership import read_list, temporary
from neoflix.checkpoints.run_folder import claim
from neoflix.checkpoints.storage import check_space, commit, delete, export_best, prune, recover_interrupted
from neoflix.export import export_gpt2, export_merged

OTHER = "EleutherAI/gpt-neo-125m"  # a base model that is no folder
OLDER_RUN = {"model": "demo", "architecture": {}, "tokenizer": "1", "data": "2"}
NO_COMPILER = ["--deepspeed", "ds_configs/cpu.json"]
USERS_FILES = ("tokenizer_train.py", "vocab.csv", "prompt.jinja", "style.safetensors", "vocab.json", "notes.part")


# ---- whole runs ---------------------------------------------------------------------------------------------


def test_files_of_the_users_outlive_a_run_that_is_promoted_twice(run, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    for name in USERS_FILES:
        (folder / name).write_text(f"the user's {name}")
    run("run", "--max_steps", "2", *NO_COMPILER)
    (folder / RESULTS_FILE).unlink()  # as if it had died before its end: the same command promotes again
    run("run", "--max_steps", "2", *NO_COMPILER)
    for name in USERS_FILES:
        assert (folder / name).read_text() == f"the user's {name}"
    assert (folder / "model.safetensors").is_file()
    assert read_manifest(folder / "checkpoint-2")["run"] == read_list(folder)["id"]
    assert [path.name for path in folder.glob("*.part")] == ["notes.part"]


def test_without_checkpoints_too(run, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    for name in USERS_FILES:
        (folder / name).write_text(f"the user's {name}")
    run("run", "--max_steps", "1", "--save_strategy", "no", "--eval_strategy", "no", *NO_COMPILER)
    for name in USERS_FILES:
        assert (folder / name).read_text() == f"the user's {name}"
    assert {"model.safetensors", "config.json", "tokenizer.json", "generation_config.json"} <= set(list_names(folder))
    assert not [name for name in list_names(folder) if name.startswith("model.") and name.endswith(".part")]


@pytest.fixture(params=[0o022, 0o002, 0o077], ids=oct)
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def assert_shared(folder: Path, umask: int) -> None:
    for path in [folder, *folder.rglob("*")]:
        mode = path.stat().st_mode & 0o777
        assert mode == (0o777 if path.is_dir() else 0o666) & ~umask, f"{path}: {mode:o}"


@pytest.mark.parametrize("saved", [["--save_strategy", "no"], ["--save_strategy", "steps", "--save_steps", "1"]])
def test_files_have_the_users_umask(run, tmp_path, umask, saved):
    words = [*("--max_steps", "1", "--eval_strategy", "no"), "--report_to", "tensorboard", *saved, *NO_COMPILER]
    folder = run("run", *words)
    export_merged(str(folder), str(tmp_path / "merged"))
    export_gpt2(str(folder), str(tmp_path / "gpt2"))
    for name in ("run", "cache", "merged", "gpt2"):
        assert_shared(tmp_path / name, umask)


# ---- checkpoints ---------------------------------------------------------------------------------------------


def test_what_an_interrupted_save_left_is_cleared_away(folder):
    save_checkpoint(folder / "checkpoint-2", 2)
    for name, suffix in (("checkpoint-4", ".part"), ("checkpoint-1", ".old"), ("checkpoint-1", UNIVERSAL)):
        temporary(folder, name, suffix).mkdir()
    temporary(folder, "config.json", ".part").write_text("{")
    (folder / f"run.json.{32 * 'a'}.part").write_text("{")
    save_checkpoint(temporary(folder, "checkpoint-6", ".part"), 6)  # all but its renaming was done
    recover_interrupted(folder)
    assert list_names(folder) == ["checkpoint-2", "checkpoint-6"]
    assert [path.name for path in list_checkpoints(folder)] == ["checkpoint-2", "checkpoint-6"]


def test_folders_of_the_users_with_such_names_are_left_alone(folder, capsys):
    for name in ("checkpoint-1.old", "checkpoint-2.part", f"checkpoint-3{UNIVERSAL}", "checkpoint-best.old"):
        save_checkpoint(folder / name, 1)
    before = list_names(folder)
    recover_interrupted(folder)
    assert list_names(folder) == before
    assert "checkpoint-1.old" in capsys.readouterr().out


def test_saved_again_a_checkpoint_takes_its_own_place(folder):
    save_checkpoint(folder / "checkpoint-2", 2, more="of before")
    commit(save_checkpoint(temporary(folder, "checkpoint-2", ".part"), 2))
    assert list_names(folder) == ["checkpoint-2"]
    assert not (folder / "checkpoint-2" / "more").exists()


@pytest.mark.parametrize("kind", ["plain Trainer's", "a copy", "another run's"])
def test_a_checkpoint_that_is_not_the_runs_is_kept(folder, tmp_path, kind):
    if kind == "plain Trainer's":
        (folder / "checkpoint-2").mkdir()
        (folder / "checkpoint-2" / "model.safetensors").write_text("theirs")
    elif kind == "a copy":
        shutil.copytree(save_checkpoint(folder / "checkpoint-1", 1), folder / "checkpoint-2")
    else:
        claim(str(tmp_path / "other"))
        shutil.copytree(save_checkpoint(tmp_path / "other" / "checkpoint-2", 2), folder / "checkpoint-2")
    theirs = (folder / "checkpoint-2" / "model.safetensors").read_text()
    commit(save_checkpoint(temporary(folder, "checkpoint-2", ".part"), 2))
    assert (folder / "checkpoint-2.kept" / "model.safetensors").read_text() == theirs
    assert (folder / "checkpoint-2" / "model.safetensors").read_text() == "weights of step 2"


def test_rotation_deletes_the_runs_checkpoints_alone(folder, tmp_path):
    claim(str(tmp_path / "other"))
    shutil.copytree(save_checkpoint(tmp_path / "other" / "checkpoint-1", 1), folder / "checkpoint-1")
    (folder / "checkpoint-2").mkdir()
    shutil.copytree(save_checkpoint(folder / "checkpoint-4", 4), folder / "checkpoint-3")
    for step in (5, 6):
        save_checkpoint(folder / f"checkpoint-{step}", step)
    prune(folder, 1, best_step=None)
    assert list_names(folder) == ["checkpoint-1", "checkpoint-2", "checkpoint-3", "checkpoint-6"]


def test_rotation_keeps_the_newest_and_the_best(folder):
    for step in (1, 2, 3, 4, 5):
        save_checkpoint(folder / f"checkpoint-{step}", step)
    prune(folder, 3, best_step=2)
    assert list_names(folder) == ["checkpoint-2", "checkpoint-4", "checkpoint-5"]
    prune(folder, 1, best_step=2)
    assert list_names(folder) == ["checkpoint-2", "checkpoint-5"]
    prune(folder, None, best_step=None)
    assert list_names(folder) == ["checkpoint-2", "checkpoint-5"]


def test_rotation_counts_no_damaged_one(folder):
    """Two damaged newer ones must not push the only good ones out."""
    for step in (1, 2, 3, 4):
        save_checkpoint(folder / f"checkpoint-{step}", step)
    for step in (3, 4):
        (folder / f"checkpoint-{step}" / "model.safetensors").unlink()
    prune(folder, 2, best_step=None)
    assert list_names(folder) == ["checkpoint-1", "checkpoint-2", "checkpoint-3", "checkpoint-4"]


def test_an_interrupted_deletion_leaves_nothing_under_the_name(folder, monkeypatch):
    def die(path):
        raise KeyboardInterrupt

    monkeypatch.setattr("neoflix.checkpoints.storage.shutil.rmtree", die)
    with pytest.raises(KeyboardInterrupt):
        delete(save_checkpoint(folder / "checkpoint-1", 1))
    monkeypatch.undo()
    assert list_checkpoints(folder) == []
    recover_interrupted(folder)
    assert list_names(folder) == []


# ---- the model at the top ------------------------------------------------------------------------------------


def test_a_promoted_model_takes_the_place_of_the_one_before(folder):
    shards = {"model-1.safetensors": "a", "spiece.model": "b"}
    export_best(save_checkpoint(folder / "checkpoint-1", 1, **shards), folder)
    export_best(save_checkpoint(folder / "checkpoint-2", 2), folder)
    assert list_names(folder) == ["checkpoint-1", "checkpoint-2", "model.safetensors"]
    assert (folder / "model.safetensors").read_text() == "weights of step 2"
    assert (folder / "checkpoint-1" / "model.safetensors").read_text() == "weights of step 1"
    export_best(folder / "checkpoint-2", folder)  # the same once more
    assert list_names(folder) == ["checkpoint-1", "checkpoint-2", "model.safetensors"]


def test_a_file_that_was_put_there_or_changed_while_it_trained_is_kept(folder):
    export_best(save_checkpoint(folder / "checkpoint-1", 1, **{"generation_config.json": "{}"}), folder)
    (folder / "generation_config.json").unlink()
    (folder / "generation_config.json").write_text('{"top_k": 5}')
    (folder / "config.json").write_text("the user's")
    export_best(
        save_checkpoint(folder / "checkpoint-2", 2, **{"generation_config.json": "{ }", "config.json": "{}"}), folder
    )
    assert (folder / "generation_config.json.kept").read_text() == '{"top_k": 5}'
    assert (folder / "config.json.kept").read_text() == "the user's"
    assert (folder / "config.json").read_text() == "{}"
    (folder / "generation_config.json").unlink()
    (folder / "generation_config.json").write_text("changed")
    export_best(save_checkpoint(folder / "checkpoint-3", 3), folder)  # has none: theirs stays
    assert (folder / "generation_config.json").read_text() == "changed"
    assert not (folder / "config.json").exists()


@pytest.mark.parametrize("number", range(1, 9))
def test_a_promotion_that_was_interrupted_anywhere_is_finished_by_the_next(folder, monkeypatch, number):
    """A kill at any step of it: nothing is set aside as if it were the user's, and no file is neither old nor new."""
    old = {"model.safetensors": "old", "config.json": "old", "merges.txt": "old"}
    new = {"model.safetensors": "new", "config.json": "new", "vocab.json": "new"}
    export_best(save_checkpoint(folder / "checkpoint-1", 1, **old), folder)
    save_checkpoint(folder / "checkpoint-2", 2, **new)
    calls = []

    def dying(function):
        def call(*args, **kwargs):
            calls.append(function)
            if len(calls) == number:
                raise KeyboardInterrupt
            return function(*args, **kwargs)

        return call

    for owner, name in ((os, "link"), (Path, "replace"), (Path, "unlink")):
        monkeypatch.setattr(owner, name, dying(getattr(owner, name)))
    with pytest.raises(KeyboardInterrupt):
        export_best(folder / "checkpoint-2", folder)
    monkeypatch.undo()
    for name in ("model.safetensors", "config.json"):
        assert (folder / name).read_text() in ("old", "new")
    claim(str(folder))
    export_best(folder / "checkpoint-2", folder)
    assert list_names(folder) == ["checkpoint-1", "checkpoint-2", "config.json", "model.safetensors", "vocab.json"]
    assert {(folder / name).read_text() for name in new} == {"new"}


def test_too_little_space_is_a_sentence(tmp_path):
    check_space(tmp_path / "not" / "there" / "yet", 1, "it takes")
    with pytest.raises(ValueError, match=r"it takes 1048576.0 GiB of disk, .* GiB are free; make room"):
        check_space(tmp_path, 2**50, "it takes")
