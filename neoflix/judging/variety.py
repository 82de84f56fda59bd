"""How varied texts are: distinct n-grams, self-BLEU, lengths."""

from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from math import exp, log

import numpy as np

from neoflix.judging.novelty import _extend, _WordArrays, some

SELF_BLEU_TEXTS = 1000  # self-BLEU rises with the number of texts: only equal numbers compare


@dataclass(frozen=True)
class Style:
    """Figures of a set of texts, the samples or as many training texts; `perplexity` is the base model's.

    Words are characters where the training texts are measured in them (`Judgement.unit`).
    """

    num_texts: int
    mean_words: float
    distinct_1: float
    distinct_2: float
    distinct_3: float
    self_bleu: float | None
    perplexity: float | None = None


def style_of(texts: Sequence[Sequence[str]], perplexity: float | None = None) -> Style:
    """Measures texts that are given as their words."""
    return Style(
        len(texts),
        sum(map(len, texts)) / max(len(texts), 1),
        *distinct(texts),
        self_bleu(some(texts, SELF_BLEU_TEXTS)),
        perplexity,
    )


def distinct(texts: Sequence[Sequence[str]]) -> tuple[float, float, float]:
    """Different runs of 1, 2 and 3 words over all such runs, of all texts together: 1 where none comes twice.

    After Li et al. 2016, https://arxiv.org/abs/1510.03055. It falls with the number of texts.
    """
    vocabulary: dict[str, int] = {}
    ids = [vocabulary.setdefault(word, len(vocabulary)) for words in texts for word in words]
    arrays = _WordArrays(ids, [len(words) for words in texts])
    at, names, shares = np.arange(len(ids)), arrays.ids_W.astype(np.int64), []
    for length in (1, 2, 3):
        at, keys = _extend(arrays, at, names, length, len(vocabulary)) if length > 1 else (at, names)
        uniques, names = np.unique(keys, return_inverse=True)
        shares.append(len(uniques) / max(len(keys), 1))
    return tuple(shares)


def self_bleu(texts: Sequence[Sequence[str]]) -> float | None:
    """Mean BLEU-4 of each text with all others as its references, from 0 to 1: how alike texts are.

    None for fewer than two texts. Source: Zhu et al. 2018, https://arxiv.org/abs/1802.01886, whose program takes 0.1
    for a count of 0 (method 1 of Chen and Cherry 2014); a text of fewer than four words is measured by the runs it has.
    Of each run of words the two highest counts, and whose the highest is, are enough to leave a text out: linear in the
    number of texts.
    """
    if len(texts) < 2:
        return None
    counts = [[Counter(zip(*(words[i:] for i in range(n)), strict=False)) for n in (1, 2, 3, 4)] for words in texts]
    highest: dict[tuple, tuple[int, int, int]] = {}  # run of words: (highest count, whose, second highest)
    for owner, of_text in enumerate(counts):
        for run, count in chain.from_iterable(grams.items() for grams in of_text):
            best, whose, second = highest.get(run, (0, -1, 0))
            highest[run] = (count, owner, best) if count > best else (best, whose, max(second, count))
    lengths = sorted(map(len, texts))
    scores = [_bleu(owner, of_text, highest, lengths) for owner, of_text in enumerate(counts)]
    return sum(scores) / len(scores)


def _bleu(owner: int, of_text: list[Counter], highest: dict, lengths: list[int]) -> float:
    logs = []
    for grams in of_text:
        if not grams:
            break
        matched = 0
        for run, count in grams.items():
            best, whose, second = highest[run]
            matched += min(count, second if whose == owner else best)
        logs.append(log((matched or 0.1) / grams.total()))
    if not logs:
        return 0.0
    length = of_text[0].total()
    place = bisect_left(lengths, length)
    others = lengths[max(place - 1, 0) : place] + lengths[place + 1 : place + 2]  # the nearest ones but itself
    nearest = min(others, key=lambda other: abs(other - length))  # the shorter one of two as near
    return min(1.0, exp(1 - nearest / length)) * exp(sum(logs) / len(logs))
