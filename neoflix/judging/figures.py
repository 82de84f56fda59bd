"""The figures of a set of samples, and their table."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from neoflix.data.words import split_words
from neoflix.judging.novelty import NEAR_DUPLICATE, TrainingTexts
from neoflix.judging.variety import SELF_BLEU_TEXTS, Style, choose_texts, style_of
from neoflix.runtime.errors import UserError


@dataclass(frozen=True)
class Judgement:
    """Samples compared with the training texts. By default a figure is a share of all samples, from 0 to 1."""

    samples: Style
    texts: Style  # as many training texts, or all if there are fewer
    num_training_texts: int
    copies: float
    near_twins: float  # near duplicates, which include copies of three words or more; files of figures have this name
    novel: float  # neither copy nor near duplicate
    longest_run: int  # units
    mean_longest_run: float  # units
    novel_trigrams: float  # of the samples' trigrams
    unknown_words: float | None  # of the samples' words; None if the unit is characters
    ended: float | None  # None if the samples have no finish_reason
    no_perplexity: str = ""  # why perplexity was not measured
    unit: str = "words"  # or "characters": the unit of lengths, runs and trigrams


def judge(samples: Sequence[str], training: TrainingTexts, ended: float | None = None, **base) -> Judgement:
    """Measures samples against training texts.

    Args:
        ended: share of the samples that ended with the end token.
        base: perplexities under the base model, `of_samples` and `of_texts`, or `no_perplexity`, why there are none.

    Raises:
        UserError: if there are no samples.
    """
    if not samples:
        raise UserError("there is no sample to judge")
    words = [split_words(text) for text in samples]
    is_copy = np.array([training.is_copy(text) for text in samples])
    is_near = np.array([training.find_near_duplicate(text) is not None for text in samples])
    longest, novel_trigrams = training.common_runs(words)
    num_unknown = sum(word not in training.vocabulary for each in words for word in each)
    has_words = training.unit == "words"
    return Judgement(
        samples=style_of(words, base.get("of_samples")),
        texts=style_of([text.split() for text in choose_texts(training.texts, len(samples))], base.get("of_texts")),
        num_training_texts=len(training.texts),
        copies=float(is_copy.mean()),
        near_twins=float(is_near.mean()),
        novel=float((~is_copy & ~is_near).mean()),
        longest_run=int(longest.max()),
        mean_longest_run=float(longest.mean()),
        novel_trigrams=novel_trigrams,
        unknown_words=num_unknown / max(sum(map(len, words)), 1) if has_words else None,
        ended=ended,
        no_perplexity=base.get("no_perplexity", ""),
        unit=training.unit,
    )


def judgement_table(judgement: Judgement, base_name: str = "the base model") -> str:
    """The figures as a table: of the samples, and of as many training texts if they have the figure."""
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
        ("copies of training texts", f"{judgement.copies:.1%}", ""),
        (f"near duplicates (trigram Jaccard >= {NEAR_DUPLICATE})", f"{judgement.near_twins:.1%}", ""),
        ("novel (neither)", f"{judgement.novel:.1%}", ""),
        ("longest run in a training text", run, ""),
        ("new trigrams", f"{judgement.novel_trigrams:.1%}", ""),
        ("words outside the vocabulary", format_share(judgement.unknown_words, unknown), ""),
        ("distinct-1, 2, 3", *(f"{s.distinct_1:.3f} {s.distinct_2:.3f} {s.distinct_3:.3f}" for s in (samples, texts))),
        (
            f"self-BLEU (at most {SELF_BLEU_TEXTS:,} texts)",
            format_number(samples.self_bleu, 3),
            format_number(texts.self_bleu, 3),
        ),
        (f"mean length, {unit}", f"{samples.mean_words:.1f}{longer}", f"{texts.mean_words:.1f}"),
        ("ended by themselves", format_share(judgement.ended, "not recorded"), ""),
        (f"perplexity under {base_name}", format_number(samples.perplexity, 1), format_number(texts.perplexity, 1)),
    ]
    if judgement.no_perplexity:
        rows[-1] = ("perplexity under the base model", f"not measured: {judgement.no_perplexity}", "")
    width = max(len(label) for label, *_ in rows)
    return "\n".join(f"{label:<{width}}  {of_samples:<26}{of_texts}".rstrip() for label, of_samples, of_texts in rows)


def format_number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def format_share(value: float | None, missing: str = "-") -> str:
    return missing if value is None else f"{value:.1%}"
