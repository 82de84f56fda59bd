"""Words in many scripts; those of Latin texts are what they always were, so that no split of such texts moves."""

import csv
import re
import unicodedata

import pytest
from conftest import as_examples, netflix_csv

from neoflix.data.split import split_texts
from neoflix.data.words import is_character, split_words

HINDI = "एक युवा पुलिस अधिकारी मुंबई की गलियों में हिन्दी फ़िल्में ढूँढता है।"
# (text, its words)
WORDS = [
    ("The ICE, he said: it's 2024_x!", "the ice he said it s 2024 x"),
    ("Straße STRASSE straẞe ﬁn", "strasse strasse strasse fin"),
    ("İstanbul'da bir gün", "istanbul da bir gün"),
    ("Ｆｕｌｌ　ｗｉｄｔｈ　１２", "full width 12"),
    ("m̃a Ọ̀yọ́ co\u00adop zero\u200bwidth", "m̃a ọ̀yọ́ coop zero width"),
    ("it’s it＇s itʼs", "it s it s it s"),
    ("п'ять пʼять", "п ять п ять"),
    (HINDI, "एक युवा पुलिस अधिकारी मुंबई की गलियों में हिन्दी फ़िल्में ढूँढता है"),
    ("தமிழ் மொழி", "தமிழ் மொழி"),
    ("བོད་སྐད", "བོད སྐད"),
    ("كِتَاب كتـاب می\u200cروم", "كِتَاب كتاب میروم"),
    ("안녕하세요, 세계!", "안녕하세요 세계"),
    ("用iPhone拍：第10个冬天。", "用 iphone 拍 第 10 个 冬 天"),
    ("スーパー ｽｰﾊﾟｰ 時々", "ス ー パ ー ス ー パ ー 時 々"),
    ("สวัสดี ๑๒", "ส วั ส ดี ๑๒"),
    ("ສະບາຍດີ", "ສ ະ ບ າ ຍ ດີ"),
    ("ជំរាបសួរ", "ជំ រា ប សួ រ"),
    ("မြန်မာ", "မြ န် မာ"),
    ("🙂🙃", "🙂 🙃"),
    ("👨‍👩‍👧 👍🏽❤️❤ 🇩🇪🇫🇷", "👨‍👩‍👧 👍🏽 ❤ ❤ 🇩🇪 🇫🇷"),
    ("1️⃣ and 🙂", "1 and"),
    ("?!…", "? ! . . ."),
    (" \n", ""),
]


@pytest.mark.parametrize(("text", "words"), WORDS)
def test_words_of_many_scripts(text, words):
    normal = [unicodedata.normalize("NFKC", word) if re.search(r"\w", word) else word for word in words.split()]
    assert split_words(text) == normal
    for spelling in (unicodedata.normalize("NFC", text), unicodedata.normalize("NFD", text), f"\ufeff{text} "):
        assert split_words(spelling) == normal


def test_case_makes_no_difference():
    for text in ("Ça va? Ήταν ΝΎΧΤΑ", "Ярославль", "Ǆungla", "ǰ ŉ", "Der Fluß"):
        assert split_words(text.upper()) == split_words(text.lower()) == split_words(text)


def test_characters_are_told_from_words():
    assert all(map(is_character, split_words("第冬カなーน้สᦀ🙂❤️?")))
    assert not any(map(is_character, split_words("a1 ๑๒ 안녕 हिन्दी كِتَاب 10")))


def test_vowel_signs_tell_words_apart():
    assert len({tuple(split_words(word)) for word in ("कि", "की", "के", "को", "क")}) == 5


def test_texts_without_words_are_told_apart():
    texts = ["🙂🙃", "🙂🙂", "🏴\U000e0067\U000e0062\U000e0065\U000e007f", "🏴\U000e0067\U000e0062\U000e0073\U000e007f"]
    texts += ["...", "?!", "♪♪", *("🙂" * n + "🎬" for n in range(200))]
    assert len({tuple(split_words(text)) for text in texts}) == len(texts)
    held_out = split_texts(as_examples(texts), 0.5).validation
    assert 70 < len(held_out) < 140, "about half"


def test_words_of_latin_texts_are_what_they_were(titles):
    """Letters and digits of Python's `re`; a data set's split is drawn from these words."""

    def words_before(text: str) -> list[str]:
        return re.findall(r"[^\W_]+", unicodedata.normalize("NFKC", text).casefold())

    texts = [*titles, "Crème brûlée à la carte – “Señor Ñandú”, Łódź & Þórr’s 3½ km²", "Kapınar, ısı; x² + Ⅷ"]
    if path := netflix_csv():
        with path.open(encoding="utf-8", newline="") as file:
            texts += [row["description"] for row in csv.DictReader(file)]
    for text in texts:
        assert split_words(text) == words_before(text)
