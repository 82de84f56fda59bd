"""Numbers that no run can use."""

from dataclasses import fields
from types import SimpleNamespace

import pytest

from neoflix.arguments.training import TrainArguments
from neoflix.arguments.values import NUMBER_RULES, as_typed, check_numbers
from neoflix.runtime.errors import UserError


def test_rules_are_of_flags():
    assert NUMBER_RULES.keys() <= {field.name for field in fields(TrainArguments)}


@pytest.mark.parametrize("name", NUMBER_RULES)
@pytest.mark.parametrize("value", ["-7", "nan"])
def test_numbers_that_no_run_can_use(demo_flags, name, value):
    """argparse refuses `nan` for whole numbers, and names the flag as well."""
    with pytest.raises(UserError, match=f"--{name}"):
        demo_flags(f"--{name}={value}")


def test_numbers_that_are_not_set_are_skipped():
    check_numbers(SimpleNamespace(seed=None))
    with pytest.raises(UserError, match="--seed -1"):
        check_numbers(SimpleNamespace(seed=-1))


def test_flags_are_shown_as_typed():
    assert as_typed("lora", True) == "--lora true"
    assert as_typed("learning_rate", 1e-5) == "--learning_rate 1e-05"
    assert as_typed("dataset", "x.csv") == "--dataset x.csv"
