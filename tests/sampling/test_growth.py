"""Texts while they grow, and when they are finished."""

import pytest

from neoflix.runtime.errors import UserError
from neoflix.sampling.sampler import Sampler


@pytest.fixture(scope="module")
def sampler(run_dir):
    return Sampler.load(run_dir, device="cpu")


def test_the_last_look_is_at_the_texts_that_sample_yields(sampler):
    for every in (0, 3600):
        *_, last = sampler.watch(["A young", "Two"], 2, seed=5, batch_size=3, every=every)
        assert last == list(sampler.sample(["A young", "Two"], 2, seed=5))


def test_texts_grow_side_by_side_from_look_to_look(sampler):
    looks = list(sampler.watch("A young", 3, seed=5, batch_size=2, every=0))
    assert len(looks) > 24
    for number in range(3):
        lengths = [look[number].num_tokens for look in looks]
        assert lengths == sorted(lengths)
        for look in looks:
            is_finished = look[number].num_tokens == lengths[-1]
            assert is_finished or look[number].finish_reason is None
            assert looks[-1][number].text.startswith(look[number].text.rstrip("\ufffd"))
    both = [sum(sample.num_tokens > 0 for sample in look) for look in looks]
    assert both[0] == 2, "as many texts as the batch has places"


def test_what_is_not_valid_is_refused_at_the_first_look(sampler):
    for words in ({"temperature": 0}, {"prompts": "word " * 300}, {"prompts": {"title": "A"}}):
        with pytest.raises(UserError):
            next(sampler.watch(**words))


def test_texts_that_are_left_out_are_not_grown(sampler):
    """`skip` costs nothing: a resumed file begins with its first missing text."""
    steps, texts = sampler._begin(dict.fromkeys(range(3), "A"), 5, 1, sampler.settings(max_new_tokens=4), skip=2)
    assert [text.index for text in texts] == [2]
    assert len(list(steps)) <= 4
