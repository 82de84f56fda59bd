"""What is in a run's folder and not the run's is neither replaced nor deleted; what is the run's is replaced whole."""

import json
import os
import shutil
from pathlib import Path

import pytest

import train
from neoflix.checkpoints.find import find_resume_point, list_checkpoints
from neoflix.checkpoints.manifest import read_manifest, write_manifest
from neoflix.checkpoints.names import LIST_FILE, RESULTS_FILE, RUN_FILE, UNIVERSAL
from neoflix.checkpoints.output_dir import check_output_dir
from neoflix.checkpoints.ownership import claim
from neoflix.checkpoints.store import commit, delete, export_best, prune, read_list, recover_interrupted, temporary
from neoflix.export import export_gpt2, export_merged
from neoflix.runtime.files import write_json
from neoflix.runtime.processes import exit_code_of

OTHER = "EleutherAI/gpt-neo-125m"  # a base model that is no folder
OLDER_RUN = {"model": "demo", "architecture": {}, "tokenizer": "1", "data": "2"}
NO_COMPILER = ["--deepspeed", "ds_configs/cpu.json"]
USERS_FILES = ("tokenizer_train.py", "vocab.csv", "prompt.jinja", "style.safetensors", "vocab.json", "notes.part")


@pytest.fixture
def folder(tmp_path) -> Path:
    """A run's folder, claimed."""
    claim(str(tmp_path / "run"))
    return tmp_path / "run"


def save(path: Path, step: int, **files: str) -> Path:
    """A small complete checkpoint of the run that `path` lies in."""
    path.mkdir()
    for name, content in {"model.safetensors": f"weights of step {step}", **files}.items():
        (path / name).write_text(content)
    facts = {"step": step, "best_step": None}
    if owned := read_list(path.parent):
        facts["run"] = owned["id"]
    write_manifest(path, facts, {})
    return path


def checkpoint(folder: Path, step: int, **files: str) -> Path:
    return save(folder / f"checkpoint-{step}", step, **files)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != LIST_FILE)


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
    assert {"model.safetensors", "config.json", "tokenizer.json", "generation_config.json"} <= set(names(folder))
    assert not [name for name in names(folder) if name.startswith("model.") and name.endswith(".part")]


@pytest.mark.parametrize("lora", [[], ["--lora", "true", "--lora_rank", "4"]], ids=["full", "lora"])
def test_the_base_models_folder_is_no_output_dir(model_dir, train_words, tmp_path, capfd, lora):
    base = tmp_path / "models" / "base"
    shutil.copytree(model_dir, base)
    (tmp_path / "link").symlink_to(base)
    before = {path.name: path.read_bytes() for path in base.iterdir()}
    for output_dir, words in (
        (base, "is the base model's folder"),
        (tmp_path / "link", "is the base model's folder"),
        (base / "run", "lies inside the base model's folder"),
        (tmp_path / "models", "contains the base model's folder"),
    ):
        flags = [*train_words, "--model_name_or_path", str(base), "--output_dir", str(output_dir), *lora]
        assert exit_code_of(lambda flags=flags: train.main(flags)) == 2
        assert words in capfd.readouterr().err
        assert {path.name: path.read_bytes() for path in base.iterdir()} == before
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["base"]


def test_somebody_elses_model_is_no_output_dir(model_dir, train_words, tmp_path, capfd):
    shutil.copytree(model_dir, tmp_path / "run")
    before = names(tmp_path / "run")
    assert exit_code_of(lambda: train.main([*train_words, "--output_dir", str(tmp_path / "run")])) == 2
    assert "not written by this run" in capfd.readouterr().err
    assert names(tmp_path / "run") == before


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


# ---- refused before anything is written -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["model.safetensors", "config.json", "pytorch_model.bin", "model-00001-of-00002.safetensors", "run.json"]
)
def test_a_file_that_a_run_would_replace_is_refused(tmp_path, name):
    (tmp_path / name).write_text("{}")
    with pytest.raises(ValueError, match=f"{name} there was not written by this run"):
        check_output_dir(str(tmp_path), OTHER)
    assert names(tmp_path) == [name]


def test_plain_trainers_checkpoint_is_refused(tmp_path):
    (tmp_path / "checkpoint-500").mkdir()
    (tmp_path / "checkpoint-500" / "trainer_state.json").write_text("{}")
    with pytest.raises(ValueError, match="checkpoint-500 there was not written by this run"):
        check_output_dir(str(tmp_path), OTHER)


