"""Runs with `CompactAdamW` (ds_configs/one_card.json): the same promises as every other run's."""

import argparse
import json
import re
from pathlib import Path

import pytest
import torch
from conftest import assert_same_weights, generate_words, history, losses, read_jsonl, results
from forked import launch
from safetensors.torch import load_file
from soak import Life, compare, fingerprint
from soak import train_words as train_words_of

import generate
import train
from neoflix import export
from neoflix.checkpoints.find import COMPACT_BYTES, list_checkpoints
from neoflix.runtime.errors import UserError

ONE_CARD = ("--deepspeed", "ds_configs/one_card.json", "--bf16", "true")
STEPS = ("--eval_strategy", "no", "--save_strategy", "steps", "--save_steps", "3")
CONSTANT = ("--lr_scheduler_type", "constant", "--warmup_steps", "0")  # whatever the number of steps


def test_it_learns_as_fp32_states_do(run):
    """And its checkpoint has the weights once, and five bytes per parameter in all."""
    ours = run("ours", *ONE_CARD, "--max_steps", "30")
    theirs = run("theirs", "--bf16", "true", "--max_steps", "30")
    assert results(ours)["eval_loss"] == pytest.approx(results(theirs)["eval_loss"], rel=0.003)
    assert results(ours)["eval_loss"] < losses(ours)[0] - 0.5

    checkpoint = list_checkpoints(ours)[-1]
    weights = load_file(checkpoint / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
    num_parameters = sum(weight.numel() for weight in weights.values())
    num_bytes = sum(path.stat().st_size for path in checkpoint.rglob("*") if path.suffix in (".pt", ".safetensors"))
    assert num_bytes < (2 + COMPACT_BYTES) * num_parameters + 150_000


def test_resumed_as_never_interrupted(run, capsys):
    words = [*ONE_CARD, *STEPS, *CONSTANT]
    whole = run("whole", *words, "--max_steps", "6")
    run("resumed", *words, "--max_steps", "3")
    resumed = run("resumed", *words, "--max_steps", "6")
    assert "Resuming from" in capsys.readouterr().out
    assert losses(resumed) == losses(whole)
    assert compare(fingerprint(resumed), fingerprint(whole)) == "losses", "the run of three steps evaluated its model"


def test_its_model_is_sampled_from_exported_and_reported(run, tmp_path):
    folder = run("run", *ONE_CARD, "--max_steps", "2")
    export.main([str(folder), "--to", "gpt2", str(tmp_path / "gpt2")])
    for model in (folder, tmp_path / "gpt2"):
        assert load_file(model / "model.safetensors")["transformer.wte.weight"].dtype == torch.bfloat16
        generate.main(generate_words(model, "--num_samples", "3", "--output", str(tmp_path / "samples.jsonl")))
        assert len(read_jsonl(tmp_path / "samples.jsonl")) == 3
        (tmp_path / "samples.jsonl").unlink()
    for name in ("README.md", "report.html"):
        assert "one_card.json" in (folder / name).read_text().replace("\\", "")


@pytest.mark.parametrize(
    ("file", "sentence"),
    [
        ("ds_configs/one_small_card.json", "another deepspeed optimizer.params.in_backward (was False, is now True)"),
        ("ds_configs/cpu.json", "another deepspeed optimizer.type (was CompactAdamW, is now AdamW)"),
    ],
)
def test_a_run_keeps_its_optimizer(run, file, sentence):
    run("run", *ONE_CARD, *STEPS, *CONSTANT, "--max_steps", "3")
    with pytest.raises(UserError, match=re.escape(sentence)):
        run("run", "--deepspeed", file, "--bf16", "true", *STEPS, *CONSTANT, "--max_steps", "6")


@pytest.mark.parametrize("layers", ["1", "2", "auto"])
def test_recomputed_layers_change_nothing(run, layers):
    words = [*ONE_CARD, "--max_steps", "3", "--eval_strategy", "no"]
    assert_same_weights(run("none", *words), run("some", *words, "--activation_checkpointing", layers))


def test_batches_of_a_step_are_summed_in_bf16(run):
    """Eight batches of one text are one batch of eight, but for gradients that are rounded eight times."""
    words = [*ONE_CARD, "--max_steps", "6", "--eval_strategy", "no"]
    one = run("one", *words)
    eight = run("eight", *words, "--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "8")
    assert losses(eight) == pytest.approx(losses(one), rel=5e-3)


def test_adapters_are_trained_too(run):
    folder = run("lora", *ONE_CARD, "--lora", "true", "--max_steps", "4")
    assert results(folder)["eval_loss"] < history(folder)[0]["eval_loss"]
    assert (folder / "adapter_model.safetensors").is_file()


SMALL = ("--deepspeed", "ds_configs/one_small_card.json", "--bf16", "true")


def test_updates_in_the_backward_pass_change_nothing_else(run):
    """Without clipping the same weights; with it a run that is resumed is the uninterrupted one."""
    words = ["--max_steps", "4", "--eval_strategy", "no", "--max_grad_norm", "0"]
    assert_same_weights(run("after", *ONE_CARD, *words), run("during", *SMALL, *words))
    words = [*SMALL, *STEPS, *CONSTANT]
    whole = run("whole", *words, "--max_steps", "6")
    run("resumed", *words, "--max_steps", "3")
    resumed = run("resumed", *words, "--max_steps", "6")
    assert losses(resumed) == losses(whole)
    assert losses(resumed, "grad_norm") == losses(whole, "grad_norm")
    assert compare(fingerprint(resumed), fingerprint(whole)) == "losses"


def test_two_passes_clip_exactly(run):
    """As without updates in the backward pass, bit for bit; with dropout, so that random numbers count."""
    config = json.loads(Path("ds_configs/one_small_card.json").read_text())
    config["optimizer"]["params"]["in_backward"] = "two_passes"
    words = ["--max_steps", "4", "--eval_strategy", "no", "--max_grad_norm", "0.2", "--model_name_or_path", "demo"]
    ours = run("ours", "--deepspeed", json.dumps(config), "--bf16", "true", *words)
    theirs = run("theirs", *ONE_CARD, *words)
    assert losses(ours) == losses(theirs)
    assert_same_weights(ours, theirs)


def test_a_step_in_several_parts_is_refused(train_words, processes):
    with pytest.raises(ValueError, match="a step has one batch"):
        train.main([*train_words, *SMALL, "--gradient_accumulation_steps", "2"])
    processes(2)
    with pytest.raises(ValueError, match="works in one process"):
        train.main([*train_words, *SMALL])


def test_two_processes_are_one_and_take_over_from_one(train_words, tmp_path):
    """Each process holds all states, so that any number of them continues a run."""
    words = [*train_words, *ONE_CARD, *STEPS, *CONSTANT]

    def train_by(num_processes: int, name: str, max_steps: str) -> None:
        batch = ["--per_device_train_batch_size", str(8 // num_processes)]
        launch(num_processes, "train.py", *words, "--output_dir", tmp_path / name, *batch, "--max_steps", max_steps)

    for num_processes, name, max_steps in ((1, "one", "6"), (2, "two", "6"), (1, "both", "3"), (2, "both", "6")):
        train_by(num_processes, name, max_steps)
    for name in ("two", "both"):
        assert losses(tmp_path / name) == pytest.approx(losses(tmp_path / "one"), rel=5e-3)
    assert losses(tmp_path / "both")[:3] == losses(tmp_path / "one")[:3]


COMPACT = argparse.Namespace(steps=24, deepspeed="ds_configs/one_card.json")


def test_kills_change_nothing(tmp_path):
    """Two processes, whose weights and states must stay equal without being exchanged; `make soak` has thirty kills."""
    untouched, folder = tmp_path / "untouched", tmp_path / "run"
    launch(2, *train_words_of(untouched, COMPACT))
    for target, in_save in (("rank 0", False), ("rank 1", False), ("all ranks", True)):
        life = Life(folder, COMPACT)
        assert life.await_first_step()
        assert life.await_moment(0.1, in_save)
        life.kill(target)
        assert life.wait() != 0
    launch(2, *train_words_of(folder, COMPACT))
    assert not compare(fingerprint(folder), fingerprint(untouched))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"zero_optimization": {"stage": 1}}, "works without ZeRO only"),
        ({"bf16": {"enabled": "auto"}}, "remove the block 'bf16'"),
        ({"optimizer": {"type": "CompactAdamW", "params": {"fused": True}}}, "no parameter 'fused'"),
        ({"optimizer": {"type": "CompactAdamW", "params": {"in_backward": "twice"}}}, 'true or "two_passes"'),
    ],
)
def test_settings_that_would_bring_fp32_weights_back_are_refused(train_words, changes, reason):
    config = {"optimizer": {"type": "CompactAdamW"}, "zero_optimization": {"stage": 0}} | changes
    with pytest.raises(ValueError, match=reason):
        train.main([*train_words, "--bf16", "true", "--deepspeed", json.dumps(config)])


def test_fp32_is_refused(train_words):
    with pytest.raises(ValueError, match="add --bf16 true"):
        train.main([*train_words, *ONE_CARD[:2]])
