"""Marks of texts that a model may have learned by heart."""

from typing import NamedTuple

from neoflix.judging.judge import read_training_texts
from neoflix.judging.novelty import TrainingTexts
from neoflix.runtime.console import say
from neoflix.runtime.errors import UserError


class Twin(NamedTuple):
    """A training text that a sample repeats, word by word (`is_copy`) or nearly."""

    is_copy: bool
    text: str


class Twins:
    """The training texts of a run, to look up which of them a sample repeats.

    Attributes:
        texts: the training texts; none if they cannot be read.
        problem: why they cannot be read, or None.
    """

    def __init__(self, texts: list[str], problem: str | None = None):
        self.texts, self.problem = texts, problem
        self._index = TrainingTexts(texts) if texts else None

    @classmethod
    def of_run(cls, args) -> "Twins":
        """Reads the data set that `generate.py`'s arguments name; nothing is downloaded. Prints why if that fails."""
        try:
            return cls(read_training_texts(args, download=False))
        except UserError as error:
            say(f"warning: copies of training texts are not marked: {error}")
            return cls([], str(error))

    def find(self, text: str) -> Twin | None:
        """The training text that this text is a copy of, or else its nearest near duplicate; None if it is new."""
        if self._index is None:
            return None
        copied = self._index.find_copied(text)
        number = self._index.find_near_duplicate(text) if copied is None else copied
        return None if number is None else Twin(copied is not None, self.texts[number])
