"""Every flag of Hugging Face's `TrainingArguments` works, or is refused by name."""

from dataclasses import MISSING, fields
from typing import get_type_hints

import pytest
from conftest import history, results
from forked import launch
from transformers import TrainingArguments

import train
from neoflix.arguments.refusals import NEEDS, REFUSED
from neoflix.arguments.training import TrainArguments
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
    "tests/training/test_parameter_groups.py": "weight_decay optim",
    "tests/planning/test_settings.py": "fp16",
    "test_flags_that_change_a_log": """logging_strategy logging_first_step lr_scheduler_kwargs adam_beta1 adam_beta2
        adam_epsilon max_grad_norm include_num_input_tokens_seen skip_memory_metrics data_seed train_sampling_strategy
        eval_delay metric_for_best_model greater_is_better""",
    "test_flags_that_only_must_not_disturb": """run_name log_level log_level_replica log_on_each_node
        torch_empty_cache_steps full_determinism dataloader_prefetch_factor dataloader_persistent_workers
        dataloader_multiprocessing_context dataloader_pin_memory activation_checkpointing_kwargs
        gradient_checkpointing_kwargs prediction_loss_only do_train debug load_best_model_at_end
        average_tokens_across_devices logging_nan_inf_filter tf32""",
    "arguments/test_argument_words.py": "torch_compile_mode torch_compile_backend optim_args optim_target_modules",
    "NEEDS: only with trackio": "project trackio_space_id trackio_bucket_id trackio_static_space_id",
    "tests/runs/test_recovery.py": "restore_callback_states_from_checkpoint",
    "tests/test_upload.py, tests/runs/test_push_to_hub.py": "push_to_hub hub_model_id hub_private_repo hub_token",
    "the launcher's": "local_rank ddp_timeout",
}
PROVEN = [name for names in WORKS.values() for name in names.split()]


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


@pytest.mark.parametrize("name", REFUSED)
def test_refused_flags_are_named(demo_flags, name):
    with pytest.raises(UserError, match=rf"--{name}\b") as error:
        demo_flags(f"--{name}={another_value(name)}")
    assert "\n" not in str(error.value)


@pytest.mark.process
def test_a_refused_flag_ends_the_program_with_code_2(train_words):
    output = launch(0, "train.py", *train_words, "--hub_always_push", "true", expect=2)
    assert "error: --hub_always_push true" in output
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
