"""How varied texts are: distinct n-grams, self-BLEU, lengths."""

import random
from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from math import exp, log

import numpy as np

from neoflix.judging.word_runs import WordArrays, extend_runs

SELF_BLEU_TEXTS = 1000  # self-BLEU grows with the number of texts, so only equal numbers can be compared

SEED = 0


def choose_texts(texts: Sequence, num: int) -> list:
    """At most `num` of the texts, always the same ones, in their order."""
    chosen = random.Random(SEED).sample(range(len(texts)), min(num, len(texts)))
    return [texts[i] for i in sorted(chosen)]


@dataclass(frozen=True)
class Style:
    """Figures of a set of texts: the samples, or as many training texts.

    "Words" are characters if the training texts are measured in characters (`Judgement.unit`). `perplexity` is the base
    model's.
    """

    num_texts: int
    mean_words: float
    distinct_1: float
    distinct_2: float
    distinct_3: float
    self_bleu: float | None
    perplexity: float | None = None


def style_of(texts: Sequence[Sequence[str]], perplexity: float | None = None) -> Style:
    """Measures texts, each given as its words."""
    return Style(
        len(texts),
        sum(map(len, texts)) / max(len(texts), 1),
        *distinct(texts),
        self_bleu(choose_texts(texts, SELF_BLEU_TEXTS)),
        perplexity,
    )


def distinct(texts: Sequence[Sequence[str]]) -> tuple[float, float, float]:
    """distinct-1, 2 and 3: different runs of 1, 2 and 3 words, divided by all such runs, in all texts together.

    1 means that no run occurs twice. The figure falls with the number of texts. Source: Li et al. 2016,
    https://arxiv.org/abs/1510.03055.
    """
    vocabulary: dict[str, int] = {}
    ids = [vocabulary.setdefault(word, len(vocabulary)) for words in texts for word in words]
    arrays = WordArrays(ids, [len(words) for words in texts])
    starts, names, shares = np.arange(len(ids)), arrays.ids_W.astype(np.int64), []
    for length in (1, 2, 3):
        keys = names
        if length > 1:
            starts, keys = extend_runs(arrays, starts, names, length, len(vocabulary))
        uniques, names = np.unique(keys, return_inverse=True)
        shares.append(len(uniques) / max(len(keys), 1))
    return tuple(shares)


def self_bleu(texts: Sequence[Sequence[str]]) -> float | None:
    """Mean BLEU-4 of each text with all others as references, from 0 to 1: how similar the texts are to each other.

    None for fewer than two texts. Source: Zhu et al. 2018, https://arxiv.org/abs/1802.01886, whose program uses 0.1 for
    a count of 0 (method 1 of Chen and Cherry 2014). A text of fewer than four words is measured by the runs it has.
    Linear in the number of texts: the two highest counts of each run, and which text has the highest, are enough to
    leave any text out of its own references.
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
    others = lengths[max(place - 1, 0) : place] + lengths[place + 1 : place + 2]  # the nearest ones except itself
    nearest = min(others, key=lambda other: abs(other - length))  # the shorter one if two are as near
    return min(1.0, exp(1 - nearest / length)) * exp(sum(logs) / len(logs))
