"""No secret and, in the model card, no local path reaches a file of the run."""

import json
from pathlib import Path

import pytest
import torch
from conftest import parse_train_args
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train
from neoflix.reporting.history import Record
from neoflix.runtime.redaction import HIDDEN, is_secret, redact, redact_command, redact_text

SECRET = "hf_" + "SeCrEt" * 5
OTHER = "0123456789abcdef"  # a secret by its name alone


@pytest.mark.parametrize("name", ["hub_token", "--hub-token", "api_key", "wandbApiKey", "PASSWORD", "aws_secret_id"])
def test_names_of_secrets(name):
    assert is_secret(name)


@pytest.mark.parametrize(
    "name",
    ["tokens_per_device_batch", "max_new_tokens", "include_num_input_tokens_seen", "author", "max_length"],
)
def test_names_of_other_things(name):
    assert not is_secret(name)


@pytest.mark.parametrize(
    "words",
    [
        ["--hub_token", OTHER],
        ["--hub-token", OTHER],
        [f"--hub_token={OTHER}"],
        [f"--hub-token={OTHER}"],
        ["--deepspeed", json.dumps({"comet": {"enabled": True, "api_key": OTHER}})],
        [f"--deepspeed={json.dumps({'comet': {'api_key': OTHER}})}"],
        ["--dataset", f"https://user:{OTHER}@example.org/x.csv"],
        ["--dataset", f"https://example.org/x.csv?a=1&access_token={OTHER}&b=2"],
        ["--dataset", f"s3://bucket/x.csv?X-Amz-Signature={OTHER}"],
        ["--run_name", f"with {SECRET}"],
    ],
    ids=lambda words: words[0],
)
def test_a_command_line_without_secrets(words):
    said = redact_command(["train.py", "--local_rank=0", *words, "--max_steps", "8"])
    assert OTHER not in said
    assert SECRET not in said
    assert HIDDEN in said
    assert said.replace("'", "").startswith("train.py --")
    assert said.endswith("--max_steps 8")
    assert "local_rank" not in said


def test_what_is_no_secret_stays():
    words = [
        "train.py",
        "--tokens_per_device_batch",
        "4096",
        "--template",
        "{key}: {text}",
        "--hub_token",
        "--seed",
        "7",
    ]
    assert redact_command(words).replace("'", "") == " ".join(words)
    for text in ("https://example.org/x?page=2", "a token is a word", "monkey=1", "[1, 2"):
        assert redact_text(text) == text
    assert redact({"a": [1, None, True], "api_key": None}) == {"a": [1, None, True], "api_key": None}


@pytest.mark.process
def test_no_secret_is_written_anywhere(train_words, tmp_path):
    """Said in the command, then in a recipe; searched for in every file, pickles and TensorBoard's among them."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"hub_token: {OTHER}\n")
    zero = json.dumps({**json.loads(Path("ds_configs/cpu.json").read_text()), "comet": {"api_key": OTHER}})
    words = [*train_words, "--report_to", "tensorboard", "--max_steps", "1", "--deepspeed", zero]
    words += ["--eval_strategy", "steps", "--eval_steps", "1", "--save_strategy", "steps", "--save_steps", "1"]
    for number, more in enumerate((["--hub-token", OTHER], ["--config", str(recipe)])):
        run = tmp_path / f"run-{number}"
        train.main([*words, "--output_dir", str(run), *more])
        holders = [path for path in run.rglob("*") if path.is_file() and OTHER.encode() in path.read_bytes()]
        assert holders == []
        arguments = torch.load(run / "checkpoint-1" / "training_args.bin", weights_only=False)
        assert OTHER not in repr(vars(arguments))
        assert arguments.max_steps == 1
        events = EventAccumulator(str(next(run.glob("runs/*")))).Reload()
        tag = next(tag for tag in events.Tags()["tensors"] if tag.startswith("args"))
        assert OTHER.encode() not in events.Tensors(tag)[0].tensor_proto.string_val[0]
    command = Record.read(run).start["command"]
    assert "--config" in command
    card = (run / "README.md").read_text()
    assert str(tmp_path) not in card
    assert "/" + tmp_path.name not in card


def test_the_live_arguments_keep_their_secret(train_words):
    args = parse_train_args([*train_words, "--hub_token", OTHER, "--deepspeed", "ds_configs/cpu.json"])
    assert args.hub_token == OTHER
    assert OTHER not in args.to_json_string()
    assert OTHER not in args.command


def test_an_unknown_flag_does_not_show_its_value(train_words):
    with pytest.raises(ValueError, match="unknown argument '--hub_tokn'; did you mean") as error:
        parse_train_args([*train_words, f"--hub_tokn={OTHER}"])
    assert OTHER not in str(error.value)