def test_a_folder_of_other_files_is_welcome(tmp_path):
    for name in USERS_FILES:
        (tmp_path / name).write_text("")
    check_output_dir(str(tmp_path), OTHER)
    check_output_dir(str(tmp_path / "new"), OTHER)


def test_the_base_of_the_adapters_that_are_gone_on_with_is_safe_too(tmp_path):
    for name in ("base", "adapters"):
        (tmp_path / name).mkdir()
    adapters = {"base_model_name_or_path": str(tmp_path / "base")}
    (tmp_path / "adapters" / "adapter_config.json").write_text(json.dumps(adapters))
    with pytest.raises(ValueError, match="is the base model's folder"):
        check_output_dir(str(tmp_path / "base"), str(tmp_path / "adapters"))


# ---- checkpoints ---------------------------------------------------------------------------------------------


def test_what_an_interrupted_save_left_is_cleared_away(folder):
    checkpoint(folder, 2)
    for name, suffix in (("checkpoint-4", ".part"), ("checkpoint-1", ".old"), ("checkpoint-1", UNIVERSAL)):
        temporary(folder, name, suffix).mkdir()
    temporary(folder, "config.json", ".part").write_text("{")
    (folder / f"run.json.{32 * 'a'}.part").write_text("{")
    save(temporary(folder, "checkpoint-6", ".part"), 6)  # all but its renaming was done
    recover_interrupted(folder)
    assert names(folder) == ["checkpoint-2", "checkpoint-6"]
    assert [path.name for path in list_checkpoints(folder)] == ["checkpoint-2", "checkpoint-6"]


def test_folders_of_the_users_with_such_names_are_left_alone(folder, capsys):
    for name in ("checkpoint-1.old", "checkpoint-2.part", f"checkpoint-3{UNIVERSAL}", "checkpoint-best.old"):
        save(folder / name, 1)
    before = names(folder)
    recover_interrupted(folder)
    assert names(folder) == before
    assert "checkpoint-1.old: not known to be this run's, left alone" in capsys.readouterr().out


def test_saved_again_a_checkpoint_takes_its_own_place(folder):
    checkpoint(folder, 2, more="of before")
    commit(save(temporary(folder, "checkpoint-2", ".part"), 2))
    assert names(folder) == ["checkpoint-2"]
    assert not (folder / "checkpoint-2" / "more").exists()


@pytest.mark.parametrize("kind", ["plain Trainer's", "a copy", "another run's"])
def test_a_checkpoint_that_is_not_the_runs_is_kept(folder, tmp_path, kind):
    if kind == "plain Trainer's":
        (folder / "checkpoint-2").mkdir()
        (folder / "checkpoint-2" / "model.safetensors").write_text("theirs")
    elif kind == "a copy":
        shutil.copytree(checkpoint(folder, 1), folder / "checkpoint-2")
    else:
        claim(str(tmp_path / "other"))
        shutil.copytree(checkpoint(tmp_path / "other", 2), folder / "checkpoint-2")
    theirs = (folder / "checkpoint-2" / "model.safetensors").read_text()
    commit(save(temporary(folder, "checkpoint-2", ".part"), 2))
    assert (folder / "checkpoint-2.kept" / "model.safetensors").read_text() == theirs
    assert (folder / "checkpoint-2" / "model.safetensors").read_text() == "weights of step 2"


def test_rotation_deletes_the_runs_checkpoints_alone(folder, tmp_path):
    claim(str(tmp_path / "other"))
    shutil.copytree(checkpoint(tmp_path / "other", 1), folder / "checkpoint-1")
    (folder / "checkpoint-2").mkdir()
    shutil.copytree(checkpoint(folder, 4), folder / "checkpoint-3")
    for step in (5, 6):
        checkpoint(folder, step)
    prune(folder, 1, best_step=None)
    assert names(folder) == ["checkpoint-1", "checkpoint-2", "checkpoint-3", "checkpoint-6"]


def test_a_copy_under_another_number_is_not_resumed_from(folder):
    shutil.copytree(checkpoint(folder, 4), folder / "checkpoint-9")
    said = []
    assert find_resume_point(str(folder), None, said.append) == str(folder / "checkpoint-4")
    assert "checkpoint-9" in said[0]
    assert "copy" in said[0]


def test_rotation_keeps_the_newest_and_the_best(folder):
    for step in (1, 2, 3, 4, 5):
        checkpoint(folder, step)
    prune(folder, 3, best_step=2)
    assert names(folder) == ["checkpoint-2", "checkpoint-4", "checkpoint-5"]
    prune(folder, 1, best_step=2)
    assert names(folder) == ["checkpoint-2", "checkpoint-5"]
    prune(folder, None, best_step=None)
    assert names(folder) == ["checkpoint-2", "checkpoint-5"]


