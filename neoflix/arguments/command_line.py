"""Command lines: parsers whose errors are one sentence, and recipes as their defaults. Imports no torch."""

import argparse
import json
import re
from dataclasses import MISSING
from types import NoneType, UnionType
from typing import Union, get_args, get_origin, get_type_hints

from neoflix.arguments.paths import expand_paths
from neoflix.arguments.values import yes_or_no
from neoflix.runtime.errors import UserError
from neoflix.runtime.files import ROOT


class OneSentence:
    """An argparse mix-in: raises UserError, where argparse would print the usage and two hundred flags first."""

    def error(self, message):
        raise UserError(message)

    def parse_known_args(self, args=None, namespace=None):
        parsed, rest = super().parse_known_args(args, namespace)
        return argparse.Namespace(**expand_paths(vars(parsed))), rest


class Parser(OneSentence, argparse.ArgumentParser):
    pass


SWITCH = {"type": yes_or_no, "nargs": "?", "const": True}  # `--flag`, `--flag true` or `--flag false`


def kinds_of(hint) -> set:
    """The types that an annotation allows: `list[str] | None` -> {list, NoneType}"""
    parts = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    return {get_origin(part) or part for part in parts}


def add_field(group, field, hint, is_shown: bool = True) -> None:
    """Adds a dataclass's field as a flag to a parser or a group of it. A flag that is not given sets nothing."""
    kinds = kinds_of(hint)
    if given := {name: value for name, value in field.metadata.items() if name != "help"}:
        options = given
    elif bool in kinds:
        options = SWITCH | {"metavar": "true|false"}
    elif list in kinds:
        options = {"nargs": "+", "metavar": "WORD"}
    else:
        kind = next(kind for kind in (float, int, str) if kind in kinds)
        options = {"type": kind, "metavar": {float: "X", int: "N", str: "WORD"}[kind]}
    help_text = _help(field) if is_shown else argparse.SUPPRESS
    group.add_argument(f"--{field.name}", **options, default=argparse.SUPPRESS, help=help_text)
    if field.default is True:
        options = {"dest": field.name, "action": "store_false", "default": argparse.SUPPRESS}
        group.add_argument(f"--no_{field.name}", **options, help=argparse.SUPPRESS)


def _help(field) -> str:
    """The help text, with the default unless it is None, which the text itself explains, or false."""
    text = field.metadata["help"].replace("%", "%%")
    if field.default in (None, False, MISSING):
        return text
    default = str(field.default).lower() if field.default is True else str(field.default)
    return f"{text} (default: {default.removeprefix(f'{ROOT}/')})"


def with_underscores(words: list[str]) -> list[str]:
    """A command line's words with each flag spelled with `_`: --output-dir=my-run -> --output_dir=my-run"""
    spelled = []
    for word in words:
        flag, equals, value = word.partition("=")
        is_flag = flag.startswith("--")
        spelled.append(f"--{flag[2:].replace('-', '_')}{equals}{value}" if is_flag else word)
    return spelled


def as_words(flags: dict) -> list[str]:
    """Flags as words of a command line: {'bf16': True, 'report_to': ['a', 'b']} -> --bf16=true --report_to a b"""
    words = []
    for key, value in flags.items():
        if isinstance(value, list):
            words += [f"--{key}", *value]
        elif value is not None:
            words.append(f"--{key}={json.dumps(value) if isinstance(value, dict | bool) else value}")
    return words


def read_recipe_values(parser: argparse.ArgumentParser, flags_class: type, path: str, recipe: dict) -> dict:
    """The values of a recipe's flags, each of its flag's own type.

    Args:
        parser: knows all of these flags.
        flags_class: the dataclass that declares them.

    Raises:
        UserError: a value is not one of its flag.
    """
    hints = get_type_hints(flags_class)
    for name, value in recipe.items():
        kinds = kinds_of(hints[name])
        if value is None and NoneType not in kinds:
            raise UserError(f"--config {path}: {name} is empty; give it a value, or leave it out")
        if isinstance(value, list) and list not in kinds:
            raise UserError(f"--config {path}: {name} takes one value, not a list")
        if isinstance(value, dict) and dict not in kinds:
            raise UserError(f"--config {path}: {name} takes one value, not a block of keys")
    # Words cannot express null, nor a list of a flag that takes one or several values.
    values = {name: value for name, value in recipe.items() if value is None or isinstance(value, list)}
    words = {name: value for name, value in recipe.items() if name not in values}
    words |= {name: word for name, value in words.items() if (word := _on_or_off(value, kinds_of(hints[name])))}
    try:
        parsed, _ = parser.parse_known_args(as_words(words))
    except UserError as error:
        message = re.sub(r"^argument --(\w+)\S*:", r"\1:", str(error))
        raise UserError(f"--config {path}: {message}") from None
    return values | {name: getattr(parsed, name) for name in words}


def _on_or_off(value, kinds: set) -> str | None:
    """What YAML's `on` and `off` mean for a flag that is on or off."""
    return {"on": "true", "off": "false"}.get(str(value).lower()) if bool in kinds else None
