"""`generate.py`'s flags: which belong together, which contradict each other, and what is resolved from them."""

import re

import pytest

from neoflix.arguments.generate import DEFAULT_SWEEP_FOLDER, parse_fields, parse_generate_args, parse_sweep
from neoflix.arguments.sampling import SAMPLING_DEFAULTS


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--sweep", "temprature=1"], "'temprature'"),
        (["--sweep", "temperature"], "--sweep temperature: must be temperature="),
        (["--sweep", "temperature=0.7,hot"], "--sweep temperature=0.7,hot: must be temperature= followed by numbers"),
        (["--sweep", "top_k=1.5"], "whole numbers"),
        (["--sweep", "temperature=0.7,0"], "--sweep temperature=0.0: "),
        (["--sweep", "top_p=0.5", "top_p=0.9"], "top_p is given twice"),
        (["--sweep", "top_p=0.5", "--novel"], "--novel"),
        (["--stream", "--novel"], "leave out --stream or --novel"),
        (["--stream", "--sweep", "top_p=0.5"], "leave out --stream or --sweep"),
        (["--prompt", "A", "--fields", "title=B"], "--fields"),
        (["--judge", "x.jsonl", "--novel"], "leave out --novel or the file"),
        (["--judge", "x.jsonl", "--output", "y.jsonl"], "leave out --output or the file"),
        (["--judge", "--validation_fraction", "1"], "--validation_fraction 1.0: "),
    ],
)
def test_flags_that_contradict_each_other_or_are_not_valid(words, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        parse_generate_args(words)


def test_judge_alone_judges_new_samples_and_with_a_file_those_in_it():
    for words, expected in (([], (False, None)), (["--judge"], (True, None)), (["--judge", "x"], (False, "x"))):
        args = parse_generate_args(words)
        assert (args.judge, args.judged_file) == expected


def test_output_is_a_file_or_for_a_sweep_a_folder():
    assert parse_generate_args([]).output is None
    assert parse_generate_args(["--sweep", "top_k=1"]).output == DEFAULT_SWEEP_FOLDER
    for words in ([], ["--sweep", "top_k=1"]):
        assert parse_generate_args([*words, "--output", "here"]).output == "here"


def test_sampling_settings_are_the_samplers_keyword_arguments():
    args = parse_generate_args(["--seed", "3", "--top_k", "5"])
    assert args.sampling == dict.fromkeys(SAMPLING_DEFAULTS) | {"seed": 3, "batch_size": 20, "top_k": 5}


def test_number_of_samples():
    assert parse_generate_args([]).num_samples == 20
    assert parse_generate_args(["--fields_file", "x.csv"]).num_samples == 1
    assert parse_generate_args(["--fields_file", "x.csv", "--num_samples", "3"]).num_samples == 3


def test_fields():
    assert parse_fields(["title=The Last Ferry", "type=", "a=b=c"]) == {
        "title": "The Last Ferry",
        "type": "",
        "a": "b=c",
    }
    for bad in (["title"], ["=x"], ["a=1", "a=2"]):
        with pytest.raises(ValueError, match=f"--fields {bad[-1]}"):
            parse_fields(bad)


def test_a_sweep_is_every_combination():
    assert parse_sweep(["temperature=0.7,1.0", "top_k=0,5"]) == [
        {"temperature": temperature, "top_k": top_k} for temperature in (0.7, 1.0) for top_k in (0, 5)
    ]
    assert parse_sweep(["top_k=5,5"]) == [{"top_k": 5}]
