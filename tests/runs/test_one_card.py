"""Runs with `CompactAdamW` (ds_configs/one_card.json): the same promises as every other run's."""

import argparse
import json

import pytest
import torch
from conftest import assert_same_weights, generate_words, history, losses, read_jsonl, results
from forked import launch
from safetensors.torch import load_file
from soak import Life, compare, fingerprint
from soak import train_words as train_words_of

import generate
import train
from neoflix.checkpoints.find import COMPACT_BYTES, list_checkpoints

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


def test_resumed_as_never_interrupted_and_sampled_from(run, capsys):
    words = [*ONE_CARD, *STEPS, *CONSTANT]
    whole = run("whole", *words, "--max_steps", "6")
    run("resumed", *words, "--max_steps", "3")
    resumed = run("resumed", *words, "--max_steps", "6")
    assert "Resuming from" in capsys.readouterr().out
    assert losses(resumed) == losses(whole)
    assert compare(fingerprint(resumed), fingerprint(whole)) == "losses", "the run of three steps evaluated its model"
    generate.main(generate_words(whole, "--num_samples", "3", "--output", str(whole / "samples.jsonl")))
    assert len(read_jsonl(whole / "samples.jsonl")) == 3


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


def test_a_step_in_several_parts_is_refused(train_words, processes):
    with pytest.raises(ValueError, match="a step has one batch"):
        train.main([*train_words, *SMALL, "--gradient_accumulation_steps", "2"])
    processes(2)
    with pytest.raises(ValueError, match="works in one process"):
        train.main([*train_words, *SMALL])


def test_two_processes_are_one_and_agree(train_words, tmp_path):
    words = [*train_words, *ONE_CARD, "--max_steps", "6", "--eval_strategy", "no"]
    for name, num_processes, batch in (("one", 1, "8"), ("two", 2, "4")):
        launch(
            num_processes, "train.py", *words, "--output_dir", tmp_path / name, "--per_device_train_batch_size", batch
        )
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=5e-3)


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
    ],
)
def test_settings_that_would_bring_fp32_weights_back_are_refused(train_words, changes, reason):
    config = {"optimizer": {"type": "CompactAdamW"}, "zero_optimization": {"stage": 0}} | changes
    with pytest.raises(ValueError, match=reason):
        train.main([*train_words, "--bf16", "true", "--deepspeed", json.dumps(config)])


def test_fp32_is_refused(train_words):
    with pytest.raises(ValueError, match="add --bf16 true"):
        train.main([*train_words, *ONE_CARD[:2]])
