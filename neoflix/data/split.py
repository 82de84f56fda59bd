"""The split into train and validation texts, by a hash of each text."""

import hashlib
from typing import NamedTuple

from neoflix.data.template import parts
from neoflix.data.words import split_words
from neoflix.runtime.errors import UserError


class TextSplit(NamedTuple):
    """Texts to learn from and texts to measure on; no text and no twin of one stands in both."""

    train: list[str]
    validation: list[str]


def split_texts(texts: list[str], validation_fraction: float) -> TextSplit:
    """Splits by content: a hash of each text decides, so twins stay together and nothing else matters.

    Row order, seed and world size do not move a text, nor does its prompt; a larger fraction only adds to the
    validation side. Letter case, spacing and punctuation do not make a text another one. Both sides get at least one
    text.
    """
    if validation_fraction == 0:
        return TextSplit(texts, [])
    ranks = [_rank(text) for text in texts]
    lowest, highest = min(ranks), max(ranks)
    if lowest == highest:
        raise UserError("all texts are the same: one distinct text cannot be both learnt from and measured on")
    is_held_out = [rank == lowest or (rank < validation_fraction and rank != highest) for rank in ranks]
    return TextSplit(
        train=[text for text, held_out in zip(texts, is_held_out, strict=True) if not held_out],
        validation=[text for text, held_out in zip(texts, is_held_out, strict=True) if held_out],
    )


def _rank(text: str) -> float:
    """A number in [0, 1) that depends on a text's words alone, spread evenly."""
    digest = hashlib.blake2b(" ".join(split_words(parts(text)[1])).encode(), digest_size=6).digest()
    return int.from_bytes(digest, "big") / 2**48
