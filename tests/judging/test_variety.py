"""distinct-n and self-BLEU are their definitions."""

import math
from collections import Counter

import pytest
from conftest import random_texts

from neoflix.judging.variety import choose_texts, distinct, self_bleu


def test_distinct_by_hand():
    """7 words, 4 different; 5 pairs, 3 different; 3 triples, 2 different."""
    assert distinct(["a b c".split(), "a b c d".split()]) == (4 / 7, 3 / 5, 2 / 3)
    assert distinct([["a"], []]) == (1.0, 0.0, 0.0)


def bleu_by_definition(text: list[str], references: list[list[str]]) -> float:
    logs = []
    for n in range(1, 5):
        grams = Counter(tuple(text[i : i + n]) for i in range(len(text) - n + 1))
        if not grams:
            break
        of_references = [Counter(tuple(r[i : i + n]) for i in range(len(r) - n + 1)) for r in references]
        matched = sum(min(count, max(other[gram] for other in of_references)) for gram, count in grams.items())
        logs.append(math.log((matched or 0.1) / sum(grams.values())))
    if not logs:
        return 0.0
    nearest = min(map(len, references), key=lambda length: (abs(length - len(text)), length))
    brevity = 1.0 if len(text) >= nearest else math.exp(1 - nearest / len(text))
    return brevity * math.exp(sum(logs) / len(logs))


@pytest.mark.parametrize("num_words", [3, 30])
def test_self_bleu_is_its_definition(num_words):
    texts = [*random_texts(40, num_words, 3), ["a", "b"], ["a"]]
    scores = [bleu_by_definition(text, texts[:i] + texts[i + 1 :]) for i, text in enumerate(texts)]
    assert self_bleu(texts) == pytest.approx(sum(scores) / len(scores))


def test_self_bleu_of_known_sets():
    one = "two brothers open a bakery on the last train".split()
    assert self_bleu([one, one, one]) == pytest.approx(1.0)
    assert self_bleu([one]) is None
    texts = [one, "two brothers open a school on the last day".split(), "a school on the moon".split(), ["a", "b"]]
    # sacrebleu 2.6.0: BLEU(tokenize="none", smooth_method="floor", smooth_value=0.1, effective_order=True)
    assert self_bleu(texts) == pytest.approx(0.45157507, abs=1e-6)


def test_some_texts_are_always_the_same_and_in_order():
    assert choose_texts(range(100), 200) == list(range(100))
    chosen = choose_texts(range(100), 10)
    assert chosen == sorted(chosen) == choose_texts(range(100), 10)
    assert len(set(chosen)) == 10
