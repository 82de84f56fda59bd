"""The order of the texts is a function of seed and epoch: a run that was interrupted sees the same ones in the same
order, whatever the flags."""

import json
import shutil

import pytest
import torch
from conftest import ON_CPU, assert_same_weights, losses

from neoflix.data.packing import EpochOrder
from neoflix.training.trainer import TokenTrainer

WORKERS = ["--dataloader_num_workers", "1", "--dataloader_persistent_workers", "true"]
FLAGS = {
    "random": [],
    "random, persistent workers": WORKERS,
    "group_by_length": ["--train_sampling_strategy", "group_by_length", "--data_seed", "7"],
    "batch_rebalance": ["--train_sampling_strategy", "batch_rebalance", "--gradient_accumulation_steps", "2"],
    "sequential": ["--train_sampling_strategy", "sequential"],
    "by tokens, persistent workers": ["--tokens_per_device_batch", "800", *WORKERS],
}


@pytest.fixture
def steps(monkeypatch) -> list[list[int]]:
    """The tokens of each batch that is trained on, as they come."""
    seen, step = [], TokenTrainer.training_step

    def remember(self, model, inputs, *args):
        seen.append(inputs["input_ids"].flatten().tolist())
        return step(self, model, inputs, *args)

    monkeypatch.setattr(TokenTrainer, "training_step", remember)
    return seen


@pytest.fixture
def model_with_dropout(model_dir, tmp_path):
    """So that random states count."""
    folder = tmp_path / "model"
    shutil.copytree(model_dir, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"resid_dropout": 0.1, "embed_dropout": 0.1}))
    return folder


@pytest.mark.parametrize("flags", FLAGS)
def test_resumed_at_any_step_is_uninterrupted(run, tmp_path, steps, model_with_dropout, flags):
    words = [*ON_CPU, "--model_name_or_path", str(model_with_dropout), "--num_train_epochs", "2"]
    words += ["--save_strategy", "steps", "--save_steps", "1", "--save_total_limit", "99", *FLAGS[flags]]
    words += ["--num_progress_samples", "0", "--early_stopping_patience", "0"]
    whole = run("whole", *words)
    in_order, num_steps = list(steps), len(losses(whole))
    per_epoch, per_step = num_steps // 2, len(in_order) // num_steps
    for stopped in (per_epoch, per_epoch + 2):  # between two epochs, and within the second
        part = tmp_path / f"part-{stopped}"
        later = [f"checkpoint-{step}" for step in range(stopped + 1, num_steps + 1)]
        shutil.copytree(whole, part, ignore=shutil.ignore_patterns(*later, "all_results.json"))
        steps.clear()
        run(part.name, *words)
        assert steps == in_order[stopped * per_step :]
        assert losses(part) == losses(whole)
        assert_same_weights(part / f"checkpoint-{num_steps}", whole / f"checkpoint-{num_steps}")
    if "tokens" not in flags and flags != "sequential":
        epoch = len(in_order) // 2
        assert in_order[:epoch] != in_order[epoch:]


def test_every_text_comes_once_an_epoch_in_another_order():
    lengths = torch.randint(3, 60, (358,), generator=torch.Generator().manual_seed(0)).numpy()
    for by_length in (False, True):
        order = EpochOrder(lengths, 16, seed=1, by_length=by_length)
        epochs = []
        for epoch in (0, 1, 0):
            order.set_epoch(epoch)
            epochs.append(list(order))
        assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(358))
        assert epochs[0] != epochs[1]
        assert epochs[0] == epochs[2]
