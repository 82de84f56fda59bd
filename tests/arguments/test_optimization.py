"""Optimizer and schedule: what cannot be made is refused by its flag."""

import json

import pytest

from neoflix.runtime.errors import UserError


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--lr_scheduler_type", "greedy"], "--lr_scheduler_type greedy"),
        (["--lr_scheduler_type", "warmup_stable_decay"], "--lr_scheduler_type warmup_stable_decay"),
        (["--lr_scheduler_kwargs", '{"foo": 1}'], "--lr_scheduler_kwargs"),
        (["--optim", "sgd"], "--optim sgd"),
        (["--optim_args", "x=1"], "--optim_args x=1"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_what_cannot_be_made(demo_flags, words, part):
    with pytest.raises(UserError) as error:
        demo_flags(*words)
    assert part in str(error.value)


def test_without_an_optimizer_in_the_file_the_flag_chooses_it(demo_flags):
    plain = json.dumps({"zero_optimization": {"stage": 0}})
    assert demo_flags("--deepspeed", plain, "--optim", "sgd").optim == "sgd"
    offload = json.dumps({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}})
    with pytest.raises(UserError, match=r"--optim sgd.*offload"):
        demo_flags("--deepspeed", offload, "--optim", "sgd")
