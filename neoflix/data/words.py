"""Splits texts into words, by Unicode properties of their characters.

Two texts with the same words are duplicates, both when a data set is split and when samples are judged.
"""

import unicodedata

import regex

# Letters of scripts without spaces between words. lb=SA (Line_Break=Complex_Context) are the scripts of South East Asia
# that need a dictionary to find words: Thai, Lao, Khmer, Myanmar, Tai Le, New Tai Lue, Tai Tham, Tai Viet, Ahom.
_UNSPACED = r"[\p{lb=SA}\p{scx=Han}\p{scx=Hira}\p{scx=Kana}\p{Bopo}\p{Java}\p{Bali}]&&\p{L}"
_MARKS = r"\p{Mn}\p{Mc}"  # vowel signs and accents; enclosing marks, as in keycap emoji, belong to no word
_CHARACTER = regex.compile(rf"[{_UNSPACED}][{_MARKS}]*", regex.V1)
_LETTER_RUN = rf"[[\p{{L}}\p{{N}}]--[{_UNSPACED}]][[\p{{L}}\p{{N}}{_MARKS}]--[{_UNSPACED}]]*"
_UNIT = regex.compile(rf"{_CHARACTER.pattern}|{_LETTER_RUN}", regex.V1)
_ASCII_WORD = regex.compile(r"[a-z0-9]+")

# Invisible: soft hyphens, joiners, byte order marks, variation selectors. A zero-width space separates words.
_INVISIBLE = regex.compile(r"[\p{Default_Ignorable_Code_Point}--\u200b]+", regex.V1)
_VISIBLE = regex.compile(r"(?![\s\p{Cc}\p{Default_Ignorable_Code_Point}])\X")
_EMOJI_STYLE = regex.compile(r"[\ufe0e\ufe0f]")

# Letters that are also used as an apostrophe separate words. A tatweel only stretches an Arabic word.
_SAME_LETTERS = str.maketrans({"ʻ": "'", "ʼ": "'", "ـ": None})


def split_words(text: str) -> list[str]:
    """Splits a text into its words, in order: runs of letters, digits and their marks.

    Case, spacing, punctuation, compatibility forms (full width, ligatures) and the encoding of accents make no
    difference. In scripts without spaces between words, each character with its marks is a word. A text without letters
    and digits is split into its visible characters, such as emoji.
    """
    if text.isascii():  # most texts: three times faster
        words = _ASCII_WORD.findall(text.lower())
    else:
        text = unicodedata.normalize("NFKC", text)
        folded = text.casefold().replace("i\u0307", "i")  # casefold makes the Turkish capital İ an i and a dot
        folded = _INVISIBLE.sub("", folded.translate(_SAME_LETTERS))
        words = _UNIT.findall(unicodedata.normalize("NFKC", folded))
    return words or _VISIBLE.findall(_EMOJI_STYLE.sub("", text))


def is_character(word: str) -> bool:
    """Whether a word of `split_words` is one character: of a script without spaces, or neither letter nor digit."""
    return bool(_CHARACTER.fullmatch(word)) or not any(map(str.isalnum, word))
