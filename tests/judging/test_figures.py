"""Figures of samples by hand, and their table."""

import re

import pytest

from neoflix.judging.figures import judge, judgement_table
from neoflix.judging.novelty import TrainingTexts

TWELVE = "a retired pilot finds one last letter under the ice and flies"
UNSPACED = (
    "年轻的厨师回到了海边的小镇从此改变了全家人的命运在冬天",
    "引退したパイロットが氷の下で最後の手紙を見つけて飛び立つ。",
    "นักบินเกษียณพบจดหมายฉบับสุดท้ายใต้น้ำแข็งแล้วบินไป",
)


def test_texts_without_spaces_are_judged_in_characters():
    training = TrainingTexts([*UNSPACED, "第10个冬天", "a b"])
    found = judge(["两年轻的厨师了", "第10个夏天"], training, no_perplexity="none here")
    assert (found.unit, found.unknown_words) == ("characters", None)
    assert (found.samples.mean_words, found.longest_run) == ((7 + 5) / 2, 5)
    table = judgement_table(found)
    assert re.search("longest run .*5 characters, mean 4.0", table)
    assert re.search("words outside the vocabulary +not measured: ", table)
    assert re.search("mean length, characters +6.0", table)
    found = judge(["一 b c"], TrainingTexts(["a b", "一"]), no_perplexity="none here")
    assert (found.unit, found.unknown_words) == ("words", 1 / 3), "most of the texts' words are words"


def test_judgement_by_hand():
    training = TrainingTexts([TWELVE, "the mayor of a small town learns to swim"])
    samples = [
        TWELVE.title(),
        " ".join([*TWELVE.split()[:11], "sinks"]),
        "the mayor of the ice learns quibbling",
        "",
    ]
    found = judge(samples, training, ended=0.75, no_perplexity="none here")
    assert (found.copies, found.near_twins, found.novel) == (0.25, 0.5, 0.5)
    assert (found.longest_run, found.mean_longest_run) == (12, (12 + 11 + 3) / 4)
    assert found.unknown_words == 2 / 31, "sinks, quibbling"
    assert found.novel_trigrams == pytest.approx(5 / 25), "one with sinks, four of the mayor's five"
    assert (found.samples.mean_words, found.texts.mean_words) == (31 / 4, 21 / 2)
    assert (found.samples.num_texts, found.texts.num_texts, found.num_training_texts) == (4, 2, 2)
    assert (found.ended, found.no_perplexity, found.samples.perplexity) == (0.75, "none here", None)


def test_nothing_to_judge():
    with pytest.raises(ValueError, match="no training text"):
        TrainingTexts([])
    with pytest.raises(ValueError, match="no sample"):
        judge([], TrainingTexts([TWELVE]))
    found = judge(["", ""], TrainingTexts([TWELVE]))
    assert (found.novel, found.longest_run, found.unknown_words) == (1.0, 0, 0.0)
