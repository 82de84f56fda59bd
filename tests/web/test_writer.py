"""Requests for texts, one after the other."""

import json

import pytest

from neoflix.data.template import Template, attach_template
from neoflix.sampling.sampler import Sampler
from neoflix.web.twins import Twin, Twins
from neoflix.web.writer import MOST_TEXTS, Writer


@pytest.fixture(scope="module")
def sampler(run_dir):
    return Sampler.load(run_dir, device="cpu")


@pytest.fixture
def writer(sampler):
    return Writer(sampler, Twins([]), {"max_new_tokens": 24, "batch_size": 2})


def test_a_request_ends_with_the_texts_that_generate_py_writes(sampler, writer):
    expected = list(sampler.sample("A young", 3, seed=5, temperature=1.2, top_p=0.9))
    first, *_, last = writer.write("A young", 3, "5", temperature=1.2, top_p=0.9)
    assert first.state in ("writing", "done")
    assert (last.state, last.error, last.seed) == ("done", None, 5)
    assert [json.loads(line) for line in last.jsonl.splitlines()] == [sample.to_dict() for sample in expected]


def test_finished_texts_are_compared_with_the_training_texts(sampler):
    two = list(sampler.sample("A young", 2, seed=5))[1].text
    writer = Writer(sampler, Twins([two.upper()]), {})
    *_, last = writer.write("A young", 2, 5)
    assert last.twins == {0: None, 1: Twin(True, two.upper())}


def test_no_seed_is_a_new_one_each_time(writer):
    ends = [list(writer.write("A", 1, seed))[-1] for seed in ("", None)]
    assert ends[0].seed != ends[1].seed
    again = list(writer.write("A", 1, ends[0].seed))[-1]
    assert again.samples == ends[0].samples


@pytest.mark.parametrize(
    ("words", "fact"),
    [
        ({"temperature": 0}, "temperature=0"),
        ({"top_p": 2}, "top_p=2"),
        ({"num_samples": 0}, "number of texts 0"),
        ({"num_samples": MOST_TEXTS + 1}, f"1 to {MOST_TEXTS}"),
        ({"num_samples": 1.5}, "number of texts 1.5"),
        ({"num_samples": None}, "number of texts"),
        ({"seed": "abc"}, "seed abc"),
        ({"seed": "1e999"}, "seed 1e999"),
        ({"prompt": "word " * 300}, "leave no room"),
        ({"prompt": {"title": "A"}}, "no fields"),
    ],
)
def test_what_is_not_valid_is_a_sentence(writer, words, fact):
    *_, last = writer.write(**({"prompt": "A", "num_samples": 1} | words))
    assert fact in last.error
    assert not last.error.startswith("--")
    assert (last.state, last.samples) == ("stopped", [])


def test_stop_ends_the_request_and_not_the_next_one(writer):
    request = writer.write("A", 50, 5)
    next(request)
    writer.stop()
    *_, last = request
    assert last.state == "stopped"
    assert len(last.finished) < 50
    assert list(writer.write("A", 1, 5))[-1].state == "done"


def test_empty_fields_are_left_to_the_sampler(run_dir):
    sampler = Sampler.load(run_dir, device="cpu")
    attach_template(sampler.tokenizer, Template("{kind} | {title}: {plot}", learns_prompt=True))
    sampler = Sampler(sampler.model, sampler.tokenizer)
    *_, last = Writer(sampler, Twins([]), {}).write({"kind": " Film ", "title": "  "}, 2, 5)
    expected = list(sampler.sample({"kind": "Film"}, 2, 5))
    assert last.samples == expected
    assert expected[0].fields["title"]
