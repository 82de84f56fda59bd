"""Texts written while a model trains: always the same ones, and the run does not notice."""

import json
import shutil

import pytest
from conftest import ROOT, assert_same_weights, losses

import train
from neoflix.checkpoints.find import list_checkpoints
from neoflix.checkpoints.names import LIVE_SAMPLES_FILE
from neoflix.data.tokenizer import read_tokenizer
from neoflix.model.load import load_for_reading
from neoflix.reporting.run_log import read_live_samples
from neoflix.runtime.console import printable
from neoflix.sampling.sampler import Sampler

PLAIN = ["--deepspeed", str(ROOT / "ds_configs" / "cpu.json")]


@pytest.fixture
def run(train_words, tmp_path):
    """run("name", *more words) trains the demo, which has dropout, in a folder of that name, and returns it."""

    def run(name, *words):
        folder = tmp_path / name
        demo = ["--model_name_or_path", "demo", "--output_dir", str(folder)]
        train.main([*train_words, *PLAIN, *demo, *words])
        return folder

    return run


def test_a_run_with_samples_is_the_run_without(run, capsys):
    words = ["--max_steps", "6", "--eval_strategy", "steps", "--eval_steps", "2", "--save_strategy", "steps"]
    words += ["--save_steps", "6", "--lr_scheduler_type", "constant"]
    without = run("without", *words, "--num_progress_samples", "0")
    assert not (without / LIVE_SAMPLES_FILE).exists()
    shown = ["--num_progress_samples", "3", "--sample_prompts", "", "A young"]
    samples = run("with", *words, *shown)
    assert losses(samples) == losses(without)
    assert losses(samples, "eval_loss") == losses(without, "eval_loss")
    assert_same_weights(samples / "checkpoint-6", without / "checkpoint-6")

    rows = read_live_samples(samples)
    assert [row["step"] for row in rows] == [step for step in (0, 2, 4, 6) for _ in range(6)]
    assert [row["prompt"] for row in rows] == (["", "", "", "A young", "A young", "A young"]) * 4
    assert all(row["text"].startswith(row["prompt"]) for row in rows)
    texts = {step: [row["text"] for row in rows if row["step"] == step] for step in (0, 6)}
    assert texts[0] != texts[6], "the model has not changed"
    assert len(set(texts[6])) == 6
    assert " ".join(printable(texts[6][0]).split())[:40] in capsys.readouterr().out

    # They are what the checkpoint itself writes.
    checkpoint = list_checkpoints(samples)[-1]
    sampler = Sampler(load_for_reading(str(checkpoint)), read_tokenizer(checkpoint, ""), in_training=True)
    again = sampler.sample(["", "A young"], 3, seed=42, batch_size=6, max_new_tokens=48)
    assert [sample.text for sample in again] == texts[6]


def test_a_resumed_run_has_each_sample_once(run, tmp_path):
    words = ["--max_steps", "4", "--eval_strategy", "steps", "--eval_steps", "2", "--save_strategy", "steps"]
    words += ["--save_steps", "2", "--save_total_limit", "5", "--num_progress_samples", "2"]
    whole = run("whole", *words)
    resumed = tmp_path / "resumed"  # killed after its evaluation at step 4, in the middle of a line
    shutil.copytree(whole, resumed, ignore=shutil.ignore_patterns("checkpoint-4", "all_results.json"))
    with (resumed / LIVE_SAMPLES_FILE).open("a") as file:
        file.write('{"step": 4, "te')
    run("resumed", *words)
    assert (resumed / LIVE_SAMPLES_FILE).read_bytes() == (whole / LIVE_SAMPLES_FILE).read_bytes()
    starts = json.loads((resumed / "starts.json").read_text())
    assert [start["from_step"] for start in starts] == [0, 2]


def test_prompts_that_are_too_long_are_told_before_the_first_step(run):
    with pytest.raises(ValueError, match="--sample_prompts 'A a a"):
        run("run", "--max_steps", "1", "--sample_prompts", "A " + "a " * 600)
