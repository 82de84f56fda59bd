"""The table of flags, and `TrainArguments`, which inherits it."""

from dataclasses import MISSING, fields

import pytest
from conftest import ROOT
from transformers.trainer_utils import IntervalStrategy, SaveStrategy, SchedulerType

from neoflix.arguments.train_flags import GROUPS, PLAIN_VALUES, TrainFlags
from neoflix.arguments.training import TrainArguments
from neoflix.arguments.words import check_report_to

SHOWN = [name for names in GROUPS.values() for name in names.split()]


def test_each_flag_is_shown_once_and_has_a_help_text():
    names = {field.name for field in fields(TrainFlags)}
    assert len(SHOWN) == len(set(SHOWN))
    assert names - set(SHOWN) == {"gradient_checkpointing", "local_rank"}, "an older name, and the launcher's flag"
    assert set(SHOWN) <= names
    assert all(field.metadata["help"] for field in fields(TrainFlags))


def test_the_most_used_are_a_dozen():
    assert len(next(iter(GROUPS.values())).split()) <= 14


def test_train_arguments_have_the_same_defaults():
    ours = {field.name: field for field in fields(TrainArguments)}
    for field in fields(TrainFlags):
        assert ours[field.name].default == field.default
        assert ours[field.name].metadata == field.metadata


def test_plain_values_are_valid():
    """They are not checked again without transformers."""
    known = {
        "lr_scheduler_type": SchedulerType,
        "eval_strategy": IntervalStrategy,
        "save_strategy": SaveStrategy,
    }
    for name, enumeration in known.items():
        assert set(PLAIN_VALUES[name]) <= {word.value for word in enumeration}
    for value in PLAIN_VALUES["report_to"]:
        check_report_to(value)


@pytest.mark.parametrize("field", [f for f in fields(TrainFlags) if f.default is not MISSING], ids=lambda f: f.name)
def test_defaults_name_files_that_are_there(field):
    if str(field.default).startswith(str(ROOT)):
        assert (ROOT / field.default).is_file()
