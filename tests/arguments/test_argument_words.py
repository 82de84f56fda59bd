"""Words that a flag does not have."""

import pytest

from neoflix.arguments.words import check_report_to, read_objects
from neoflix.runtime.errors import UserError


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
def test_words_that_are_refused(demo_flags, words):
    with pytest.raises(UserError, match=words[0]) as error:
        demo_flags(*words)
    assert "\n" not in str(error.value)


def test_words_that_are_valid(demo_flags, demo_args):
    assert demo_flags("--resume_from_checkpoint", "false").resume_from_checkpoint is None
    assert demo_args("--metric_for_best_model", "perplexity").greater_is_better is False
    assert demo_flags("--load_best_model_at_end", "true", "--remove_unused_columns", "false").output_dir
    assert demo_args("--save_strategy", "best").save_strategy == "best"
    schedule = demo_flags("--lr_scheduler_type", "cosine_with_min_lr", "--lr_scheduler_kwargs", '{"min_lr": 1e-5}')
    assert schedule.lr_scheduler_kwargs == {"min_lr": 1e-5}


def test_programs_for_curves():
    check_report_to("none")
    check_report_to(["all"])
    check_report_to(["tensorboard"])
    with pytest.raises(UserError, match=r"--report_to tensorbord: .*'tensorboard'"):
        check_report_to(["tensorbord"])
    with pytest.raises(UserError, match="pip install"):
        check_report_to("clearml")


def test_objects_are_read(demo_flags):
    flags = demo_flags("--lr_scheduler_type", "cosine_with_min_lr", "--lr_scheduler_kwargs", '{"min_lr": 1e-5}')
    assert read_objects(flags) == {"lr_scheduler_kwargs": {"min_lr": 1e-5}}
