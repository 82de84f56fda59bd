"""Fields of prompts for sampling: given as flags, read from a file, or drawn from the training texts."""

import random
from pathlib import Path

from neoflix.data.columns import is_missing
from neoflix.data.rows import Table
from neoflix.data.tables import read_table
from neoflix.data.template import Example, Template
from neoflix.runtime.errors import UserError

NUM_ROWS = 500  # training texts that left-out fields are drawn from


class FieldPool:
    """The fields of some training texts, from which the fields that a prompt leaves out are drawn.

    Args:
        rows: for each text, the values of all fields of the template.
    """

    def __init__(self, rows: list[dict[str, str]]):
        self.rows = rows
        self._closest: dict[tuple, list[dict[str, str]]] = {}  # by the given fields: many prompts have the same

    @classmethod
    def from_examples(cls, examples: list[Example]) -> "FieldPool":
        """The fields of up to 500 of these examples, the same ones every time."""
        chosen = random.Random(0).sample(examples, min(NUM_ROWS, len(examples)))
        return cls([example.fields for example in chosen])

    def draw(self, given: dict[str, str], seed: int, index: int) -> dict[str, str]:
        """All fields of a prompt: the given ones, and the others from one of the rows that share most of the given
        ones. Depends on the seed and the text's index alone."""
        return random.Random(f"{seed} {index}").choice(self._find_closest(given)) | given

    def _find_closest(self, given: dict[str, str]) -> list[dict[str, str]]:
        key = tuple(sorted(given.items()))
        if key not in self._closest:
            shared = [sum(row[name] == given[name] for name in given) for row in self.rows]
            most = max(shared)
            self._closest[key] = [row for row, num in zip(self.rows, shared, strict=True) if num == most]
        return self._closest[key]


def read_fields(given: dict[str, str], file: str | None, template: Template | None) -> list[dict[str, str]]:
    """The fields of one prompt or, with a file, of one prompt for each of its rows.

    Args:
        given: fields of every prompt (`--fields`), unless its row in the file has them too.
        file: a table (`--fields_file`). Columns that the template does not have, and empty cells, are left out.

    Raises:
        UserError: if the model has no template, the file has none of its columns, or a given field is not in it.
    """
    if template is None:
        raise UserError("--fields: the model was trained without --template; use --prompt to begin its texts")
    template.check(given, f"--fields {' '.join(given)}")
    if file is None:
        return [given]
    path = Path(file).expanduser()
    if not path.exists():
        raise UserError(f"--fields_file {file}: no such file")

    def choose(head: Table) -> list[str]:
        known = [name for name in template.fields if name in head.names]
        if not known:
            columns = ", ".join(template.fields)
            raise UserError(f"--fields_file {file}: has none of the columns {columns}; it has {', '.join(head.names)}")
        return known

    table = read_table(path, choose, flag="--fields_file", column_flag="--fields_file")
    rows = [map(as_field, row) for row in table.rows]
    return [given | {name: value for name, value in zip(table.names, row, strict=True) if value} for row in rows]


def as_field(cell) -> str:
    """A cell as text for a prompt: "" if it is empty, whole numbers without a decimal point, lists with commas."""
    if is_missing(cell):
        return ""
    if isinstance(cell, str):
        return cell.strip()
    if isinstance(cell, list):
        return ", ".join(map(as_field, cell))
    return str(int(cell)) if isinstance(cell, float) and cell.is_integer() else str(cell)
