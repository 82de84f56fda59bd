"""What samples are worth, in figures and as a table."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from neoflix.data.words import split_words
from neoflix.judging.novelty import NEAR_TWIN, TrainingTexts, some
from neoflix.judging.variety import SELF_BLEU_TEXTS, Style, style_of
from neoflix.runtime.errors import UserError


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
