"""Every flag of Hugging Face's `TrainingArguments` works, or is refused by name."""

import json
from dataclasses import MISSING, fields
from typing import get_type_hints

import pytest
from conftest import ROOT, history, results
from forked import launch
from transformers import TrainingArguments

import train
from neoflix.arguments.flags import NEEDS, NUMBER_RULES, REFUSED
from neoflix.arguments.parse import parse_train_args
from neoflix.arguments.training import TrainArguments
from neoflix.runtime.environment import prepare_environment
from neoflix.runtime.errors import UserError

# A value for flags whose type alone doesn't give one that differs from the default.
VALUES = {
    "accelerator_config": '{"split_batches": true}',
    "fsdp": "full_shard",
    "fsdp_config": '{"version": 2}',
    "liger_kernel_config": '{"rope": true}',
    "ddp_backend": "gloo",
    "hub_strategy": "end",
    "include_for_metrics": "loss",
    "label_names": "labels",
    "length_column_name": "num_tokens",
    "parallelism_config": "2",
}

# The flags that work, each with what shows it. A field that is neither here nor in REFUSED fails the test below.
WORKS = {
    "tests/runs/test_train.py, whole runs": """output_dir per_device_train_batch_size gradient_accumulation_steps
        num_train_epochs max_steps learning_rate lr_scheduler_type warmup_steps seed eval_strategy eval_steps
        save_strategy save_steps save_total_limit eval_on_start per_device_eval_batch_size dataloader_num_workers
        torch_compile resume_from_checkpoint activation_checkpointing gradient_checkpointing disable_tqdm logging_steps
        deepspeed
        use_cpu report_to bf16""",
    "tests/training/test_optimizer.py": "weight_decay optim",
    "tests/planning/test_forecast.py": "fp16",
    "test_flags_that_change_a_log": """logging_strategy logging_first_step lr_scheduler_kwargs adam_beta1 adam_beta2
        adam_epsilon max_grad_norm include_num_input_tokens_seen skip_memory_metrics data_seed train_sampling_strategy
        eval_delay metric_for_best_model greater_is_better""",
    "test_flags_that_only_must_not_disturb": """run_name log_level log_level_replica log_on_each_node
        torch_empty_cache_steps full_determinism dataloader_prefetch_factor dataloader_persistent_workers
        dataloader_multiprocessing_context dataloader_pin_memory activation_checkpointing_kwargs
        gradient_checkpointing_kwargs prediction_loss_only do_train debug load_best_model_at_end
        average_tokens_across_devices logging_nan_inf_filter tf32""",
    "test_words_that_are_refused": "torch_compile_mode torch_compile_backend optim_args optim_target_modules",
    "NEEDS: only with trackio": "project trackio_space_id trackio_bucket_id trackio_static_space_id",
    "tests/runs/test_recovery.py": "restore_callback_states_from_checkpoint",
    "tests/runtime/test_redaction.py: a secret, for whoever asks the hub": "hub_token",
    "the launcher's": "local_rank ddp_timeout",
}
PROVEN = [name for names in WORKS.values() for name in names.split()]


@pytest.fixture
def parse(tmp_path):
    prepare_environment()
    words = [
        "--config",
        str(ROOT / "recipes" / "demo.yaml"),
        "--output_dir",
        str(tmp_path / "run"),
        "--use_cpu",
        "true",
    ]
    return lambda *more: parse_train_args([*words, "--use_cpu", "true", *more])


def another_value(name: str) -> str:
    """A value of a flag that isn't its default."""
    if name in VALUES:
        return VALUES[name]
    field = TrainArguments.__dataclass_fields__[name]
    default = field.default_factory() if field.default is MISSING else field.default
    if isinstance(default, bool) or "bool" in str(get_type_hints(TrainArguments)[name]):
        return "false" if default else "true"
    return "7"


