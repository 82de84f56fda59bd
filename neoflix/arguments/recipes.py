"""Recipes: YAML files of flags, whose values have their flags' types and not YAML's.

YAML would read `no` as false, `2024_01` as the number 202401, and `1e-4` as a string. Here every value stays the text
that was typed, and its flag decides what it means, as on a command line.
"""

import difflib
import json
from pathlib import Path

import yaml

from neoflix.arguments.sampling import SAMPLING_DEFAULTS, check_sampling
from neoflix.runtime.errors import UserError


def read_recipe(path: str) -> tuple[dict, dict]:
    """Reads a recipe, and checks its form and its sampling settings. `check_keys` checks its keys.

    Returns:
        (flags, sampling settings). A flag's value is a string as typed, None if it is empty or null, a list of strings,
        or a dict. A sampling setting has its own type.

    Raises:
        UserError: the file cannot be read, is not a mapping, has a repeated key, or an unknown or invalid sampling
            setting.
    """
    flags = {}
    for key, node in _read_pairs(path):
        name = key.replace("-", "_")
        if name in flags:
            raise UserError(f"--config {path}: {key!r} is given twice; keep one of them")
        flags[name] = _generation(path, node) if name == "generation" else _flag_value(path, name, node)
    return flags, flags.pop("generation", {})


def check_keys(path: str, keys, known) -> None:
    """Raises UserError for a recipe's key that is not one of the known flags."""
    for key in keys:
        if key not in known:
            raise UserError(f"--config {path}: unknown key {key!r}{nearest(key, known)}")


def _read_pairs(path: str) -> list[tuple[str, yaml.Node]]:
    """(key, value) of the recipe's mapping, both as typed."""
    try:
        node = yaml.compose(Path(path).read_text(encoding="utf-8-sig"), Loader=yaml.SafeLoader)
    except OSError as error:
        raise UserError(f"--config {path}: cannot be read ({error.strerror})") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"--config {path}: not valid YAML ({' '.join(str(error).split())})") from error
    if node is None or _is_empty(node):
        return []
    if not isinstance(node, yaml.MappingNode):
        raise UserError(f"--config {path}: must hold one 'flag: value' per line")
    return _pairs(path, node)


def _pairs(path: str, node: yaml.MappingNode) -> list[tuple[str, yaml.Node]]:
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise UserError(f"--config {path}: line {key.start_mark.line + 1} has no name before its colon")
    return [(key.value, value) for key, value in node.value]


def _is_empty(node: yaml.Node) -> bool:
    return isinstance(node, yaml.ScalarNode) and node.style is None and node.value.lower() in ("", "~", "null")


def _flag_value(path: str, name: str, node: yaml.Node) -> str | list[str] | dict | None:
    if _is_empty(node):
        return None
    if isinstance(node, yaml.ScalarNode):
        return node.value
    if isinstance(node, yaml.MappingNode):
        return _nested(path, node)
    for item in node.value:
        if not isinstance(item, yaml.ScalarNode) or _is_empty(item):
            raise UserError(f"--config {path}: {name}: must be a list of plain values")
    return [item.value for item in node.value]


def _nested(path: str, node: yaml.Node):
    """A block within a flag's value, such as DeepSpeed's. Plain values are read as JSON, or else as strings."""
    if isinstance(node, yaml.SequenceNode):
        return [_nested(path, item) for item in node.value]
    if isinstance(node, yaml.MappingNode):
        values = {}
        for key, value in _pairs(path, node):
            if key in values:
                raise UserError(f"--config {path}: {key!r} is given twice; keep one of them")
            values[key] = _nested(path, value)
        return values
    if _is_empty(node):
        return None
    try:
        return json.loads(node.value.lower()) if node.style is None else node.value
    except ValueError:
        return node.value


def _generation(path: str, node: yaml.Node) -> dict:
    """The `generation` section, each setting of its own type."""
    if _is_empty(node):
        return {}
    if not isinstance(node, yaml.MappingNode):
        raise UserError(f"--config {path}: generation: must hold one 'setting: value' per line")
    settings, types = {}, {name: type(value) for name, value in SAMPLING_DEFAULTS.items()} | {"num_samples": int}
    for key, value in _pairs(path, node):
        name = key.replace("-", "_")
        if name not in types:
            raise UserError(f"--config {path}: generation: unknown key {key!r}{nearest(key, types)}")
        if name in settings:
            raise UserError(f"--config {path}: generation: {key!r} is given twice; keep one of them")
        said = f"--config {path}: generation: {key} {getattr(value, 'value', '')}".rstrip()
        try:
            settings[name] = types[name](value.value)
        except (TypeError, ValueError):
            kind = "a whole number" if types[name] is int else "a number"
            raise UserError(f"--config {path}: generation: {key}: must be {kind}") from None
        check_sampling(said, name, settings[name])
    return settings


def nearest(word: str, words) -> str:
    near = difflib.get_close_matches(str(word), list(words), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""
