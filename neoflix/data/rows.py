"""A table of texts, and the steps that the readers of all formats share."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

HEAD = 1000  # rows by which columns are chosen


@dataclass
class Table:
    """Rows of a file. `share` is the part of the file that they are: 1.0 if all of it was read."""

    names: list[str]
    rows: list[list]
    share: float | None = None  # set by the reader, or else by `read_table`

    def column(self, name: str) -> list:
        index = self.names.index(name)
        return [row[index] for row in self.rows]


# The columns to keep, in their order: by name, or chosen by a function of the first rows; None: all columns.
Columns = list[str] | Callable[[Table], list[str]] | None


class FileError(Exception):
    """A file does not have the format that its name promises. The message does not name the file."""


class ColumnError(Exception):
    """A column is missing from a file, or is in it twice."""

    def __init__(self, name: str, found: list[str]):
        self.name, self.found = name, found

    def describe(self, path: Path) -> str:
        if count := self.found.count(self.name):
            return f"{self.name}: {count} columns of {path} have this name; rename them"
        some = ", ".join(self.found[:40]) + (", ..." if len(self.found) > 40 else "")
        return f"{self.name}: not a column of {path}; it has {some}"


def require(columns: Iterable[str], found: list[str]) -> None:
    """Raises ColumnError unless each of the columns is in the file exactly once."""
    for name in columns:
        if found.count(name) != 1:
            raise ColumnError(name, found)


def choose(columns: Columns, head: Table) -> list[str]:
    """The columns that a function chooses by the first rows; of a table without rows, all of them."""
    return columns(head) if head.rows else head.names


def fill_table(names: list[str], rows: Iterator[list], columns: Columns) -> Table:
    """Reads rows into a table that keeps some of their columns."""
    head = []
    if callable(columns):
        head = list(islice(rows, HEAD))
        columns = choose(columns, Table(names, head))
    if columns is None:
        return Table(names, list(rows))
    require(columns, names)
    places = [names.index(name) for name in columns]
    return Table(columns, [[row[place] for place in places] for row in chain(head, rows)])
