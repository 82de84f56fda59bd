"""The longest runs of words that samples share with training texts are those of brute force."""

import pytest
from conftest import random_texts

from neoflix.judging.novelty import TrainingTexts


def longest_by_brute_force(sample: list[str], texts: list[list[str]]) -> int:
    runs = {tuple(words[i:j]) for words in texts for i in range(len(words)) for j in range(i + 1, len(words) + 1)}
    mine = [sample[i:j] for i in range(len(sample)) for j in range(i + 1, len(sample) + 1)]
    return max((len(run) for run in mine if tuple(run) in runs), default=0)


@pytest.mark.parametrize("num_words", [2, 5, 40])
def test_longest_runs_are_those_of_brute_force(num_words):
    texts, samples = random_texts(30, num_words, 1), [*random_texts(60, num_words + 2, 2), [], ["new"]]
    longest, novel_trigrams = TrainingTexts([" ".join(words) for words in texts]).common_runs(samples)
    assert longest.tolist() == [longest_by_brute_force(sample, texts) for sample in samples]
    known = {three for words in texts for three in zip(words, words[1:], words[2:], strict=False)}
    mine = [three for words in samples for three in zip(words, words[1:], words[2:], strict=False)]
    assert novel_trigrams == pytest.approx(sum(three not in known for three in mine) / len(mine))


def test_runs_end_where_texts_end():
    """Neither does a run go from one training text into the next, nor from one sample into the next."""
    training = TrainingTexts(["a b c", "d e f", "a b c d"])
    longest, _ = training.common_runs(["c d e".split(), "e f".split(), "a b".split(), "b c d e".split()])
    assert longest.tolist() == [2, 2, 2, 3]
