"""What is refused of --push_to_hub without asking a hub."""

import pytest

from neoflix.arguments.reader import is_complete, read_train_flags
from neoflix.runtime.errors import UserError

PUSH = ["--plan", "--push_to_hub", "true"]


@pytest.mark.parametrize("name", ["a/b/c", "my run", "https://huggingface.co/ann/run", "a--b", "x" * 97])
def test_names_that_no_repository_can_have(name):
    with pytest.raises(UserError, match="--hub_model_id"):
        read_train_flags([*PUSH, "--hub_model_id", name])


def test_a_folder_whose_name_is_no_repository_needs_another_one(tmp_path):
    folder = str(tmp_path / "my run")
    with pytest.raises(UserError, match=r"'my run'.*--hub_model_id"):
        read_train_flags([*PUSH, "--output_dir", folder])
    assert (
        read_train_flags([*PUSH, "--output_dir", folder, "--hub_model_id", "ann/my-run"]).hub_model_id == "ann/my-run"
    )


def test_adapters_for_a_folder_are_refused(model_dir):
    words = [*PUSH, "--lora", "true", "--model_name_or_path"]
    with pytest.raises(UserError, match="adapters name their base model"):
        read_train_flags([*words, str(model_dir)])
    for base in ("EleutherAI/gpt-neo-125m", "smollm2"):
        assert read_train_flags([*words, base]).push_to_hub


def test_an_evaluation_has_nothing_to_upload(model_dir):
    with pytest.raises(UserError, match="--eval_only"):
        read_train_flags(["--eval_only", "--push_to_hub", "true", "--model_name_or_path", str(model_dir)])


@pytest.mark.parametrize("words", [["--hub_model_id", "ann/run"], ["--hub_private_repo", "true"]])
def test_flags_of_an_upload_have_no_effect_without_one(words):
    with pytest.raises(UserError, match="without --push_to_hub true"):
        read_train_flags(words)


def test_a_plan_needs_neither_transformers_nor_a_hub():
    assert is_complete(read_train_flags([*PUSH, "--hub_model_id", "ann/run", "--hub_private_repo", "true"]))
