"""Sampling settings: each default is valid, and has a rule."""

import pytest

from neoflix.arguments.sampling import SAMPLING_DEFAULTS, SAMPLING_RULES, check_sampling
from neoflix.runtime.errors import UserError


@pytest.mark.parametrize("name", SAMPLING_DEFAULTS)
def test_defaults_are_valid(name):
    assert name in SAMPLING_RULES
    check_sampling(f"--{name}", name, SAMPLING_DEFAULTS[name])


@pytest.mark.parametrize("name", SAMPLING_RULES)
def test_negative_numbers_are_refused_by_name(name):
    with pytest.raises(UserError, match=f"--{name} -1"):
        check_sampling(f"--{name} -1", name, -1)
