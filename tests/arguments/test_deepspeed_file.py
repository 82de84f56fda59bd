import json

import pytest
from conftest import ROOT
from deepspeed.runtime.swap_tensor.aio_config import AIO_DEFAULT_DICT

import train
from neoflix.arguments.deepspeed_file import OPEN_BLOCKS, read_ds_config
from neoflix.planning.plan_run import plan_run
from neoflix.runtime.errors import UserError

GATHERS = "stage3_gather_16bit_weights_on_model_save"


def write(path, config):
    path.write_text(config if isinstance(config, str) else json.dumps(config))
    return path


def test_shipped_file_is_zero_2_with_offload_and_leaves_the_rest_to_trainer():
    config = read_ds_config(ROOT / "ds_config.json")
    assert config["zero_optimization"]["stage"] == 2
    assert config["zero_optimization"]["offload_optimizer"]["device"] == "cpu"
    assert "scheduler" not in config
    for key in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"):
        assert config[key] == "auto"
    assert config["optimizer"]["params"]["lr"] == "auto"
    assert config["bf16"]["enabled"] == config["fp16"]["enabled"] == "auto"
    assert config["fp16"]["initial_scale_power"] <= 12


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{'stage': 2}", "not valid JSON"),
        ("[1]", "one JSON object"),
        ({"zero_optimisation": {"stage": 2}}, "did you mean 'zero_optimization'"),
        ({"aio": {"queue_dept": 8}}, "'queue_dept' in 'aio' .* 'queue_depth'"),
        ({"data_types": {"grad_accum": "fp32"}}, "did you mean 'grad_accum_dtype'"),
        ({"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}, "stage 3 only"),
        ({"zero_optimization": {"offload_param": {"device": "cpu"}}}, "stage 3 only"),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "nvme"}}}, "not on NVMe"),
        ({"zero_optimization": {"stage": 3, GATHERS: False}}, GATHERS),
        ({"zero_optimization": {"stage": 2, "zenflow": {}}}, "remove zenflow"),
    ],
)
def test_what_deepspeed_lets_through_is_refused(tmp_path, config, message):
    with pytest.raises(ValueError, match=message):
        read_ds_config(write(tmp_path / "ds.json", config))


def test_json_itself_may_stand_for_a_file():
    assert read_ds_config('{"zero_optimization": {"stage": 1}}') == {"zero_optimization": {"stage": 1}}
    with pytest.raises(ValueError, match="did you mean"):
        read_ds_config('{"zero_optimisation": {}}')


def test_keys_of_open_blocks_are_deepspeeds():
    assert set(OPEN_BLOCKS["aio"]) == set(AIO_DEFAULT_DICT)


def test_command_line_and_file_may_not_differ(train_words):
    """Both values are named."""
    config = json.loads((ROOT / "ds_configs" / "cpu.json").read_text()) | {"train_micro_batch_size_per_gpu": 3}
    with pytest.raises(ValueError, match="train_micro_batch_size_per_gpu is 3, but --per_device_train_batch_size 8"):
        train.main([*train_words, "--deepspeed", json.dumps(config)])


def test_missing_file(tmp_path):
    with pytest.raises(ValueError, match="cannot be read"):
        read_ds_config(tmp_path / "none.json")


def test_stage_3_may_offload_parameters(tmp_path):
    config = {"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}}
    assert read_ds_config(write(tmp_path / "ds.json", config)) == config


PLAIN = {"zero_optimization": {"stage": 0}}


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({"gradient_clipping": 0.5}, "gradient_clipping is 0.5, but --max_grad_norm 1.0"),
        ({"optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}}, "optimizer.params.lr is 0.001, but --learning_rate"),
        ({"optimizer": {"type": "AdamW", "params": {"betas": [0.9, 0.95]}}}, "--adam_beta1 and --adam_beta2"),
        ({"optimizer": {"type": "AdamW", "params": {"eps": 1e-6}}}, "--adam_epsilon"),
        ({"optimizer": {"type": "AdamW", "params": {"weight_decay": 0.5}}}, "--weight_decay 0.01"),
        ({"train_micro_batch_size_per_gpu": 3}, "--per_device_train_batch_size 16"),
        ({"gradient_accumulation_steps": 3}, "--gradient_accumulation_steps 1"),
        ({"train_batch_size": 3}, "train_batch_size is 3"),
        ({"bf16": {"enabled": True}}, "bf16.enabled is True, but --bf16 False"),
        ({"scheduler": {"type": "WarmupLR"}}, "--lr_scheduler_type"),
    ],
    ids=str,
)
def test_a_file_that_contradicts_a_flag(demo_flags, block, message):
    with pytest.raises(UserError, match=message):
        plan_run(demo_flags("--deepspeed", json.dumps(PLAIN | block)))


def test_what_a_file_leaves_out_follows_the_flags(demo_args):
    args = demo_args("--deepspeed", json.dumps(PLAIN | {"optimizer": {"type": "AdamW"}}), "--adam_beta1", "0.8")
    config = args.hf_deepspeed_config.config
    assert config["gradient_clipping"] == 1.0
    assert config["train_micro_batch_size_per_gpu"] == 16
    assert config["optimizer"]["params"] == {"lr": 5e-4, "betas": [0.8, 0.999], "eps": 1e-8, "weight_decay": 0.01}
