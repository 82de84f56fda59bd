"""How new samples are: exact copies, near duplicates and shared runs of words.

Case, spacing and punctuation make no difference, as when a data set is split (`data/words.py`). Texts in scripts
without spaces between words are measured in characters.
"""

from array import array
from collections.abc import Iterable, Sequence

import numpy as np

from neoflix.data.words import is_character, split_words
from neoflix.judging.word_runs import WordArrays, find_common_runs
from neoflix.runtime.errors import UserError

NEAR_DUPLICATE = 0.7  # least Jaccard index of the word trigrams of two near duplicates

# 20 bands of 4: two texts at 0.7 share a band, and are compared, with probability 1 - (1 - 0.7^4)^20 = 99.6%. A band
# takes 100 bytes per text.
NUM_HASHES, NUM_BANDS = 80, 20

SEED = 0


def word_trigrams(words: Sequence[str]) -> set[str]:
    """All runs of three words; empty for a text with fewer than three."""
    return {" ".join(three) for three in zip(words, words[1:], words[2:], strict=False)}


def jaccard(one: set, other: set) -> float:
    """Size of the intersection divided by that of the union; 0 for two empty sets."""
    shared = len(one & other)
    return shared / max(len(one) + len(other) - shared, 1)


class TrainingTexts:
    """The texts that a model was trained on, indexed once.

    1,000,000 texts of 24 words take 33 CPU seconds and, with 100,000 samples to judge, 5.8 GiB at the peak
    (docs/sampling.md).

    Attributes:
        texts: the words of each text, joined by spaces.
        vocabulary: word -> id.
        unit: "words", or "characters" if most of the words are characters of a script without spaces between words.

    Raises:
        UserError: if there are no texts.
    """

    def __init__(self, texts: Iterable[str]):
        from rensa import RMinHashLSH  # imported here because training splits texts by their words without it

        self.texts = []
        self.vocabulary: dict[str, int] = {}
        self._index = RMinHashLSH(threshold=NEAR_DUPLICATE, num_perm=NUM_HASHES, num_bands=NUM_BANDS)
        ids, lengths = array("i"), array("i")
        self._first_with: dict[str, int] = {}  # whole text -> its index
        for number, text in enumerate(texts):
            words = split_words(text)
            self.texts.append(" ".join(words))
            self._first_with.setdefault(self.texts[-1], number)
            ids.extend([self.vocabulary.setdefault(word, len(self.vocabulary)) for word in words])
            lengths.append(len(words))
            if trigrams := word_trigrams(words):
                self._index.insert(number, _sketch(trigrams))
        if not self.texts:
            raise UserError("there is no training text to judge samples against")
        self._arrays = WordArrays(ids, lengths)
        is_counted_alone = np.array([is_character(word) for word in self.vocabulary], dtype=bool)
        num_characters = int(is_counted_alone[self._arrays.ids_W].sum())
        self.unit = "characters" if 2 * num_characters > len(ids) else "words"

    def find_copied(self, text: str) -> int | None:
        """Index of the first training text with the same words in the same order; or None."""
        return self._first_with.get(" ".join(split_words(text)))

    def is_copy(self, text: str) -> bool:
        """Whether a training text has the same words in the same order."""
        return self.find_copied(text) is not None

    def find_near_duplicate(self, text: str) -> int | None:
        """Index of the training text whose word trigrams have the highest Jaccard index with this text's, the first of
        several; None if that is below 0.7.

        Candidates share a band of MinHash values (Broder 1997, "On the resemblance and containment of documents") and
        are then compared trigram by trigram. So every hit is right; 4 in 1,000 at exactly 0.7 are missed, fewer above.
        """
        trigrams = word_trigrams(split_words(text))
        if not trigrams:
            return None
        candidates = sorted(self._index.query(_sketch(trigrams)))
        overlaps = [jaccard(trigrams, word_trigrams(self.texts[number].split())) for number in candidates]
        highest = max(overlaps, default=0.0)
        return candidates[overlaps.index(highest)] if highest >= NEAR_DUPLICATE else None

    def is_novel(self, text: str) -> bool:
        """Whether a text is neither a copy nor a near duplicate of a training text."""
        return not self.is_copy(text) and self.find_near_duplicate(text) is None

    def common_runs(self, samples: Sequence[Sequence[str]]) -> tuple[np.ndarray, float]:
        """Longest runs of words that samples share with a training text. Exact.

        Args:
            samples: each as its words.

        Returns:
            (words of each sample's longest run, share of the samples' word trigrams that no training text has)
        """
        ids = [self.vocabulary.get(word, -1) for words in samples for word in words]
        arrays = WordArrays(ids, [len(words) for words in samples])
        longest, num_known = find_common_runs(arrays, self._arrays, len(self.vocabulary))
        num_trigrams = int((arrays.left_W >= 3).sum())
        return longest, 1 - num_known / num_trigrams if num_trigrams else 1.0


def _sketch(trigrams: Iterable[str]):
    from rensa import RMinHash

    sketch = RMinHash(num_perm=NUM_HASHES, seed=SEED)
    sketch.update(list(trigrams))
    return sketch
