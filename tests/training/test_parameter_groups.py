"""The optimizer of every DeepSpeed file is the one that Trainer alone would use."""

import json
import os

import pytest
import torch
from conftest import ROOT, losses, weights
from forked import launch
from safetensors.torch import load_file

import train
from neoflix.arguments.deepspeed_file import read_ds_config
from neoflix.checkpoints.find import list_checkpoints
from neoflix.checkpoints.manifest import read_manifest
from neoflix.data.tokenizer import load_tokenizer
from neoflix.model.load import load_model
from neoflix.runtime.errors import UserError
from neoflix.training.parameter_groups import check_groups, group_parameters

# A schedule with a warm-up, and enough decay for a decayed bias or LayerNorm to show.
STEPS = ["--max_steps", "20", "--weight_decay", "0.5", "--warmup_steps", "5", "--learning_rate", "1e-3"]

# Transformers' Trainer without DeepSpeed, on the texts of a run and in their order.
PLAIN_TRAINER = """
import json, sys
from pathlib import Path
import torch
from transformers import Trainer, TrainingArguments, set_seed
from neoflix.data.packing import PackedCollator
from neoflix.data.tokens import fill_up, tokenize_texts
from neoflix.data.split import split_texts
from neoflix.model.load import load_model
from neoflix.data.sources import read_examples
from neoflix.data.tokenizer import load_tokenizer

model_dir, catalogue, lora, out = sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), Path(sys.argv[4])
set_seed(42)  # LoRA draws its matrices by it
tokenizer = load_tokenizer(model_dir)
texts = split_texts(read_examples(Path(catalogue), "description"), 0.1).train
dataset = fill_up(tokenize_texts(texts, tokenizer, 256, out)[0], 8, tokenizer.bos_token_id)
args = TrainingArguments(
    output_dir=str(out), use_cpu=True, per_device_train_batch_size=8, max_steps=20, weight_decay=0.5, warmup_steps=5,
    learning_rate=1e-3, lr_scheduler_type="cosine", logging_steps=1, report_to="none", save_strategy="no", seed=42,
    remove_unused_columns=False, disable_tqdm=True,
)
model = load_model(model_dir, tokenizer, torch.float32, {}, lora=lora)
trainer = Trainer(model=model, args=args, train_dataset=dataset, data_collator=PackedCollator())
trainer.train()
(out / "losses.json").write_text(json.dumps([line["loss"] for line in trainer.state.log_history if "loss" in line]))
torch.save({name: weight for name, weight in model.named_parameters() if weight.requires_grad}, out / "weights.pt")
"""


@pytest.fixture
def run_plain_trainer(tmp_path, model_dir, catalogue):
    """run_plain_trainer(LoRA's settings or None) -> losses and trained weights of transformers' own Trainer."""

    def run(lora: dict | None = None) -> tuple[list[float], dict]:
        out = tmp_path / "plain"
        out.mkdir(exist_ok=True)
        (out / "train.py").write_text(PLAIN_TRAINER)
        env = {"ACCELERATE_USE_DEEPSPEED": "false"}
        launch(0, out / "train.py", model_dir, catalogue, json.dumps(lora), out, env=env)
        return json.loads((out / "losses.json").read_text()), torch.load(out / "weights.pt")

    return run


@pytest.fixture
def run_with(tmp_path, train_words):
    """run_with(DeepSpeed file, *words) trains 20 steps with it and returns the run's folder."""

    def run(file: str, *words: str):
        folder = tmp_path / ("run-" + os.path.basename(file))
        words = [
            *train_words,
            *STEPS,
            "--eval_strategy",
            "no",
            "--save_strategy",
            "steps",
            "--save_steps",
            "20",
            *words,
        ]
        words += ["--deepspeed", str(file), "--output_dir", str(folder), "--num_progress_samples", "0"]
        if read_ds_config(file).get("zero_optimization", {}).get("stage") == 3:  # its own process
            launch(1, "train.py", *words)
        else:
            train.main(words)
        return folder

    return run


def assert_equal(folder, plain: tuple[list[float], dict]) -> None:
    expected_losses, expected_weights = plain
    assert losses(folder) == pytest.approx(expected_losses, rel=2e-5)
    for name, weight in weights(folder).items():
        torch.testing.assert_close(
            weight, expected_weights[name], atol=1e-4, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}"
        )


def without_optimizer(tmp_path) -> str:
    config = json.loads((ROOT / "ds_configs" / "cpu.json").read_text())
    del config["optimizer"]
    path = tmp_path / "without_optimizer.json"
    path.write_text(json.dumps(config))
    return str(path)


@pytest.mark.process
def test_every_file_decays_what_trainer_decays(run_with, run_plain_trainer, tmp_path):
    plain = run_plain_trainer()
    names = ["cpu", "multi_gpu", "multi_gpu_zero1", "no_offload", "zero3_offload"]
    files = ["ds_config.json", *(f"ds_configs/{name}.json" for name in names), without_optimizer(tmp_path)]
    for file in files:
        assert_equal(run_with(file), plain)


@pytest.mark.process
def test_lora_decays_what_trainer_decays(run_with, run_plain_trainer):
    folder = run_with("ds_config.json", "--lora", "true", "--lora_rank", "4")
    expected_losses, expected_weights = run_plain_trainer({"rank": 4, "alpha": 8.0})
    assert losses(folder) == pytest.approx(expected_losses, rel=2e-5)
    adapters = load_file(folder / "adapter_model.safetensors")
    assert len(adapters) == len(expected_weights)
    for name, weight in expected_weights.items():
        saved = adapters[name.replace(".default", "")]
        torch.testing.assert_close(saved, weight, atol=1e-4, rtol=1e-3)


def test_groups_hold_each_trainable_parameter_once(model_dir):
    model = load_model(str(model_dir), load_tokenizer(str(model_dir)), torch.float32, {})
    model.transformer.wpe.weight.requires_grad = False
    matrices = [name for name, weight in model.named_parameters() if weight.dim() == 2]
    decayed, rest = group_parameters(model, matrices, 0.1)
    assert (decayed["weight_decay"], rest["weight_decay"]) == (0.1, 0.0)
    assert {weight.dim() for weight in decayed["params"]} == {2}
    assert {weight.dim() for weight in rest["params"]} == {1}
    grouped = {id(weight) for group in (decayed, rest) for weight in group["params"]}
    assert grouped == {id(weight) for weight in model.parameters() if weight.requires_grad}
    assert len(group_parameters(model, [name for name, _ in model.named_parameters()], 0.1)) == 1


@pytest.mark.process
def test_checkpoint_with_one_group_is_refused_in_one_sentence(run_with):
    folder = run_with("ds_configs/cpu.json", "--max_steps", "2", "--save_steps", "2")
    checkpoint = list_checkpoints(folder)[-1]
    assert read_manifest(checkpoint)["optimizer_groups"] == 2
    check_groups(checkpoint, 2)
    manifest = checkpoint / "manifest.json"
    contents = json.loads(manifest.read_text())
    del contents["optimizer_groups"]
    manifest.write_text(json.dumps(contents))
    with pytest.raises(UserError, match=r"saved by an earlier version.*cannot be resumed") as error:
        run_with("ds_configs/cpu.json", "--max_steps", "4", "--save_steps", "2", "--override_resumed", "max_steps")
    assert "\n" not in str(error.value)
    check_groups(checkpoint, 1)  # LoRA's adapters are all matrices: still one group
