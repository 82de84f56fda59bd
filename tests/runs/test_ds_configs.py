"""Every file in ds_configs/: each key known to DeepSpeed, described, and training as ds_config.json does."""

import json

import pytest
from conftest import ROOT, losses
from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
from deepspeed.runtime.swap_tensor.aio_config import AIO_DEFAULT_DICT
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from forked import launch

import train
from neoflix.arguments.deepspeed_file import read_ds_config

FILES = sorted((ROOT / "ds_configs").glob("*.json"))
FOLLOWS_TRAINER = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")

# All that a CPU can train; nvme needs libaio and a local disk.
EXACT = ["cpu", "multi_gpu", "multi_gpu_zero1", "no_offload", "zero3_offload"]


def without_auto(config: dict) -> dict:
    """The block with what Trainer fills in left out, in nested blocks too."""
    return {
        key: without_auto(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if value != "auto"
    }


def check_known_keys(config: dict) -> None:
    """Raises for a nested key that DeepSpeed does not read. Three blocks have no class that forbids extras."""
    DeepSpeedZeroConfig(**without_auto(config["zero_optimization"]))
    DeepSpeedBF16Config(**without_auto(config.get("bf16", {})))
    DeepSpeedFP16Config(**without_auto(config.get("fp16", {})))
    for block, known in (
        ("aio", set(AIO_DEFAULT_DICT)),
        ("data_types", {"grad_accum_dtype", "param_dtype", "buffer_dtype"}),
        ("optimizer", {"type", "params"}),
    ):
        assert set(config.get(block, {})) <= known, block
    assert set(config["optimizer"]["params"]) <= {
        *("lr", "betas", "eps", "weight_decay", "torch_adam", "fused"),
        "in_backward",  # our own optimizer's
    }


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_file_is_described_and_known_to_deepspeed(path):
    config = read_ds_config(path)
    check_known_keys(config)
    assert "scheduler" not in config, "Trainer schedules; with DeepSpeed's scheduler the logged rate lags a step"
    assert [config[key] for key in FOLLOWS_TRAINER] == ["auto"] * 3
    assert config["gradient_clipping"] == "auto"
    assert {config["optimizer"]["params"][key] for key in ("lr", "betas", "eps", "weight_decay")} == {"auto"}
    offload = config["zero_optimization"].get("offload_optimizer", {})
    if offload.get("device") == "nvme":
        assert config["zero_optimization"]["stage"] == 3, "stage 2 keeps everything in host memory and says nothing"
    if config["zero_optimization"]["stage"] == 3:
        assert config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"]

    text = path.with_suffix(".md").read_text(encoding="utf-8")
    assert f"--deepspeed ds_configs/{path.name}" in text


def test_there_are_files_and_no_stray_description():
    assert set(EXACT) < {path.stem for path in FILES}
    assert {path.stem for path in (ROOT / "ds_configs").glob("*.md")} == {path.stem for path in FILES}


@pytest.mark.parametrize(
    ("block", "key"),
    [
        (("zero_optimization",), "reduce_bucket_sise"),
        (("zero_optimization", "offload_optimizer"), "pin"),
        (("bf16",), "bf16_master_weights"),
        (("optimizer", "params"), "learning_rate"),
    ],
)
def test_misspelt_keys_are_seen(block, key):
    config = json.loads((ROOT / "ds_config.json").read_text())
    check_known_keys(config)
    place = config
    for name in block:
        place = place[name]
    place[key] = 1
    with pytest.raises((ValueError, AssertionError)):
        check_known_keys(config)


@pytest.fixture
def train_three_steps(train_words, tmp_path):
    """train_three_steps(DeepSpeed's file, *words) -> losses of three steps, each of two batches."""

    def run(file: str, *words: str) -> list[float]:
        folder = tmp_path / file.replace("/", "-")
        words = ["--deepspeed", file, "--output_dir", str(folder), "--max_steps", "3", *words]
        words += ["--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "2"]
        words = [*train_words, "--eval_strategy", "no", "--save_strategy", "steps", *words]
        if read_ds_config(ROOT / file)["zero_optimization"]["stage"] == 3:  # its own process
            launch(1, "train.py", *words)
        else:
            train.main(words)
        return losses(folder)

    return run


def test_files_train_as_the_default_does(train_three_steps):
    """Where memory lies is no arithmetic: same losses, and the third has seen two optimizer steps."""
    expected = train_three_steps("ds_config.json")
    assert len(expected) == 3
    for name in EXACT:
        assert train_three_steps(f"ds_configs/{name}.json") == pytest.approx(expected, rel=1e-4), name