def test_rotation_counts_no_damaged_one(folder):
    """Two damaged newer ones must not push the only good ones out."""
    for step in (1, 2, 3, 4):
        checkpoint(folder, step)
    for step in (3, 4):
        (folder / f"checkpoint-{step}" / "model.safetensors").unlink()
    prune(folder, 2, best_step=None)
    assert names(folder) == ["checkpoint-1", "checkpoint-2", "checkpoint-3", "checkpoint-4"]


def test_an_interrupted_deletion_leaves_nothing_under_the_name(folder, monkeypatch):
    def die(path):
        raise KeyboardInterrupt

    monkeypatch.setattr("neoflix.checkpoints.store.shutil.rmtree", die)
    with pytest.raises(KeyboardInterrupt):
        delete(checkpoint(folder, 1))
    monkeypatch.undo()
    assert list_checkpoints(folder) == []
    recover_interrupted(folder)
    assert names(folder) == []


# ---- the model at the top ------------------------------------------------------------------------------------


def test_a_promoted_model_takes_the_place_of_the_one_before(folder):
    shards = {"model-1.safetensors": "a", "spiece.model": "b"}
    export_best(checkpoint(folder, 1, **shards), folder)
    export_best(checkpoint(folder, 2), folder)
    assert names(folder) == ["checkpoint-1", "checkpoint-2", "model.safetensors"]
    assert (folder / "model.safetensors").read_text() == "weights of step 2"
    assert (folder / "checkpoint-1" / "model.safetensors").read_text() == "weights of step 1"
    export_best(folder / "checkpoint-2", folder)  # the same once more
    assert names(folder) == ["checkpoint-1", "checkpoint-2", "model.safetensors"]


def test_a_file_that_was_put_there_or_changed_while_it_trained_is_kept(folder):
    export_best(checkpoint(folder, 1, **{"generation_config.json": "{}"}), folder)
    (folder / "generation_config.json").unlink()
    (folder / "generation_config.json").write_text('{"top_k": 5}')
    (folder / "config.json").write_text("the user's")
    export_best(checkpoint(folder, 2, **{"generation_config.json": "{ }", "config.json": "{}"}), folder)
    assert (folder / "generation_config.json.kept").read_text() == '{"top_k": 5}'
    assert (folder / "config.json.kept").read_text() == "the user's"
    assert (folder / "config.json").read_text() == "{}"
    (folder / "generation_config.json").unlink()
    (folder / "generation_config.json").write_text("changed")
    export_best(checkpoint(folder, 3), folder)  # has none: theirs stays
    assert (folder / "generation_config.json").read_text() == "changed"
    assert not (folder / "config.json").exists()


@pytest.mark.parametrize("number", range(1, 9))
def test_a_promotion_that_was_interrupted_anywhere_is_finished_by_the_next(folder, monkeypatch, number):
    """A kill at any step of it: nothing is set aside as if it were the user's, and no file is neither old nor new."""
    old = {"model.safetensors": "old", "config.json": "old", "merges.txt": "old"}
    new = {"model.safetensors": "new", "config.json": "new", "vocab.json": "new"}
    export_best(save(folder / "checkpoint-1", 1, **old), folder)
    save(folder / "checkpoint-2", 2, **new)
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
    assert names(folder) == ["checkpoint-1", "checkpoint-2", "config.json", "model.safetensors", "vocab.json"]
    assert {(folder / name).read_text() for name in new} == {"new"}


# ---- runs of older versions ----------------------------------------------------------------------------------


def older_run(folder: Path) -> None:
    folder.mkdir()
    write_json(folder / RUN_FILE, OLDER_RUN)
    save(folder / "checkpoint-2", 2, **{"config.json": "{}"})
    for name in ("model.safetensors", "config.json"):
        os.link(folder / "checkpoint-2" / name, folder / name)


def test_a_run_without_a_list_is_gone_on_with(tmp_path):
    folder = tmp_path / "run"
    older_run(folder)
    (folder / "starts.json").write_text("[]")
    (folder / "notes.safetensors").write_text("the user's")
    check_output_dir(str(folder), OTHER)
    claim(str(folder))
    export_best(checkpoint(folder, 4), folder)
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
    with pytest.raises(ValueError, match=r"model\.safetensors there was not written by this run"):
        check_output_dir(str(folder), OTHER)
