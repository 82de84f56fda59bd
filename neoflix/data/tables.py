"""Files to rows: CSV, TSV, JSON lines, a JSON array, Parquet, a .txt file, a folder of .txt files; gzip and zip.

A file is read exactly, whatever its size, or refused in one sentence that names the line. A CSV is what Python's `csv`
module says it is. No torch and no pandas here: `--plan` reads the first rows of a file in milliseconds.
"""

import json
import os
import zipfile
import zlib
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import BinaryIO, TextIO

from neoflix.data.encodings import _as_text, _describe_encoding, _unpack
from neoflix.data.rows import Table, _ColumnError, _require
from neoflix.data.separated import _read_separated
from neoflix.runtime.errors import UserError


def read_table(
    path: Path,
    columns: list[str] | None = None,
    limit: int | None = None,
    flag: str = "--dataset",
    column_flag: str = "--text_column",
    suffix: str | None = None,
) -> Table:
    """Rows of a file or folder, unchanged: text where the format has nothing else, None where a value is missing.

    Args:
        columns: the columns to keep, in this order; None: all of them.
        limit: the most rows to read, the first ones; None: all of them.
        flag, column_flag: how the user named the file and its columns, for errors.
        suffix: the format, where the file's name does not end in it.

    Raises:
        UserError: where the path is no table, has no rows, or lacks one of the columns.
    """
    try:
        table = _read_folder(path, columns, limit) if path.is_dir() else _read_file(path, columns, limit, suffix)
    except _ColumnError as error:
        raise UserError(f"{column_flag} {error.describe(path)}") from None
    except UserError as error:
        raise UserError(f"{flag} {path}: {error}") from error
    except OSError as error:
        raise UserError(f"{flag} {path}: cannot be read ({error.strerror or error})") from error
    if not table.rows:
        raise UserError(f"{flag} {path}: has no rows")
    return table


def _read_file(path: Path, columns: list[str] | None, limit: int | None, suffix: str | None) -> Table:
    with path.open("rb") as raw:
        size = os.fstat(raw.fileno()).st_size
        with _unpack(raw, suffix or path.name) as (file, name):
            read = _find_reader(name)
            if not file.peek(1):
                raise UserError("the file is empty")
            try:
                table = read(file, columns, limit)
            except UnicodeDecodeError:
                raise UserError(_describe_encoding(path, suffix)) from None
            except (EOFError, zlib.error, zipfile.BadZipFile) as error:
                raise UserError(f"is damaged or incomplete ({error})") from error
            if table.share is None:
                table.share = raw.tell() / size if len(table.rows) == limit else 1.0
            return table


def _find_reader(name: str) -> Callable[[BinaryIO, list[str] | None, int | None], Table]:
    suffix = Path(f"x{name}" if name.startswith(".") else name).suffix.lower()
    readers = {
        ".csv": lambda *args: _read_separated(*args, ","),
        ".tsv": lambda *args: _read_separated(*args, "\t"),
        ".jsonl": _read_json,
        ".json": _read_json,
        ".parquet": _read_parquet,
        ".txt": _read_lines,
    }
    if suffix not in readers:
        raise UserError(
            f"ends in {suffix or 'nothing'!r}; must be .csv, .tsv, .jsonl, .json or .parquet (these also as .gz or "
            ".zip), .txt with one text a line, or a folder of .txt files"
        )
    return readers[suffix]


def _read_json(file: BinaryIO, columns: list[str] | None, limit: int | None) -> Table:
    """One object a line or, where the file begins with a bracket, an array of objects. A string is a row with the
    column `text`."""
    found, rows, share = {}, [], None
    with _as_text(file, limit) as lines:
        if _first_character(lines) == "[":
            array = _parse_json(lines.read(), "the file")
            items = ((f"item {number}", item) for number, item in enumerate(array, start=1))
            share = min(1.0, limit / max(len(array), 1)) if limit else 1.0
        else:
            items = parse_json_lines(lines)
        for place, row in islice(items, limit):
            if isinstance(row, str):
                row = {"text": row}
            if not isinstance(row, dict):
                raise UserError(f"{place} is not a JSON object, {{...}}, nor a text in quotes")
            found |= dict.fromkeys(row)
            rows.append([row.get(name) for name in columns] if columns else row)
    if rows and len(rows) != limit:  # a key may come first further down
        _require(columns, list(found))
    if columns is None:
        columns, rows = list(found), [[row.get(name) for name in found] for row in rows]
    return Table(columns, rows, share)


