"""How good samples are: copies, near twins, long runs, variety, length, words that do not exist. It knows lists of
strings alone.

Case, spacing and punctuation make no text another one, as when a data set is split (words.py). Texts in scripts without
spaces between words are measured in characters.

Shapes: W words of all texts, laid end to end.
"""

import random
from array import array
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from math import exp, log
from pathlib import Path

import numpy as np

from neoflix.errors import UserError
from neoflix.words import is_character, split_words

NEAR_TWIN = 0.7  # Jaccard index of two texts' sets of word trigrams, from which on they count as near twins
# 20 bands of 4: two texts at 0.7 share a band, and are compared, with probability 1 - (1 - 0.7^4)^20 = 99.6%. A band
# takes 100 bytes a text.
HASHES, BANDS = 80, 20
SELF_BLEU_TEXTS = 1000  # self-BLEU rises with the number of texts: only equal numbers compare
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


# ---- what texts are by themselves -----------------------------------------------------------------------


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


# ---- the judgement --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Judgement:
    """Samples beside what they were learnt from. Shares are of all samples, from 0 to 1, if not said otherwise."""

    samples: Style
    texts: Style  # as many training texts, or all where there are fewer
    num_training_texts: int
    copies: float
    near_twins: float  # copies of three words or more among them
    novel: float  # neither copy nor near twin
    longest_run: int  # units
    mean_longest_run: float  # units
    novel_trigrams: float  # of the samples' trigrams
    unknown_words: float | None  # of the samples' words; None where the unit is characters
    ended: float | None  # None where samples do not say
    no_perplexity: str = ""  # why there is none
    unit: str = "words"  # or "characters": what lengths, runs and trigrams are counted in


def judge(samples: Sequence[str], training: TrainingTexts, ended: float | None = None, **base) -> Judgement:
    """Measures samples against training texts.

    Args:
        ended: share of the samples that ended by themselves.
        base: `of_samples` and `of_texts`, perplexities under the base model, or `no_perplexity`: why there are none.

    Raises:
        UserError: where there is no sample.
    """
    if not samples:
        raise UserError("there is no sample to judge")
    words = [split_words(text) for text in samples]
    is_copy = np.array([" ".join(each) in training._whole for each in words])
    has_twin = np.array([training.near_twin(text) is not None for text in samples])
    longest, novel_trigrams = training.common_runs(words)
    num_unknown = sum(word not in training.vocabulary for each in words for word in each)
    has_words = training.unit == "words"
    return Judgement(
        samples=style_of(words, base.get("of_samples")),
        texts=style_of([text.split() for text in some(training.texts, len(samples))], base.get("of_texts")),
        num_training_texts=len(training.texts),
        copies=float(is_copy.mean()),
        near_twins=float(has_twin.mean()),
        novel=float((~is_copy & ~has_twin).mean()),
        longest_run=int(longest.max()),
        mean_longest_run=float(longest.mean()),
        novel_trigrams=novel_trigrams,
        unknown_words=num_unknown / max(sum(map(len, words)), 1) if has_words else None,
        ended=ended,
        no_perplexity=base.get("no_perplexity", ""),
        unit=training.unit,
    )


def judgement_table(judgement: Judgement, base_name: str = "the base model") -> str:
    """The figures, a line each: of the samples, and where they have one, of the training texts."""
    samples, texts = judgement.samples, judgement.texts
    longer = f" ({samples.mean_words / texts.mean_words - 1:+.0%})" if texts.mean_words else ""
    unit = judgement.unit
    run = f"{judgement.longest_run} {unit}, mean {judgement.mean_longest_run:.1f}"
    unknown = "not measured: the texts have no spaces between words"
    rows = [
        (
            "",
            f"{samples.num_texts:,} samples",
            f"{texts.num_texts:,} of {judgement.num_training_texts:,} training texts",
        ),
        (f"a training text, {unit[:-1]} for {unit[:-1]}", f"{judgement.copies:.1%}", ""),
        (f"near twins (trigram Jaccard >= {NEAR_TWIN})", f"{judgement.near_twins:.1%}", ""),
        ("novel: neither", f"{judgement.novel:.1%}", ""),
        ("longest run shared with a text", run, ""),
        ("trigrams that no text has", f"{judgement.novel_trigrams:.1%}", ""),
        ("words outside the vocabulary", _share(judgement.unknown_words, unknown), ""),
        ("distinct-1, 2, 3", *(f"{s.distinct_1:.3f} {s.distinct_2:.3f} {s.distinct_3:.3f}" for s in (samples, texts))),
        (f"self-BLEU (at most {SELF_BLEU_TEXTS:,} texts)", _number(samples.self_bleu, 3), _number(texts.self_bleu, 3)),
        (f"mean length, {unit}", f"{samples.mean_words:.1f}{longer}", f"{texts.mean_words:.1f}"),
        ("ended by themselves", _share(judgement.ended, "not recorded"), ""),
        (f"perplexity under {base_name}", _number(samples.perplexity, 1), _number(texts.perplexity, 1)),
    ]
    if judgement.no_perplexity:
        rows[-1] = ("perplexity under the base model", f"not measured: {judgement.no_perplexity}", "")
    width = max(len(label) for label, *_ in rows)
    return "\n".join(f"{label:<{width}}  {of_samples:<26}{of_texts}".rstrip() for label, of_samples, of_texts in rows)


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def _share(value: float | None, missing: str = "-") -> str:
    return missing if value is None else f"{value:.1%}"