def test_every_field_is_refused_or_works():
    """A new version of transformers brings a new flag: try it, then put it here or in REFUSED."""
    names = {field.name for field in fields(TrainingArguments)}
    assert len(PROVEN) == len(set(PROVEN))
    assert not set(PROVEN) & REFUSED.keys()
    assert names - set(PROVEN) - REFUSED.keys() == set(), "neither works nor is refused"
    assert (set(PROVEN) | REFUSED.keys()) - names == set(), "no flag of Hugging Face's"
    ours = {field.name for field in fields(TrainArguments)}
    assert NEEDS.keys() <= ours
    assert NUMBER_RULES.keys() <= ours


@pytest.mark.parametrize("name", REFUSED)
def test_refused_flags_are_named(parse, name):
    with pytest.raises(UserError, match=rf"--{name}\b") as error:
        parse(f"--{name}={another_value(name)}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", NUMBER_RULES)
@pytest.mark.parametrize("value", ["-7", "nan"])
def test_numbers_that_no_run_can_use(parse, name, value):
    """`nan` is no whole number, which argparse says; both sentences name the flag."""
    with pytest.raises(UserError, match=f"--{name}"):
        parse(f"--{name}={value}")


@pytest.mark.parametrize(
    "words",
    [
        ["--num_train_epochs", "0"],
        ["--save_total_limit", "0"],
        ["--logging_steps", "0"],
        ["--eval_steps", "0"],
        ["--save_steps", "0"],
        ["--max_steps", "0"],
        ["--adam_beta1", "1"],
        ["--learning_rate", "inf"],
        ["--seed", "4294967296"],
        ["--lr_scheduler_type", "foo"],
        ["--lr_scheduler_type", "reduce_lr_on_plateau"],
        ["--lr_scheduler_type", "warmup_stable_decay"],
        ["--lr_scheduler_kwargs", "{bad"],
        ["--lr_scheduler_kwargs", '{"foo": 1}'],
        ["--optim", "foo"],
        ["--optim", "sgd"],
        ["--optim_args", "x=1"],
        ["--optim_target_modules", "all-linear"],
        ["--eval_strategy", "NO"],
        ["--save_strategy", "sometimes"],
        ["--metric_for_best_model", "accuracy"],
        ["--greater_is_better", "true"],
        ["--torch_compile_mode", "fast"],
        ["--torch_compile_backend", "gcc"],
        ["--debug", "tpu_metrics_debug"],
        ["--resume_from_checkpoint", "true"],
        ["--resume_from_checkpoint", "latest"],
        ["--resume_from_checkpoint", "missing"],
        ["--output_dir", ""],
        ["--output_dir", " "],
        ["--eval_steps", "5"],
        ["--save_steps", "5"],
        ["--lora_rank", "4"],
        ["--dataloader_persistent_workers", "true"],
        ["--project", "mine"],
        ["--train_sampling_strategy", "sequential", "--tokens_per_device_batch", "400"],
    ],
    ids=" ".join,
)
def test_words_that_are_refused(parse, words):
    with pytest.raises(UserError, match=words[0]) as error:
        parse(*words)
    assert "\n" not in str(error.value)


def test_words_that_are_taken(parse):
    assert parse("--resume_from_checkpoint", "false").resume_from_checkpoint is None
    assert parse("--metric_for_best_model", "perplexity").greater_is_better is False
    assert parse("--load_best_model_at_end", "true", "--remove_unused_columns", "false").output_dir
    assert parse("--save_strategy", "best").save_strategy == "best"
    schedule = parse("--lr_scheduler_type", "cosine_with_min_lr", "--lr_scheduler_kwargs", '{"min_lr": 1e-5}')
    assert schedule.lr_scheduler_kwargs == {"min_lr": 1e-5}


def test_a_refused_flag_ends_the_program_with_code_2(train_words):
    output = launch(0, "train.py", *train_words, "--push_to_hub", "true", expect=2)
    assert "error: --push_to_hub true: " in output
    assert "Traceback" not in output


