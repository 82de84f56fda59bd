"""How good samples are: copies, near twins, long runs, variety, length, words that do not exist. It knows lists of
strings alone.

Case, spacing and punctuation make no text another one, as when a data set is split (words.py). Texts in scripts without
spaces between words are measured in characters.

Shapes: W words of all texts, laid end to end.
"""

import random
from array import array
from collections.abc import Iterable, Sequence

import numpy as np

from neoflix.data.words import is_character, split_words
from neoflix.runtime.errors import UserError

NEAR_TWIN = 0.7  # Jaccard index of two texts' sets of word trigrams, from which on they count as near twins


# 20 bands of 4: two texts at 0.7 share a band, and are compared, with probability 1 - (1 - 0.7^4)^20 = 99.6%. A band
# takes 100 bytes a text.
HASHES, BANDS = 80, 20


SEED = 0  # draws the texts where not all are looked at


def word_trigrams(words: Sequence[str]) -> set[str]:
    """Three words in a row each; none for a text of fewer than three."""
    return {" ".join(three) for three in zip(words, words[1:], words[2:], strict=False)}


def jaccard(one: set, other: set) -> float:
    """Size of the intersection over that of the union; 0 for two empty sets."""
    shared = len(one & other)
    return shared / max(len(one) + len(other) - shared, 1)


def some(texts: Sequence, num: int) -> list:
    """At most `num` of the texts, always the same ones, in their order."""
    chosen = random.Random(SEED).sample(range(len(texts)), min(num, len(texts)))
    return [texts[i] for i in sorted(chosen)]


class _WordArrays:
    """Texts as numbers: `ids_W`, `left_W` (words from here to the text's end), `owner_W` (which text)."""

    def __init__(self, ids: Sequence[int], lengths: Sequence[int]):
        self.ids_W = np.asarray(ids, dtype=np.int32)
        self.owner_W = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
        ends = np.cumsum(lengths, dtype=np.int32)
        self.left_W = np.repeat(ends, lengths) - np.arange(len(self.ids_W), dtype=np.int32)


class TrainingTexts:
    """What a model has learnt from, indexed once. 1,000,000 texts of 24 words take 33 CPU seconds and, with 100,000
    samples judged by them, 5.8 GiB at the peak (docs/sampling.md).

    Raises:
        UserError: where there is no text.
    """

    def __init__(self, texts: Iterable[str]):
        from rensa import RMinHashLSH  # here alone: training splits texts by their words, and does without it

        self.texts = []  # words, joined by spaces
        self.vocabulary: dict[str, int] = {}
        self._index = RMinHashLSH(threshold=NEAR_TWIN, num_perm=HASHES, num_bands=BANDS)
        ids, lengths = array("i"), array("i")
        for number, text in enumerate(texts):
            words = split_words(text)
            self.texts.append(" ".join(words))
            ids.extend([self.vocabulary.setdefault(word, len(self.vocabulary)) for word in words])
            lengths.append(len(words))
            if trigrams := word_trigrams(words):
                self._index.insert(number, _sketch(trigrams))
        if not self.texts:
            raise UserError("there is no training text to judge samples against")
        self._whole = set(self.texts)
        self._arrays = _WordArrays(ids, lengths)
        is_counted_alone = np.array([is_character(word) for word in self.vocabulary], dtype=bool)
        num_characters = int(is_counted_alone[self._arrays.ids_W].sum())
        # What most of the texts' words are: words, or characters of a script without spaces between words.
        self.unit = "characters" if 2 * num_characters > len(ids) else "words"

    def is_copy(self, text: str) -> bool:
        """Whether a training text has the same words in the same order."""
        return " ".join(split_words(text)) in self._whole

    def near_twin(self, text: str) -> int | None:
        """A training text, by its number, whose word trigrams are the text's to 0.7 or more (Jaccard index).

        Candidates share a band of MinHash values (Broder 1997, "On the resemblance and containment of documents");
        each is then compared trigram by trigram, so what is found is one; 4 in 1,000 at 0.7 are missed, fewer above.
        """
        trigrams = word_trigrams(split_words(text))
        if trigrams:
            for number in sorted(self._index.query(_sketch(trigrams))):
                if jaccard(trigrams, word_trigrams(self.texts[number].split())) >= NEAR_TWIN:
                    return number
        return None

    def is_novel(self, text: str) -> bool:
        """Neither a copy nor a near twin of a training text."""
        return not self.is_copy(text) and self.near_twin(text) is None

    def common_runs(self, samples: Sequence[Sequence[str]]) -> tuple[np.ndarray, float]:
        """Longest runs of words that a sample shares with a training text, exact.

        Runs of n words are numbered from those of n - 1: a run is its first n - 1 words, by number, and its last. A
        place whose run stands on one side only is dropped; what is left soon is little.

        Returns:
            words of each sample's longest run; and the share of the samples' word trigrams that no text has.
        """
        size = len(self.vocabulary)
        ids = [self.vocabulary.get(word, -1) for words in samples for word in words]
        mine, theirs = _WordArrays(ids, [len(words) for words in samples]), self._arrays
        longest = np.zeros(len(samples), dtype=np.int64)
        num_trigrams, num_known = int((mine.left_W >= 3).sum()), 0

        is_mine = np.zeros(size, dtype=bool)
        is_mine[mine.ids_W[mine.ids_W >= 0]] = True
        at_mine, at_theirs = np.flatnonzero(mine.ids_W >= 0), np.flatnonzero(is_mine[theirs.ids_W])
        names_mine, names_theirs = mine.ids_W[at_mine].astype(np.int64), theirs.ids_W[at_theirs].astype(np.int64)
        length = 1
        while len(at_mine):
            longest[mine.owner_W[at_mine]] = length
            num_known = len(at_mine) if length == 3 else num_known
            length += 1
            at_mine, keys_mine = _extend(mine, at_mine, names_mine, length, size)
            at_theirs, keys_theirs = _extend(theirs, at_theirs, names_theirs, length, size)
            names, numbers = np.unique(keys_mine, return_inverse=True)
            places = np.searchsorted(names, keys_theirs)
            is_shared = places < len(names)
            is_shared[is_shared] = names[places[is_shared]] == keys_theirs[is_shared]
            at_theirs, names_theirs = at_theirs[is_shared], places[is_shared]
            is_found = np.zeros(len(names), dtype=bool)
            is_found[names_theirs] = True
            at_mine, names_mine = at_mine[is_found[numbers]], numbers[is_found[numbers]]
        return longest, 1 - num_known / num_trigrams if num_trigrams else 1.0


def _sketch(trigrams: Iterable[str]):
    from rensa import RMinHash

    sketch = RMinHash(num_perm=HASHES, seed=SEED)
    sketch.update(list(trigrams))
    return sketch


def _extend(arrays: _WordArrays, at: np.ndarray, names: np.ndarray, length: int, size: int):
    """Runs that go on for a word: (where they start, keys). No two runs have one key: names and ids are below 2^31."""
    goes_on = arrays.left_W[at] >= length
    at, names = at[goes_on], names[goes_on]
    last = arrays.ids_W[at + length - 1]
    return at[last >= 0], (names * size + last)[last >= 0]