# ---- sweeps ---------------------------------------------------------------------------------------------

SWEEP_COLUMNS = (
    ("copies", lambda j: f"{j.copies:.1%}"),
    ("twins", lambda j: f"{j.near_twins:.1%}"),
    ("longest", lambda j: str(j.longest_run)),
    ("new trigrams", lambda j: f"{j.novel_trigrams:.1%}"),
    ("unknown words", lambda j: _share(j.unknown_words)),
    ("distinct-2", lambda j: f"{j.samples.distinct_2:.3f}"),
    ("self-BLEU", lambda j: _number(j.samples.self_bleu, 3)),
    ("length", lambda j: f"{j.samples.mean_words:.1f}"),
    ("ended", lambda j: _share(j.ended)),
    ("perplexity", lambda j: _number(j.samples.perplexity, 1)),
)


def sweep_header(width: int) -> str:
    """The first line of a sweep's table; `width`: of the longest setting's name."""
    return " " * width + "".join(f"{name:>{len(name) + 2}}" for name, _ in SWEEP_COLUMNS)


def sweep_line(name: str, judgement: Judgement, width: int) -> str:
    """One setting's line."""
    cells = (f"{show(judgement):>{len(column) + 2}}" for column, show in SWEEP_COLUMNS)
    return f"{name:<{width}}" + "".join(cells)


def draw_sweep(judgements: dict[str, Judgement], path: Path) -> bool:
    """Draws novelty (trigrams that no training text has) against fluency, a point for each setting, as PNG.

    Fluency is the base model's perplexity, low is up; where there is none, words of the training vocabulary. Returns
    False, and draws nothing, where neither was measured.
    """
    from matplotlib.figure import Figure  # half a second that only a sweep has to wait

    has_perplexity = all(judgement.samples.perplexity for judgement in judgements.values())
    if not has_perplexity and any(judgement.unknown_words is None for judgement in judgements.values()):
        return False
    figure = Figure(figsize=(8, 6), layout="constrained")
    axis = figure.subplots()
    axis.margins(x=0.25)  # room for names
    for name, judgement in judgements.items():
        fluency = judgement.samples.perplexity if has_perplexity else 1 - judgement.unknown_words
        point = (judgement.novel_trigrams, fluency)
        # An empty mark: some of the samples are copies or near twins.
        axis.plot(*point, "o", color="tab:blue", markerfacecolor="tab:blue" if judgement.novel == 1 else "white")
        axis.annotate(name, point, xytext=(6, 4), textcoords="offset points", fontsize=8)
    axis.set_xlabel("novelty: share of trigrams that no training text has")
    if has_perplexity:
        if text_perplexity := next(iter(judgements.values())).texts.perplexity:
            axis.axhline(text_perplexity, color="tab:gray", linestyle="--", label="training texts")
            axis.legend()
        axis.set_yscale("log")
        axis.invert_yaxis()
        axis.set_ylabel("fluency: perplexity under the base model (up is better)")
    else:
        axis.set_ylabel("fluency: share of words in the training vocabulary")
    axis.set_title("filled: every sample is novel; empty: copies or near twins among them", fontsize=9)
    figure.savefig(path, dpi=120)
    return True
