"""The split into train and validation texts, by a hash of each text."""

import hashlib
from typing import NamedTuple

from neoflix.data.template import Example
from neoflix.data.words import split_words
from neoflix.runtime.errors import UserError


class TextSplit(NamedTuple):
    """Texts to train on and held-out texts to evaluate on; duplicates never end up in both."""

    train: list[Example]
    validation: list[Example]


def split_texts(examples: list[Example], validation_fraction: float) -> TextSplit:
    """Splits by a hash of each text, so that duplicates stay together.

    The completion's words alone decide: not its row, seed, world size or prompt, and not letter case, spacing or
    punctuation. A larger fraction only adds to the validation side. Both sides get at least one text.

    Raises:
        UserError: if all texts are the same.
    """
    if validation_fraction == 0:
        return TextSplit(examples, [])
    ranks = [hash_words(example.completion) for example in examples]
    lowest, highest = min(ranks), max(ranks)
    if lowest == highest:
        raise UserError(
            "all texts are the same, and one distinct text cannot be both trained on and held out; use "
            "--validation_fraction 0"
        )
    is_held_out = [rank == lowest or (rank < validation_fraction and rank != highest) for rank in ranks]
    return TextSplit(
        train=[example for example, held_out in zip(examples, is_held_out, strict=True) if not held_out],
        validation=[example for example, held_out in zip(examples, is_held_out, strict=True) if held_out],
    )


def hash_words(text: str) -> float:
    """A number in [0, 1), evenly spread, that depends on a text's words alone."""
    digest = hashlib.blake2b(" ".join(split_words(text)).encode(), digest_size=6).digest()
    return int.from_bytes(digest, "big") / 2**48
