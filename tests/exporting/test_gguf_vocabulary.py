"""Tokenizers in GGUF files: which can be written, and what each token is."""

import json

import pytest
from gguf import TokenType
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

from neoflix.exporting.gguf_vocabulary import find_pre_tokenizer, find_type, list_never_sampled

BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False)
DIGITS = pre_tokenizers.Digits(individual_digits=True)


def saved(pre_tokenizer, normalizer=None, **model) -> dict:
    tokenizer = Tokenizer(models.BPE(vocab={"a": 0}, merges=[], **model))
    tokenizer.pre_tokenizer = pre_tokenizer
    if normalizer:
        tokenizer.normalizer = normalizer
    return json.loads(tokenizer.to_str())


def test_names_of_pre_tokenizers():
    assert find_pre_tokenizer(saved(BYTES), "RUN a") == "gpt-2"
    assert find_pre_tokenizer(saved(pre_tokenizers.ByteLevel(False, trim_offsets=False)), "RUN a") == "gpt-2"
    assert find_pre_tokenizer(saved(pre_tokenizers.Sequence([DIGITS, BYTES])), "RUN a") == "smollm"


@pytest.mark.parametrize(
    "tokenizer",
    [
        saved(pre_tokenizers.ByteLevel(add_prefix_space=True)),
        saved(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)),
        saved(pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(r"\d{1,3}"), "isolated"), BYTES])),
        saved(pre_tokenizers.Sequence([BYTES, DIGITS])),
        saved(pre_tokenizers.Metaspace()),
        saved(None),
        saved(BYTES, normalizers.NFC()),
        saved(BYTES, ignore_merges=True),
        saved(BYTES, byte_fallback=True),
        saved(BYTES, end_of_word_suffix="</w>"),
    ],
)
def test_other_tokenizers_are_refused(tokenizer):
    with pytest.raises(ValueError, match=r"RUN a: its tokenizer is not a byte-level BPE"):
        find_pre_tokenizer(tokenizer, "RUN a")


def test_kinds_of_tokens(tokenizer):
    tokenizer.add_tokens(["Meghalaya"])
    assert find_type(tokenizer, 40) == TokenType.NORMAL
    assert find_type(tokenizer, tokenizer.pad_token_id) == TokenType.CONTROL
    assert find_type(tokenizer, tokenizer.eos_token_id) == TokenType.CONTROL
    assert find_type(tokenizer, tokenizer.convert_tokens_to_ids("Meghalaya")) == TokenType.USER_DEFINED
    assert list_never_sampled(tokenizer) == [tokenizer.bos_token_id, tokenizer.pad_token_id]
