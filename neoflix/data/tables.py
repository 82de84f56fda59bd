"""Reads tables: CSV, TSV, JSON lines, a JSON array, Parquet, a .txt file, a folder of .txt files; also in gzip and zip.

A file is read exactly, whatever its size, or refused with a message that names the line. Nothing here imports torch or
pandas, so that `--plan` reads the first rows of a file in milliseconds.
"""

import json
import os
import zipfile
import zlib
from collections.abc import Callable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import BinaryIO, TextIO

from neoflix.data.encodings import as_text, describe_encoding, unpack
from neoflix.data.rows import HEAD, ColumnError, Columns, FileError, Table, choose, fill_table, require
from neoflix.data.separated import read_separated
from neoflix.runtime.errors import UserError


def read_table(
    path: Path,
    columns: Columns = None,
    limit: int | None = None,
    flag: str = "--dataset",
    column_flag: str = "--text_column",
    suffix: str | None = None,
) -> Table:
    """Reads rows of a file or folder, unchanged. Opens each file once.

    Cells are text, or what the format has (numbers, lists, None for a missing value).

    Args:
        columns: names, or a function that chooses them by the first rows; None: all columns.
        limit: the number of rows to read, from the first one on; None: all of them.
        flag, column_flag: how the user named the file and its columns, for errors.
        suffix: the format, if the file's name does not end in it.

    Raises:
        UserError: if the path is not a table, has no rows, or lacks one of the columns.
    """
    try:
        table = _read_folder(path, columns, limit) if path.is_dir() else _read_file(path, columns, limit, suffix)
    except ColumnError as error:
        raise UserError(f"{column_flag} {error.describe(path)}") from None
    except FileError as error:
        raise UserError(f"{flag} {path}: {error}") from error
    except OSError as error:
        raise UserError(f"{flag} {path}: cannot be read ({error.strerror or error})") from error
    if not table.rows:
        raise UserError(f"{flag} {path}: has no rows")
    return table


def _read_file(path: Path, columns: Columns, limit: int | None, suffix: str | None) -> Table:
    with path.open("rb") as raw:
        size = os.fstat(raw.fileno()).st_size
        with unpack(raw, suffix or path.name) as (file, name):
            read = _find_reader(name)
            if not file.peek(1):
                raise FileError("the file is empty")
            try:
                table = read(file, columns, limit)
            except UnicodeDecodeError:
                raise FileError(describe_encoding(path, suffix)) from None
            except (EOFError, zlib.error, zipfile.BadZipFile) as error:
                raise FileError(f"is damaged or incomplete ({error})") from error
            if table.share is None:
                table.share = raw.tell() / size if len(table.rows) == limit else 1.0
            return table


def _find_reader(name: str) -> Callable[[BinaryIO, Columns, int | None], Table]:
    suffix = Path(f"x{name}" if name.startswith(".") else name).suffix.lower()
    readers = {
        ".csv": lambda *args: read_separated(*args, ","),
        ".tsv": lambda *args: read_separated(*args, "\t"),
        ".jsonl": _read_json,
        ".json": _read_json,
        ".parquet": _read_parquet,
        ".txt": _read_lines,
    }
    if suffix not in readers:
        raise FileError(
            f"ends in {suffix or 'nothing'!r}; must be .csv, .tsv, .jsonl, .json or .parquet (these also as .gz or "
            ".zip), .txt with one text a line, or a folder of .txt files"
        )
    return readers[suffix]


def _read_json(file: BinaryIO, columns: Columns, limit: int | None) -> Table:
    """Reads one object a line or, if the file begins with a bracket, an array of objects. A string is a row with the
    column `text`."""
    share = None
    with as_text(file, limit) as lines:
        if _first_character(lines) == "[":
            array = _parse_json(lines.read(), "the file")
            items = ((f"item {number}", item) for number, item in enumerate(array, start=1))
            share = min(1.0, limit / max(len(array), 1)) if limit else 1.0
        else:
            items = parse_json_lines(lines)
        objects = _to_objects(islice(items, limit))
        head = []
        if callable(columns):
            head = list(islice(objects, HEAD))
            columns = choose(columns, _to_table(head))
        found, rows = {}, []
        for row in chain(head, objects):
            found |= dict.fromkeys(row)
            rows.append([row.get(name) for name in columns] if columns else row)
    if columns is None:
        table = _to_table(rows)
        table.share = share
        return table
    if rows and len(rows) != limit:  # otherwise a key may appear further down
        require(columns, list(found))
    return Table(columns, rows, share)


def _to_objects(items: Iterator[tuple[str, object]]) -> Iterator[dict]:
    for place, row in items:
        if isinstance(row, str):
            row = {"text": row}
        if not isinstance(row, dict):
            raise FileError(f"{place} is neither a JSON object, {{...}}, nor a text in quotes")
        yield row


