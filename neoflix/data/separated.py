"""CSV, TSV and their like, by Python's strict `csv`."""

import csv
import re
import sys
from collections.abc import Iterator
from itertools import islice
from typing import BinaryIO, TextIO

from neoflix.data.encodings import (
    _as_text,
)
from neoflix.data.rows import HEAD, Table, _require
from neoflix.runtime.errors import UserError

SEPARATORS = (",", "\t", ";", "|")


SEPARATOR_LINE = re.compile(r"sep=(.)[\r\n]*", re.IGNORECASE)  # Excel's first line of a CSV file


def _read_separated(file: BinaryIO, columns: list[str] | None, limit: int | None, usual: str) -> Table:
    csv.field_size_limit(sys.maxsize)
    with _as_text(file, limit, newline="") as lines:
        separator = _find_separator(lines, usual)
        lines.seek(0)
        if said := SEPARATOR_LINE.fullmatch(lines.readline()):
            separator = said[1]
        else:
            lines.seek(0)
        rows = _parse(lines, separator, first_line=2 if said else 1)
        names = next(rows, None)
        if names is None:
            raise UserError("the file is empty")
        _require(columns, names)
        if columns is None:
            return Table(names, list(islice(rows, limit)))
        places = [names.index(name) for name in columns]
        return Table(columns, [[row[place] for place in places] for row in islice(rows, limit)])


def _parse(lines: TextIO, separator: str, first_line: int) -> Iterator[list[str]]:
    """Header and rows, all of the header's length; blank lines are left out. UserError for any other row."""
    reader = csv.reader(lines, delimiter=separator, strict=True)
    width, line = None, first_line
    try:
        for row in reader:
            if len(row) == width:
                yield row
            elif row and (width is None or len(row) > 1 or row[0].strip()):
                if width is not None:
                    raise UserError(
                        f"line {line} has {_count(len(row), 'field')}, the header has {width}; a field that holds the "
                        f"separator {separator!r} must be in quotes"
                    )
                width = len(row)
                yield row
            line = first_line + reader.line_num
    except csv.Error as error:
        if "unexpected end" in str(error):
            raise UserError(f"a quote that opens in line {line} is not closed") from error
        raise UserError(
            f"the row that begins in line {line} has text after a closing quote; a quote inside a quoted field must "
            f"be doubled ({error})"
        ) from error


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _find_separator(lines: TextIO, usual: str) -> str:
    """The usual one, unless the header has one column by it, and several by another one that fits the first rows: files
    of Excel, for one, have semicolons in much of Europe."""
    if _num_fields(lines, usual)[:1] not in ([], [1]):
        return usual
    for separator in SEPARATORS:
        header, *rows = _num_fields(lines, separator) or [0]
        if header > 1 and 2 * rows.count(header) >= len(rows):
            return separator
    return usual


def _num_fields(lines: TextIO, separator: str) -> list[int]:
    """Fields of the header and the first rows; only those before the first one that is not CSV."""
    lines.seek(0)
    counts = []
    try:
        for row in csv.reader(lines, delimiter=separator, strict=True):
            counts += [len(row)] if row else []
            if len(counts) > HEAD:
                break
    except csv.Error:
        pass
    return counts
