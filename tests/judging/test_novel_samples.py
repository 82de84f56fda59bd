"""`--novel` keeps the samples that would be drawn anyway, and draws further ones for those it drops."""

import json
from collections import Counter
from functools import partial

import pytest
from conftest import generate_words, read_jsonl

import generate
from neoflix.data.words import split_words
from neoflix.judging.novel_samples import keep_novel
from neoflix.judging.novelty import TrainingTexts
from neoflix.sampling.sampler import Sampler


@pytest.fixture(scope="module")
def sampler(recorded_run):
    return Sampler.load(recorded_run, device="cpu")


def test_novel_samples_are_the_same_ones_and_later_ones(sampler):
    """Of eight texts two of the first prompt's are in the training texts, one of them but for its first word."""
    sample = partial(sampler.sample, seed=7, batch_size=3, max_new_tokens=30)
    eight = [one.text for one in sample(["A ", "The "], num_samples=4)]
    longest = max((0, 2, 3), key=lambda i: len(split_words(eight[i])))
    twin = " ".join(["Once", *split_words(eight[longest])[1:]])
    training = TrainingTexts(["Nothing like it.", eight[1], twin])
    assert [i for i, text in enumerate(eight) if not training.is_novel(text)] == sorted([1, longest])
    later = [one.text for one in sample(["A"], num_samples=2, first_index=8)]
    kept = list(keep_novel(sample, training, ["A ", "The "], 4))
    assert [one.text for one in kept] == [text for i, text in enumerate(eight) if i not in (1, longest)] + later
    assert Counter(one.prompt for one in kept) == {"A": 4, "The": 4}


def test_a_model_that_only_repeats_gives_up(sampler):
    sample = partial(sampler.sample, seed=7, top_k=1, max_new_tokens=30)
    training = TrainingTexts([next(sample()).text])
    with pytest.raises(ValueError, match=r"--novel: only 0 of the 2 .* 40 draws"):
        list(keep_novel(sample, training, [""], 2))


def test_first_index_goes_on_where_another_call_ended(sampler):
    together = list(sampler.sample(num_samples=5, seed=9, max_new_tokens=8))
    assert list(sampler.sample(num_samples=3, seed=9, max_new_tokens=8, first_index=2)) == together[2:]


def test_novel_on_the_command_line(recorded_run, tmp_path):
    generate.main(generate_words(recorded_run, "--prompt", "A young", "--output", tmp_path / "plain.jsonl"))
    plain = read_jsonl(tmp_path / "plain.jsonl")
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"plot": row["text"]}) + "\n" for row in plain[:2]))
    words = ("--prompt", "A young", "--novel", "--dataset", tmp_path / "texts.jsonl", "--validation_fraction", 0)
    generate.main(generate_words(recorded_run, *words, "--output", tmp_path / "novel.jsonl"))
    novel = read_jsonl(tmp_path / "novel.jsonl")
    assert novel[:2] == plain[2:]
    assert len(novel) == 4
    assert not {row["text"] for row in novel} & {row["text"] for row in plain[:2]}
