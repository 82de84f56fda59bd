"""A run writes in no folder where it would touch what is not its own."""

import json
import shutil

import pytest
from conftest import list_names

import train
from neoflix.checkpoints.output_dir import check_output_dir
from neoflix.runtime.processes import exit_code_of

OTHER = "EleutherAI/gpt-neo-125m"  # a base model that is not a folder
USERS_FILES = ("tokenizer_train.py", "vocab.csv", "prompt.jinja", "style.safetensors", "vocab.json", "notes.part")


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
    before = list_names(tmp_path / "run")
    assert exit_code_of(lambda: train.main([*train_words, "--output_dir", str(tmp_path / "run")])) == 2
    assert "not written" in capfd.readouterr().err
    assert list_names(tmp_path / "run") == before


@pytest.mark.parametrize(
    "name", ["model.safetensors", "config.json", "pytorch_model.bin", "model-00001-of-00002.safetensors", "run.json"]
)
def test_a_file_that_a_run_would_replace_is_refused(tmp_path, name):
    (tmp_path / name).write_text("{}")
    with pytest.raises(ValueError, match=f"{name}.* not written"):
        check_output_dir(str(tmp_path), OTHER)
    assert list_names(tmp_path) == [name]


def test_plain_trainers_checkpoint_is_refused(tmp_path):
    (tmp_path / "checkpoint-500").mkdir()
    (tmp_path / "checkpoint-500" / "trainer_state.json").write_text("{}")
    with pytest.raises(ValueError, match=r"checkpoint-500.* not written"):
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
