"""CSV, TSV and other separated files, read by Python's strict `csv` module."""

import csv
import re
import sys
from collections.abc import Iterator
from itertools import islice
from typing import BinaryIO, TextIO

from neoflix.data.encodings import as_text
from neoflix.data.rows import Columns, FileError, Table, fill_table

SEPARATORS = (",", "\t", ";", "|")
SEPARATOR_LINE = re.compile(r"sep=(.)[\r\n]*", re.IGNORECASE)  # the first line of some CSV files written by Excel
NUM_PROBED = 20  # rows that decide whether a file of one column has several columns with another separator


def read_separated(file: BinaryIO, columns: Columns, limit: int | None, usual: str) -> Table:
    """Reads a file with a header line and separated fields; `usual` is the separator that its name promises."""
    csv.field_size_limit(sys.maxsize)
    with as_text(file, limit, newline="") as lines:
        separator = _find_separator(lines, usual)
        lines.seek(0)
        if named := SEPARATOR_LINE.fullmatch(lines.readline()):
            separator = named[1]
        else:
            lines.seek(0)
        rows = _parse(lines, separator, first_line=2 if named else 1)
        names = next(rows, None)
        if names is None:
            raise FileError("the file is empty")
        return fill_table(names, islice(rows, limit), columns)


def _parse(lines: TextIO, separator: str, first_line: int) -> Iterator[list[str]]:
    """Yields the header and the rows, without blank lines. Raises FileError for a row that is not as long as the
    header."""
    reader = csv.reader(lines, delimiter=separator, strict=True)
    width, line = None, first_line
    try:
        for row in reader:
            if len(row) == width:
                yield row
            elif row and (width is None or len(row) > 1 or row[0].strip()):
                if width is not None:
                    raise FileError(
                        f"line {line} has {_count(len(row), 'field')}, the header has {width}; a field that contains "
                        f"the separator {separator!r} must be in quotes"
                    )
                width = len(row)
                yield row
            line = first_line + reader.line_num
    except csv.Error as error:
        if "unexpected end" in str(error):
            raise FileError(f"a quote that opens in line {line} is not closed") from error
        raise FileError(
            f"the row that begins in line {line} has text after a closing quote; a quote inside a quoted field must "
            f"be doubled ({error})"
        ) from error


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _find_separator(lines: TextIO, usual: str) -> str:
    """The usual separator, unless it finds one column in the header while another separator finds several and fits the
    first rows: in much of Europe, Excel writes semicolons."""
    if _num_fields(lines, usual)[:1] not in ([], [1]):
        return usual
    for separator in SEPARATORS:
        header, *rows = _num_fields(lines, separator) or [0]
        if header > 1 and 2 * rows.count(header) >= len(rows):
            return separator
    return usual


def _num_fields(lines: TextIO, separator: str) -> list[int]:
    """The number of fields of the header and each of the first rows, up to the first one that is not valid CSV."""
    lines.seek(0)
    counts = []
    try:
        for row in csv.reader(lines, delimiter=separator, strict=True):
            counts += [len(row)] if row else []
            if len(counts) > NUM_PROBED:
                break
    except csv.Error:
        pass
    return counts
