"""What is refused without torch."""

import pytest
from forked import launch

from neoflix.arguments.checks import check_writable, find_checkpoint
from neoflix.arguments.reader import read_train_flags
from neoflix.runtime.errors import UserError


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--tokens_per_device_batch", "1"], "--tokens_per_device_batch 1"),
        (["--bf16", "true", "--fp16", "true"], "--bf16 true and --fp16 true"),
        (["--lora", "true", "--model_name_or_path", "demo"], "--lora true"),
        (["--lora_rank", "4"], "--lora_rank 4"),
        (["--plan_host_memory", "4GiB"], "--plan_host_memory 4GiB"),
        (["--template", "{a"], "--template"),
        (["--template", "{a}: {b}", "--text_column", "a"], "--text_column a"),
        (["--loss_on_prompt"], "--loss_on_prompt"),
        (["--num_train_epochs", "nan"], "--num_train_epochs nan"),
        (["--seed", "-1"], "--seed -1"),
        (["--output_dir", " "], "--output_dir"),
        (["--deepspeed", "none.json"], "--deepspeed none.json"),
        (["--override_resumed", "seed"], "--override_resumed seed"),
        (["--eval_only", "--plan"], "--plan"),
        (["--eval_only", "--validation_fraction", "0"], "--validation_fraction 0"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_flags_that_no_run_can_use(words, part):
    with pytest.raises(UserError) as error:
        read_train_flags(words)
    assert part in str(error.value)
    assert "\n" not in str(error.value)


def test_output_folder_that_cannot_be_written(tmp_path):
    check_writable(str(tmp_path / "new" / "run"))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=f"{tmp_path / 'file'} is a file"):
        check_writable(str(tmp_path / "file" / "run"))
    with pytest.raises(UserError, match="--output_dir /proc/run"):  # not even root can
        check_writable("/proc/run")


@pytest.mark.parametrize("word", ["true", "latest", "last", "missing"])
def test_checkpoints_that_are_not_there(word, tmp_path):
    with pytest.raises(UserError, match=f"--resume_from_checkpoint {word}"):
        find_checkpoint(str(tmp_path), word)
    assert find_checkpoint(str(tmp_path), "false") is None
    assert find_checkpoint(str(tmp_path), None) is None


@pytest.mark.process
def test_a_refused_flag_ends_the_program_with_code_2(tmp_path):
    output = launch(0, "train.py", "--output_dir", "/proc/run", expect=2)
    assert "error: --output_dir /proc/run" in output
    assert "Traceback" not in output
