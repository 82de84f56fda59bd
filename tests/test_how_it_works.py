"""The numbers in docs/how-it-works.md are what the code computes for its example."""

import re

import pytest
import torch
from conftest import ROOT

from neoflix.data.packing import PackedCollator
from neoflix.data.sources import find_dataset, read_examples
from neoflix.data.split import hash_words, split_texts
from neoflix.data.template import Example, Template
from neoflix.data.tokens import fill_up, tokenize_texts
from neoflix.data.words import split_words
from neoflix.model.load import find_tokenizer
from neoflix.sampling.draw import gumbel_noise, stream_keys

PAGE = (ROOT / "docs" / "how-it-works.md").read_text(encoding="utf-8")


def section(number: int) -> str:
    """A section of the page as one line."""
    return " ".join(re.search(rf"\n## {number}\. (.*?)\n## ", PAGE, re.DOTALL)[1].split())


def missing(number: int, *facts) -> list[str]:
    """Those of the facts (whole numbers or words) that the section does not have."""
    text = section(number)
    words = [f"{fact:,}" if isinstance(fact, int) else fact for fact in facts]
    return [word for word in words if not re.search(rf"(?<![\w.]){re.escape(word)}(?!\w)", text)]


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    """(all examples, their split, the tokenizer, tokens of the training texts), as the page's command makes them."""
    cache = tmp_path_factory.mktemp("cache")
    template = Template(re.search(r"--template '(.+?)'", PAGE)[1])
    texts = read_examples(find_dataset("sample"), None, template)
    split = split_texts(texts, 0.1)
    tokenizer = find_tokenizer("demo", split.train, cache, template)
    return texts, split, tokenizer, tokenize_texts(split.train, tokenizer, 512, cache).dataset


def number_of(texts: list[Example], words: str) -> int:
    return next(number for number, text in enumerate(texts) if words in text.whole)


def test_prompt_and_completion(example):
    texts = example[0]
    prompt, completion, _ = texts[number_of(texts, "Corridor 14")]
    assert not missing(1, prompt, completion.strip(), len(prompt))


def test_split(example):
    texts, split, _, _ = example
    text = texts[number_of(texts, "Corridor 14")]
    assert text in split.train
    other = split.validation[number_of(split.validation, "Check-in is at six")]
    hashes = [f"{hash_words(each.completion):.4f}" for each in (text, other)]
    words = " ".join(split_words(text.completion))
    assert not missing(2, words, *hashes, len(texts), len(split.train), len(split.validation))


def test_tokens(example):
    _, split, tokenizer, tokens = example
    row = tokens[number_of(split.train, "Corridor 14")]
    num_filled = len(fill_up(tokens, 16, tokenizer.bos_token_id))
    facts = [len(row["input_ids"]), row["prompt_length"], row["num_chars"], len(tokenizer)]
    facts += [num_filled - len(tokens), num_filled, num_filled // 16]
    assert not missing(3, " ".join(map(str, row["input_ids"])), *facts)


def test_batch_and_loss(example):
    _, split, _, tokens = example
    rows = [tokens[number_of(split.train, words)] for words in ("Corridor 14", "Good Ship Giggle")]
    batch = PackedCollator()(rows)
    num_tokens, longest = batch["input_ids"].shape[1], batch["attention_mask"].shape[-1]
    assert not missing(4, num_tokens, longest)
    num_targets = [len(row["input_ids"]) - row["prompt_length"] for row in rows]
    num_labels = int((batch["labels"][:, 1:] != -100).sum())
    assert num_labels == sum(num_targets)
    assert not missing(6, num_tokens, num_labels, *num_targets)
    means = [float(mean) for mean in re.findall(r"7\.\d{4}", section(6))[:3]]  # of each text, and of both
    assert (num_targets[0] * means[0] + num_targets[1] * means[1]) / num_labels == pytest.approx(means[2], abs=1e-4)


def test_noise(example):
    tokenizer = example[2]
    for token, logit in (" cost", -0.75), (" The", 0.87):
        ids = torch.tensor([tokenizer.encode(token)])
        noise = gumbel_noise(stream_keys(42, [0]), torch.tensor([0]), ids).item()
        assert f"{logit} + {noise:.2f} = {logit + noise:.2f}" in section(10)