def _to_table(objects: list[dict]) -> Table:
    """A table of all keys, in the order in which they appear."""
    names = list(dict.fromkeys(key for row in objects for key in row))
    return Table(names, [[row.get(name) for name in names] for row in objects])


def _first_character(lines: TextIO) -> str:
    first = next((line.lstrip()[0] for line in lines if line.strip()), "")
    lines.seek(0)
    return first


def parse_json_lines(lines: TextIO) -> Iterator[tuple[str, object]]:
    for number, line in enumerate(lines, start=1):
        line = line.strip().removeprefix("\ufeff")  # in the middle of a file, where files were joined
        if line:
            yield f"line {number}", _parse_json(line, f"line {number}")


def _parse_json(text: str, place: str):
    """Raises FileError, with the place, for invalid JSON and for a lone surrogate, which UTF-8 cannot encode."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = str(error).replace("line 1 ", "") if place.startswith("line") else error
        raise FileError(f"{place} is not valid JSON ({reason})") from error
    if "\\ud" in text or "\\uD" in text:
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            half = f"\\u{ord(error.object[error.start]):04x}"
            raise FileError(f"{place} has {half}, one half of a character without its other half; remove it") from None
    return value


def _read_parquet(file: BinaryIO, columns: Columns, limit: int | None) -> Table:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(file) as parquet:
            names, num_rows = parquet.schema_arrow.names, parquet.metadata.num_rows
            if callable(columns):
                columns = choose(columns, Table(names, _read_first_rows(parquet, HEAD)))
            require(columns or [], names)
            if limit is None:
                rows = _to_rows(parquet.read(columns=columns), columns)
            else:
                rows = _read_first_rows(parquet, limit, columns)
    except pa.ArrowException as error:
        raise FileError(f"not a Parquet file ({error})") from error
    return Table(columns or names, rows, len(rows) / num_rows if num_rows else 1.0)


def _read_first_rows(parquet, num_rows: int, columns: list[str] | None = None) -> list[list]:
    batches = parquet.iter_batches(num_rows, columns=columns)
    return _to_rows(next(batches, parquet.schema_arrow.empty_table()), columns)  # an empty file has no batch


def _to_rows(data, columns: list[str] | None) -> list[list]:
    """Rows of an Arrow table. Without names all columns are kept, of which several may have the same name."""
    places = columns or range(data.num_columns)
    return [list(row) for row in zip(*(data.column(place).to_pylist() for place in places), strict=True)]


def _read_lines(file: BinaryIO, columns: Columns, limit: int | None) -> Table:
    """Reads a text file with one text a line, in the column `text`."""
    with as_text(file, limit) as lines:
        texts = (line.rstrip("\n") for line in lines if line.strip())
        return fill_table(["text"], ([text] for text in islice(texts, limit)), columns)


def _read_folder(path: Path, columns: Columns, limit: int | None) -> Table:
    """Reads one text a file, in the column `text`; `name` is the file's path in the folder, without .txt."""
    files = find_text_files(path)
    table = fill_table(["name", "text"], (_read_text_file(file, path) for file in files[:limit]), columns)
    table.share = len(table.rows) / len(files) if files else 1.0
    return table


def _read_text_file(file: Path, folder: Path) -> list[str]:
    name = str(file.relative_to(folder).with_suffix("")).encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    try:
        with file.open("rb") as binary, as_text(binary) as text:
            return [name, text.read()]
    except UnicodeDecodeError:
        raise FileError(f"{file.name}: {describe_encoding(file, '.txt')}") from None
    except FileError as error:
        raise FileError(f"{file.name}: {error}") from None
    except OSError as error:
        raise FileError(f"{file.name}: cannot be read ({error.strerror})") from error


def find_text_files(folder: Path) -> list[Path]:
    """The .txt files of a folder and its subfolders, sorted. Links are followed, each file counts once, and names that
    begin with a dot (`.ipynb_checkpoints`, `.git`) are left out.

    Raises:
        UserError: for a broken link.
    """
    files, seen = [], set()
    for parent, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(parent)
        folders[:] = [] if real in seen else sorted(name for name in folders if not name.startswith("."))
        if real in seen:
            continue
        seen.add(real)
        files += [Path(parent, name) for name in names if name.lower().endswith(".txt") and not name.startswith(".")]
    unique: dict[str, Path] = {}
    for file in sorted(files):
        if not file.exists():
            raise UserError(f"{file}: a link to a file that does not exist; remove it")
        unique.setdefault(os.path.realpath(file), file)
    return list(unique.values())
