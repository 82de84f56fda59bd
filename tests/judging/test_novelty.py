"""Copies and near duplicates are found, and nothing else is."""

import random
import unicodedata

import pytest

from neoflix.data.words import split_words
from neoflix.judging.novelty import NEAR_DUPLICATE, TrainingTexts, jaccard, word_trigrams

TWELVE = "a retired pilot finds one last letter under the ice and flies"


def test_copies_are_copies_in_any_spelling():
    training = TrainingTexts([TWELVE, "🙂 🙃", "One."])
    for copy in (TWELVE, f"  {TWELVE.upper()}!\n", TWELVE.replace(" ", ", "), "🙂  🙃", "one"):
        assert training.is_copy(copy)
        assert not training.is_novel(copy)
    for other in (TWELVE + " on", TWELVE[:-6], "", "🙂", "two"):
        assert not training.is_copy(other)


def test_near_duplicates_begin_at_seven_tenths():
    """12 words have 10 trigrams; their first 9 have 7 of these, their first 8 have 6."""
    training = TrainingTexts(["something else that has nothing to do with it", TWELVE])
    words = TWELVE.split()
    assert training.find_near_duplicate(" ".join(words[:9])) == 1
    assert training.find_near_duplicate(" ".join(words[:8])) is None
    assert training.find_near_duplicate(" ".join([*words[:11], "sinks"])) == 1, "9 of 11"
    assert training.find_near_duplicate(" ".join([*words[:5], "x", *words[6:]])) is None, "7 of 13"
    assert training.find_near_duplicate(" ".join(reversed(words))) is None
    assert training.find_near_duplicate("a retired") is None
    assert training.is_novel(" ".join(words[:8]))
    assert not training.is_novel(" ".join(words[:9]))


def test_the_training_text_that_a_sample_repeats_is_named():
    changed = TWELVE.replace("retired", "tired")
    training = TrainingTexts(["something else", changed, TWELVE, TWELVE.upper()])
    assert training.find_copied(TWELVE) == 2, "the first of two"
    assert training.find_copied(TWELVE + " on") is None
    assert training.find_near_duplicate(TWELVE + " on") == 2, "nearer than the one before it"
    assert training.find_near_duplicate(changed + " on") == 1


# Two texts that differ at their end, and one about something else: Chinese, Japanese, Thai, Hindi, Khmer, Arabic.
OTHER_LANGUAGES = [
    (
        "年轻的厨师回到了海边的小镇从此改变了全家人的命运在冬天",
        "年轻的厨师回到了海边的小镇从此改变了全家人的命运于冬天",
        "两个兄弟在火车上开了一家面包店",
    ),
    (
        "引退したパイロットが氷の下で最後の手紙を見つけて飛び立つ。",
        "引退したパイロットが氷の下で最後の手紙を見つけて泣く。",
        "小さな町の市長が泳ぎを学ぶ物語です",
    ),
    (
        "นักบินเกษียณพบจดหมายฉบับสุดท้ายใต้น้ำแข็งแล้วบินไป",
        "นักบินเกษียณพบจดหมายฉบับสุดท้ายใต้น้ำแข็งแล้วร้องไห้",
        "นายกเทศมนตรีเมืองเล็กเรียนว่ายน้ำ",
    ),
    (
        "एक सेवानिवृत्त पायलट को बर्फ़ के नीचे आख़िरी चिट्ठी मिलती है और वह उड़ता है",
        "एक सेवानिवृत्त पायलट को बर्फ़ के नीचे आख़िरी चिट्ठी मिलती है और वह रोता है",
        "छोटे शहर का मेयर तैरना सीखता है",
    ),
    ("អ្នកបើកយន្តហោះចូលនិវត្តន៍រកឃើញសំបុត្រចុងក្រោយក្រោមទឹកកក", "អ្នកបើកយន្តហោះចូលនិវត្តន៍រកឃើញសំបុត្រចុងក្រោយក្រោមផ្ទះ", "អភិបាលក្រុងតូចរៀនហែលទឹក"),
    (
        "طيار متقاعد يجد آخر رسالة تحت الجليد ثم يطير إلى البيت القديم",
        "طيار متقاعد يجد آخر رسالة تحت الجليد ثم يطير إلى البيت",
        "عمدة بلدة صغيرة يتعلم السباحة",
    ),
]


@pytest.mark.parametrize(("text", "twin", "other"), OTHER_LANGUAGES)
def test_near_duplicates_in_other_languages(text, twin, other):
    training = TrainingTexts([other, text])
    assert training.find_near_duplicate(twin) == 1
    assert not training.is_copy(twin)
    assert training.is_copy(f"« {unicodedata.normalize('NFD', text)} »")
    assert training.is_novel(other[: len(other) // 2] + text[: len(text) // 3])


def edited(text: str, num_edits: int, draw: random.Random) -> str:
    words = text.split()
    for _ in range(num_edits):
        words[draw.randrange(len(words))] = draw.choice(["otter", "sun", "mayor"])
    return " ".join(words)


def test_near_duplicates_are_those_of_brute_force(titles):
    draw = random.Random(0)
    samples = [edited(draw.choice(titles), num, draw) for num in (0, 1, 1, 2, 2, 3) for _ in range(150)]
    training = TrainingTexts(titles)
    all_trigrams = [word_trigrams(split_words(text)) for text in titles]
    found, missed = 0, 0
    for sample in samples:
        trigrams = word_trigrams(split_words(sample))
        true = {i for i, others in enumerate(all_trigrams) if jaccard(trigrams, others) >= NEAR_DUPLICATE}
        twin = training.find_near_duplicate(sample)
        assert twin is None or twin in true
        found, missed = found + (twin is not None), missed + (twin is None and bool(true))
    assert found > 300
    assert missed <= 0.01 * found
    assert found + missed < 850, "some are not near duplicates, and are not taken for one"
