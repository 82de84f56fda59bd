"""Which settings differ between two records, and how that is reported."""

import pytest
from conftest import parse_train_args

from neoflix.checkpoints.same_run import (
    Difference,
    explain_refusal,
    find_differences,
    has_free_schedule,
    makes_longer,
    show,
)
from neoflix.runtime.errors import UserError

RECORD = {
    "model": "demo",
    "data": "tokens-1",
    "texts": {"validation_fraction": 0.1, "max_length": None},
    "arguments": {"learning_rate": 1e-3, "max_steps": -1, "num_train_epochs": 3, "lr_scheduler_type": "cosine"},
    "deepspeed": {"optimizer.type": "AdamW"},
}


def changed(**arguments) -> dict:
    return RECORD | {"arguments": RECORD["arguments"] | arguments}


def test_a_record_does_not_differ_from_itself():
    assert find_differences(RECORD, RECORD | {"lora": None}) == []


def test_settings_that_the_earlier_record_lacks_are_not_compared():
    older = {key: value for key, value in RECORD.items() if key != "deepspeed"}
    assert find_differences(older, changed(seed=7) | {"lora": None}) == []
    now = RECORD | {"lora": {"rank": 4}, "deepspeed": RECORD["deepspeed"] | {"bf16.enabled": True}}
    assert [each.setting for each in find_differences(RECORD, now)] == ["lora", "deepspeed bf16.enabled"]


def test_max_steps_decides_over_epochs():
    with_steps = changed(max_steps=5) | {"lora": None}
    more = with_steps | {"arguments": with_steps["arguments"] | {"num_train_epochs": 9}}
    assert find_differences(with_steps, more) == []


@pytest.mark.parametrize(("was", "now", "longer"), [(3, 4, True), (4, 3, False), (-1, 5, False), (5, -1, False)])
def test_only_a_greater_length_makes_a_run_longer(was, now, longer):
    assert makes_longer(Difference("max_steps", was, now)) == longer
    assert not makes_longer(Difference("warmup_steps", was, now))


def test_a_schedule_with_a_state_of_its_own_is_not_free():
    assert has_free_schedule(RECORD, RECORD)
    assert not has_free_schedule(RECORD, changed(lr_scheduler_type="reduce_lr_on_plateau"))
    refused = [Difference("learning_rate", 1e-3, 1e-4)]
    assert "--override_resumed learning_rate" in explain_refusal("checkpoint-4", RECORD, RECORD, refused, 4)
    plateau = changed(lr_scheduler_type="reduce_lr_on_plateau")
    assert "--override_resumed" not in explain_refusal("checkpoint-4", plateau, plateau, refused, 4)


def test_values_are_shown_as_they_are_typed():
    assert [show(value) for value in (None, 1e-9, 3, True, "x")] == ["unset", "1e-09", "3", "True", "x"]


def test_an_unknown_or_fixed_setting_is_not_overridden(train_words):
    for name in ("seed", "learning_rat"):
        with pytest.raises(UserError, match=f"--override_resumed {name}: this setting cannot change"):
            parse_train_args([*train_words, "--override_resumed", "weight_decay", name])