@pytest.fixture
def run(train_words, tmp_path):
    """run("name", *words) trains eight steps in a folder of that name; returns it."""

    def run(name: str, *words: str):
        folder = tmp_path / name
        more = ["--deepspeed", "ds_configs/cpu.json", "--max_steps", "8", "--num_progress_samples", "0"]
        train.main([*train_words, *more, "--output_dir", str(folder), *words])
        return folder

    return run


def test_flags_that_change_a_log(run):
    words = ["--lr_scheduler_type", "polynomial", "--lr_scheduler_kwargs", '{"lr_end": 5e-4, "power": 1.0}']
    words += ["--warmup_steps", "0", "--include_num_input_tokens_seen", "true", "--skip_memory_metrics", "false"]
    words += ["--eval_strategy", "steps", "--eval_steps", "2", "--eval_delay", "3", "--save_strategy", "best"]
    plain = history(run("plain", *words, "--metric_for_best_model", "perplexity"))
    rates = [line["learning_rate"] for line in plain if "learning_rate" in line]
    assert rates == pytest.approx([1e-3 - 5e-4 * step / 8 for step in range(1, 9)])
    assert all("num_input_tokens_seen" in line for line in plain if "loss" in line)
    assert [line["step"] for line in plain if "eval_loss" in line][:2] == [0, 4]
    losses = [line["loss"] for line in plain if "loss" in line]
    for changed in (
        ["--adam_beta1", "0.5"],
        ["--adam_beta2", "0.5"],
        ["--adam_epsilon", "0.1"],
        ["--max_grad_norm", "0.01"],
        ["--data_seed", "7"],
        ["--train_sampling_strategy", "sequential"],
    ):
        log = history(run(changed[0].strip("-") + "-run", *words, *changed))
        assert [line["loss"] for line in log if "loss" in line] != losses, changed
    log = history(run("epochs", "--logging_strategy", "epoch", "--logging_first_step", "false"))
    assert sum("loss" in line for line in log) == 2


def test_flags_that_only_must_not_disturb(run):
    """All at once: the run comes to its end with the results of a run without them."""
    words = [
        "--run_name",
        "mine",
        "--log_level",
        "error",
        "--log_level_replica",
        "error",
        "--log_on_each_node",
        "false",
    ]
    words += ["--torch_empty_cache_steps", "2", "--full_determinism", "true", "--dataloader_num_workers", "1"]
    words += ["--dataloader_prefetch_factor", "3", "--dataloader_persistent_workers", "true"]
    words += ["--dataloader_multiprocessing_context", "fork", "--dataloader_pin_memory", "false", "--do_train", "true"]
    words += ["--activation_checkpointing", "true", "--activation_checkpointing_kwargs", '{"use_reentrant": false}']
    words += ["--prediction_loss_only", "true", "--debug", "underflow_overflow", "--load_best_model_at_end", "true"]
    words += ["--average_tokens_across_devices", "false", "--logging_nan_inf_filter", "true", "--tf32", "false"]
    expected, found = results(run("plain")), results(run("flags", *words))
    assert found["eval_loss"] == pytest.approx(expected["eval_loss"], rel=1e-5)
    assert found["saved_step"] == expected["saved_step"]


DEEPSPEED_FILE = {"zero_optimization": {"stage": 0}}


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
def test_a_deepspeed_file_that_contradicts_a_flag(parse, block, message):
    with pytest.raises(UserError, match=message):
        parse("--deepspeed", json.dumps(DEEPSPEED_FILE | block))


def test_what_a_deepspeed_file_leaves_out_follows_the_flags(parse):
    args = parse("--deepspeed", json.dumps(DEEPSPEED_FILE | {"optimizer": {"type": "AdamW"}}), "--adam_beta1", "0.8")
    config = args.hf_deepspeed_config.config
    assert config["gradient_clipping"] == 1.0
    assert config["train_micro_batch_size_per_gpu"] == 16
    assert config["optimizer"]["params"] == {"lr": 5e-4, "betas": [0.8, 0.999], "eps": 1e-8, "weight_decay": 0.01}
