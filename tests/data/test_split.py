import random

import pytest
import torch
from conftest import as_examples

from neoflix.data.split import TextSplit, split_texts
from neoflix.data.template import Template
from neoflix.runtime.errors import UserError


def split_plain(texts: list[str], validation_fraction: float) -> TextSplit:
    """Splits texts without prompts."""
    split = split_texts(as_examples(texts), validation_fraction)
    return TextSplit(*([example.completion for example in side] for side in split))


def normalised(texts):
    return {"".join(c for c in text.casefold() if c.isalnum()) for text in texts}


def test_duplicates_never_end_up_on_both_sides(titles):
    duplicates = [text.upper().replace(",", " ,") for text in titles[::3]]
    split = split_plain(titles + duplicates + titles[::5], 0.3)
    assert not normalised(split.train) & normalised(split.validation)
    assert len(split.train) + len(split.validation) == len(titles) + len(duplicates) + len(titles[::5])


def test_split_does_not_depend_on_order_or_seed(titles):
    before = split_plain(titles, 0.1)
    shuffled = titles[:]
    for seed in (1, 2):
        random.seed(seed)
        torch.manual_seed(seed)
        random.shuffle(shuffled)
        after = split_plain(shuffled, 0.1)
        assert sorted(after.validation) == sorted(before.validation)
    assert split_plain(titles, 0.1).train == [text for text in titles if text not in set(before.validation)]


def test_split_has_the_asked_share_and_only_grows(titles):
    sizes = [len(split_plain(titles, fraction).validation) for fraction in (0.05, 0.1, 0.5)]
    assert 0.02 < sizes[0] / len(titles) < 0.1
    assert 0.4 < sizes[2] / len(titles) < 0.6
    assert set(split_plain(titles, 0.1).validation) <= set(split_plain(titles, 0.5).validation)
    assert split_plain(titles, 0) == TextSplit(titles, [])


@pytest.mark.parametrize("fraction", [0.001, 0.1, 0.999])
def test_both_sides_get_a_text(fraction):
    split = split_plain(["one", "two", "one"], fraction)
    assert sorted(map(len, split)) == [1, 2]
    assert not set(split.train) & set(split.validation)


def test_one_distinct_text_is_refused():
    with pytest.raises(UserError, match="--validation_fraction"):
        split_plain(["Same text.", "same  text"], 0.1)


def test_prompts_do_not_move_the_split(titles):
    template = Template("{title}: {description}")
    examples = [template.fill({"title": str(i), "description": text}) for i, text in enumerate(titles)]
    held_out = [example.completion.strip() for example in split_texts(examples, 0.2).validation]
    assert held_out == split_plain(titles, 0.2).validation