def _first_character(lines: TextIO) -> str:
    first = next((line.lstrip()[0] for line in lines if line.strip()), "")
    lines.seek(0)
    return first


def parse_json_lines(lines: TextIO) -> Iterator[tuple[str, object]]:
    for number, line in enumerate(lines, start=1):
        line = line.strip().removeprefix("\ufeff")  # where files with byte order marks were joined
        if line:
            yield f"line {number}", _parse_json(line, f"line {number}")


def _parse_json(text: str, place: str):
    """UserError, with its place, for what is not JSON, and for a lone surrogate, which no UTF-8 file can hold."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = str(error).replace("line 1 ", "") if place.startswith("line") else error
        raise UserError(f"{place} is not valid JSON ({reason})") from error
    if "\\ud" in text or "\\uD" in text:
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            half = f"\\u{ord(error.object[error.start]):04x}"
            raise UserError(
                f"{place} has {half}, one half of a character whose other half was cut off; remove it there"
            ) from None
    return value


def _read_parquet(file: BinaryIO, columns: list[str] | None, limit: int | None) -> Table:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(file) as parquet:
            names, num_rows = parquet.schema_arrow.names, parquet.metadata.num_rows
            _require(columns, names)
            if limit is None:
                data = parquet.read(columns=columns)
            else:  # an empty file has no batch
                data = next(parquet.iter_batches(limit, columns=columns), parquet.schema_arrow.empty_table())
            values = [
                data.column(name if columns else place).to_pylist() for place, name in enumerate(columns or names)
            ]
    except pa.ArrowException as error:
        raise UserError(f"not a Parquet file ({error})") from error
    rows = [list(row) for row in zip(*values, strict=True)]
    return Table(columns or names, rows, len(rows) / num_rows if num_rows else 1.0)


def _read_lines(file: BinaryIO, columns: list[str] | None, limit: int | None) -> Table:
    """A text file with one text a line, in the column `text`."""
    _require(columns, ["text"])
    with _as_text(file, limit) as lines:
        texts = (line.rstrip("\n") for line in lines if line.strip())
        return Table(["text"], [[text] for text in islice(texts, limit)])


def _read_folder(path: Path, columns: list[str] | None, limit: int | None) -> Table:
    """One text a file, in the column `text`; `name` is the file's, with its folder, without .txt."""
    _require(columns, ["name", "text"])
    files = find_text_files(path)
    rows = []
    for file in files[:limit]:
        name = str(file.relative_to(path).with_suffix("")).encode("utf-8", "surrogateescape").decode("utf-8", "replace")
        try:
            with file.open("rb") as binary, _as_text(binary) as text:
                rows.append({"name": name, "text": text.read()})
        except UnicodeDecodeError:
            raise UserError(f"{file.name}: {_describe_encoding(file, '.txt')}") from None
        except UserError as error:
            raise UserError(f"{file.name}: {error}") from None
        except OSError as error:
            raise UserError(f"{file.name}: cannot be read ({error.strerror})") from error
    names = columns or ["name", "text"]
    return Table(names, [[row[name] for name in names] for row in rows], len(rows) / len(files) if files else 1.0)


def find_text_files(folder: Path) -> list[Path]:
    """The .txt files of a folder and the folders in it, sorted: links are followed, each file counts once, and names
    that begin with a dot are left out (`.ipynb_checkpoints`, `.git`)."""
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
            raise UserError(f"{file}: a link to a file that is not there; remove it")
        unique.setdefault(os.path.realpath(file), file)
    return list(unique.values())
