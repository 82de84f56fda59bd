"""Runs of words: texts as arrays of word ids, and the longest runs that two sets of texts share.

Shapes: W words of all texts, end to end.
"""

from collections.abc import Sequence

import numpy as np


class WordArrays:
    """Texts as arrays: `ids_W`, `left_W` (number of words up to the end of the text) and `owner_W` (index of the text).

    Args:
        ids: word ids of all texts, end to end; -1 for a word that has none.
        lengths: number of words of each text.
    """

    def __init__(self, ids: Sequence[int], lengths: Sequence[int]):
        self.num_texts = len(lengths)
        self.ids_W = np.asarray(ids, dtype=np.int32)
        self.owner_W = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
        ends = np.cumsum(lengths, dtype=np.int32)
        self.left_W = np.repeat(ends, lengths) - np.arange(len(self.ids_W), dtype=np.int32)


def extend_runs(arrays: WordArrays, starts: np.ndarray, names: np.ndarray, length: int, vocabulary_size: int):
    """Extends runs of `length - 1` words to `length` words, where their text goes on.

    Args:
        starts: where the runs start in `ids_W`.
        names: a number for each run; equal runs have equal numbers.

    Returns:
        (starts, keys) of the extended runs. A key combines the shorter run's name and the last word's id. Both are
        below 2^31, so no two different runs share a key.
    """
    goes_on = arrays.left_W[starts] >= length
    starts, names = starts[goes_on], names[goes_on]
    last = arrays.ids_W[starts + length - 1]
    return starts[last >= 0], (names * vocabulary_size + last)[last >= 0]


def find_common_runs(samples: WordArrays, texts: WordArrays, vocabulary_size: int) -> tuple[np.ndarray, int]:
    """The longest run of words that each sample shares with any of the texts. Exact.

    Runs of n words are identified by the number of their first n - 1 words and by their last word. A start whose run is
    in only one of the two sets is dropped, so few are left after some rounds.

    Returns:
        (words of each sample's longest run, number of the samples' trigrams that some text has)
    """
    longest = np.zeros(samples.num_texts, dtype=np.int64)
    is_in_samples = np.zeros(vocabulary_size, dtype=bool)
    is_in_samples[samples.ids_W[samples.ids_W >= 0]] = True
    ours, theirs = np.flatnonzero(samples.ids_W >= 0), np.flatnonzero(is_in_samples[texts.ids_W])
    our_names, their_names = samples.ids_W[ours].astype(np.int64), texts.ids_W[theirs].astype(np.int64)
    length, num_known_trigrams = 1, 0
    while len(ours):
        longest[samples.owner_W[ours]] = length
        num_known_trigrams = len(ours) if length == 3 else num_known_trigrams
        length += 1
        ours, our_keys = extend_runs(samples, ours, our_names, length, vocabulary_size)
        theirs, their_keys = extend_runs(texts, theirs, their_names, length, vocabulary_size)
        keys, numbers = np.unique(our_keys, return_inverse=True)
        places = np.searchsorted(keys, their_keys)
        is_shared = places < len(keys)
        is_shared[is_shared] = keys[places[is_shared]] == their_keys[is_shared]
        theirs, their_names = theirs[is_shared], places[is_shared]
        is_found = np.zeros(len(keys), dtype=bool)
        is_found[their_names] = True
        ours, our_names = ours[is_found[numbers]], numbers[is_found[numbers]]
    return longest, num_known_trigrams
