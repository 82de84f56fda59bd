"""From bytes to text: compression, encodings, lines."""

import gzip
import io
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, TextIO

from neoflix.data.rows import FileError
from neoflix.runtime.errors import UserError


@contextmanager
def unpack(raw: BinaryIO, name: str) -> Iterator[tuple[BinaryIO, str]]:
    """Yields (the content of a file, the name whose ending is its format), unpacked if it is a gzip or zip file."""
    if name.lower().endswith(".gz"):
        with gzip.open(raw) as file:
            yield file, name[: -len(".gz")]
    elif name.lower().endswith(".zip"):
        try:
            with zipfile.ZipFile(raw) as archive:
                member = _find_member(archive)
                with archive.open(member) as file:
                    yield file, member
        except (zipfile.BadZipFile, NotImplementedError) as error:
            raise FileError(f"cannot be unpacked ({error})") from error
        except RuntimeError as error:
            if "password" not in str(error):
                raise
            raise FileError("is encrypted; unpack it first") from error
    else:
        yield raw, name


def _find_member(archive: zipfile.ZipFile) -> str:
    hidden = (".", "__MACOSX")
    members = [
        name
        for name in archive.namelist()
        if not name.endswith("/") and not any(part.startswith(hidden) for part in name.split("/"))
    ]
    if len(members) != 1:
        some = ", ".join(members[:5]) + (", ..." if len(members) > 5 else "")
        raise FileError(f"holds {len(members)} files ({some or 'none'}), must be one; unpack it and name the file")
    return members[0]


@contextmanager
def as_text(file: BinaryIO, limit: int | None = None, newline: str | None = None) -> Iterator[TextIO]:
    """Decodes a file as UTF-8, without its byte order mark.

    Args:
        limit: rows that will be read; None: all of them.
        newline: "" keeps line ends as they are; by default each becomes "\\n".
    """
    if encoding := _find_wide_encoding(file.peek(64)[:64]):
        raise FileError(f"not UTF-8 but {encoding}; save it as UTF-8")
    text = io.TextIOWrapper(file, encoding="utf-8-sig", newline=newline)
    if limit is not None:  # the number of rows is estimated by how far the file was read: read it in small steps
        text._CHUNK_SIZE = 512
    try:
        yield text
    finally:
        text.detach()  # or it would close the file


def _find_wide_encoding(head: bytes) -> str | None:
    """Recognizes UTF-16 and UTF-32 by the byte order mark, or by the zeros that every Latin letter has in them."""
    if head.startswith((b"\xff\xfe\0\0", b"\0\0\xfe\xff")):
        return "UTF-32"
    if head.startswith((b"\xff\xfe", b"\xfe\xff")) or head.count(0) > len(head) // 3:
        return "UTF-16"
    return None


def describe_encoding(path: Path, suffix: str | None) -> str:
    """Where a file is not UTF-8, for an error."""
    with path.open("rb") as raw, unpack(raw, suffix or path.name) as (file, _):
        number = next(number for number, line in enumerate(file, start=1) if not _is_utf8(line))
    return f"not UTF-8 in line {number}; save it as UTF-8 (it may be Windows-1252 or Latin-1)"


def _is_utf8(line: bytes) -> bool:
    try:
        line.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def read_lines(path: Path) -> list[str]:
    """The lines of a UTF-8 text file that are not blank; only \\n, \\r\\n and \\r end a line.

    Raises:
        UserError: if the file is not UTF-8; the message does not name the file.
    """
    with path.open("rb") as file:
        try:
            with as_text(file) as lines:
                return [line.rstrip("\n") for line in lines if line.strip()]
        except UnicodeDecodeError:
            raise UserError(describe_encoding(path, ".txt")) from None
        except FileError as error:
            raise UserError(str(error)) from None
