"""What docs/how-it-works.md shows of one text is what the code makes of it; the tests that it names are there."""

import re

import pytest
import torch
from conftest import ROOT

from neoflix.data.packing import PackedCollator
from neoflix.data.sources import find_dataset, read_examples
from neoflix.data.split import hash_words, split_texts
from neoflix.data.template import Example, Template
from neoflix.data.tokens import fill_up, name_tokens, tokenize_texts
from neoflix.data.words import split_words
from neoflix.model.load import find_tokenizer
from neoflix.sampling.draw import gumbel_noise, stream_keys

PAGE = " ".join((ROOT / "docs" / "how-it-works.md").read_text(encoding="utf-8").split())


@pytest.fixture(scope="module")
def road(tmp_path_factory):
    """(all texts, their split, the demo's tokenizer, tokens of the texts to learn from), by the page's command."""
    cache = tmp_path_factory.mktemp("cache")
    template = Template(re.search(r"--template '(.+?)'", PAGE)[1])
    texts = read_examples(find_dataset("sample"), None, template)
    split = split_texts(texts, 0.1)
    tokenizer = find_tokenizer("demo", split.train, cache, template)
    return texts, split, tokenizer, tokenize_texts(split.train, tokenizer, 512, cache).dataset


def number_of(texts: list[Example], words: str) -> int:
    return next(number for number, text in enumerate(texts) if words in text.whole)


def test_the_text_and_its_side(road):
    texts, split, _, _ = road
    text = texts[number_of(texts, "Corridor 14")]
    prompt, learnt, _ = text
    assert f"{prompt} the prompt" in PAGE
    assert f"{learnt} the text" in PAGE
    assert f"after {len(prompt)} characters" in PAGE
    assert " ".join(split_words(learnt)) in PAGE
    assert f"**{hash_words(learnt):.4f}**" in PAGE
    assert text in split.train
    other = split.validation[number_of(split.validation, "Check-in is at six")]
    assert f"{other.completion.strip()}* has {hash_words(other.completion):.4f}" in PAGE
    assert f"Of {len(texts)} texts {len(split.train)} are learnt from, {len(split.validation)} held out" in PAGE


def test_its_tokens(road):
    _, split, tokenizer, tokens = road
    row = tokens[number_of(split.train, "Corridor 14")]
    ids = row["input_ids"]
    assert f"{len(ids)} tokens" in PAGE
    assert f" {' '.join(map(str, ids))} ``` " in PAGE
    assert f"`prompt_length` | {row['prompt_length']}:" in PAGE
    assert f"`num_chars` | {row['num_chars']}:" in PAGE
    assert f"{len(tokenizer):,} tokens" in PAGE
    assert f"`{name_tokens(split.train, tokenizer, 512)}.2.arrow`" in PAGE
    num_filled = len(fill_up(tokens, 16, tokenizer.bos_token_id))
    assert f"adds {num_filled - len(tokens)} lone" in PAGE
    assert f"{num_filled} texts are {num_filled // 16} steps of 16" in PAGE


def test_its_batch(road):
    _, split, _, tokens = road
    rows = [tokens[number_of(split.train, words)] for words in ("Corridor 14", "Good Ship Giggle")]
    batch = PackedCollator()(rows)
    assert f"[1, {batch['input_ids'].shape[1]}]" in PAGE
    assert f"[1, 1, 2 texts, {batch['attention_mask'].shape[-1]}]" in PAGE
    num_learnt = [len(row["input_ids"]) - row["prompt_length"] for row in rows]
    num_labels = int((batch["labels"][:, 1:] != -100).sum())
    assert num_labels == sum(num_learnt)
    assert f"Of {batch['input_ids'].shape[1]} tokens {num_labels} have one: {num_learnt[0]} in our text" in PAGE
    means = [float(mean) for mean in re.findall(r"7\.\d{4}", PAGE)[:3]]  # of each text, and of both
    assert (num_learnt[0] * means[0] + num_learnt[1] * means[1]) / num_labels == pytest.approx(means[2], abs=1e-4)


def test_its_noise(road):
    tokenizer = road[2]
    for token, logit in (" cost", -0.75), (" The", 0.87):
        ids = torch.tensor([tokenizer.encode(token)])
        noise = gumbel_noise(stream_keys(42, [0]), torch.tensor([0]), ids).item()
        assert f"`{token}` has {logit} + {noise:.2f} = {logit + noise:.2f}" in PAGE


def test_the_tests_it_names_are_there():
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", PAGE)
    assert named
    for file, test in named:
        assert f"\ndef {test}(" in (ROOT / "tests" / file).read_text(encoding="utf-8"), f"{file}::{test}"
