"""Parsers whose errors are one sentence."""

import argparse
from dataclasses import dataclass, field, fields
from typing import get_type_hints

import pytest

from neoflix.arguments.command_line import (
    Parser,
    add_field,
    as_words,
    kinds_of,
    read_recipe_values,
    with_underscores,
)
from neoflix.arguments.train_flags import TOKENS
from neoflix.arguments.values import layers_or_auto, tokens_or_auto, yes_or_no
from neoflix.runtime.errors import UserError


@dataclass
class Flags:
    name: str | None = field(default=None, metadata={"help": "100% of it"})
    count: int = field(default=3, metadata={"help": "a count"})
    rate: float | None = field(default=None, metadata={"help": "a rate"})
    is_on: bool = field(default=True, metadata={"help": "on or off"})
    tokens: int | str | None = field(default=None, metadata={"help": "tokens", **TOKENS})
    words: list[str] | None = field(default=None, metadata={"help": "words"})
    block: dict | str | None = field(default=None, metadata={"help": "a block"})


@pytest.fixture
def parser():
    parser, hints = Parser(allow_abbrev=False), get_type_hints(Flags)
    for each in fields(Flags):
        add_field(parser, each, hints[each.name])
    return parser


def test_values_have_their_flags_types(parser):
    words = "--name 010 --count 010 --rate 1e-3 --is_on no --tokens auto --words a b --block {}".split()
    assert vars(parser.parse_args(words)) == {
        "name": "010", "count": 10, "rate": 1e-3, "is_on": False, "tokens": "auto", "words": ["a", "b"], "block": "{}",
    }  # fmt: skip
    assert vars(parser.parse_args(["--no_is_on"])) == {"is_on": False}
    assert vars(parser.parse_args(["--is_on"])) == {"is_on": True}
    assert vars(parser.parse_args([])) == {}, "a flag that is not given sets nothing"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--count", "many"], "--count.*'many'"),
        (["--is_on", "maybe"], "--is_on.*'maybe'"),
        (["--tokens", "many"], "--tokens.*'many'.*auto"),
        (["--name"], "--name"),
        (["--coun", "3"], "--coun"),
    ],
)
def test_errors_are_one_sentence(parser, words, message):
    with pytest.raises(UserError, match=message) as error:
        parser.parse_args(words)
    assert "\n" not in str(error.value)


def test_help_shows_defaults(parser):
    shown = " ".join(parser.format_help().split())
    assert "a count (default: 3)" in shown
    assert "100% of it" in shown


def test_words():
    assert yes_or_no("YES") is True
    assert yes_or_no("0") is False
    assert tokens_or_auto("12") == 12
    assert [layers_or_auto(word) for word in ("true", "no", "auto", "5")] == [True, False, "auto", 5]
    for word in ("-2", "some", "2.5"):
        with pytest.raises(argparse.ArgumentTypeError):
            layers_or_auto(word)
    with pytest.raises(argparse.ArgumentTypeError):
        yes_or_no("on")
    assert with_underscores(["--a-b=c-d", "e-f", "--g-h", "-1"]) == ["--a_b=c-d", "e-f", "--g_h", "-1"]
    flags = {"bf16": True, "report_to": ["a", "b"], "block": {"a": 1}, "seed": None}
    assert as_words(flags) == ["--bf16=true", "--report_to", "a", "b", '--block={"a": 1}']
    assert kinds_of(list[str] | None) == {list, type(None)}


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        ({"name": None}, {"name": None}),
        ({"is_on": "off"}, {"is_on": False}),
        ({"name": "off"}, {"name": "off"}),
        ({"words": ["a"]}, {"words": ["a"]}),
        ({"words": "a"}, {"words": ["a"]}),
        ({"block": {"a": 1}}, {"block": '{"a": 1}'}),
        ({"count": "010"}, {"count": 10}),
        ({"count": None}, "count is empty"),
        ({"count": ["1"]}, "count .* list"),
        ({"count": {"a": 1}}, "count .* block"),
        ({"count": "many"}, "count: .*'many'"),
    ],
    ids=str,
)
def test_values_of_a_recipe(parser, recipe, expected):
    if isinstance(expected, dict):
        assert read_recipe_values(parser, Flags, "x.yaml", recipe) == expected
    else:
        with pytest.raises(UserError, match=f"--config x.yaml: {expected}"):
            read_recipe_values(parser, Flags, "x.yaml", recipe)
