"""A table of texts, and what every reader of one shares."""

from dataclasses import dataclass
from pathlib import Path

HEAD = 20  # rows that decide whether a file of one column has several, with another separator


@dataclass
class Table:
    """Rows of a file. `share`: how much of the file they are, 1.0 where all of it was read."""

    names: list[str]
    rows: list[list]
    share: float | None = None  # None until `read_table` knows it

    def column(self, name: str) -> list:
        index = self.names.index(name)
        return [row[index] for row in self.rows]


def _require(columns: list[str] | None, found: list[str]) -> None:
    for name in columns or []:
        if found.count(name) != 1:
            raise _ColumnError(name, found)


class _ColumnError(Exception):
    """A column that was named is not in the file, or is there twice."""

    def __init__(self, name: str, found: list[str]):
        self.name, self.found = name, found

    def describe(self, path: Path) -> str:
        if count := self.found.count(self.name):
            return f"{self.name}: {count} columns of {path} have this name; rename them"
        some = ", ".join(self.found[:40]) + (", ..." if len(self.found) > 40 else "")
        return f"{self.name}: not a column of {path}; it has {some}"
