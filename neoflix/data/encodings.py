"""From bytes to text: compression, encodings, lines."""

import gzip
import io
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, TextIO

from neoflix.runtime.errors import UserError


@contextmanager
def _unpack(raw: BinaryIO, name: str) -> Iterator[tuple[BinaryIO, str]]:
    """(a file's content, the name that says its format), taken out of gzip or zip."""
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
            raise UserError(f"cannot be unpacked ({error})") from error
        except RuntimeError as error:
            if "password" not in str(error):
                raise
            raise UserError("is encrypted; unpack it first") from error
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
        raise UserError(f"holds {len(members)} files ({some or 'none'}), must be one; unpack it and name the file")
    return members[0]


@contextmanager
def _as_text(file: BinaryIO, limit: int | None = None, newline: str | None = None) -> Iterator[TextIO]:
    """The file decoded as UTF-8, without a byte order mark. With newline="" line ends stay as they are; by default
    each becomes "\\n"."""
    if encoding := _find_wide_encoding(file.peek(64)[:64]):
        raise UserError(f"not UTF-8 but {encoding}; save it as UTF-8")
    text = io.TextIOWrapper(file, encoding="utf-8-sig", newline=newline)
    if limit is not None:  # how far the file was read says how many rows it has: read it in small steps
        text._CHUNK_SIZE = 512
    try:
        yield text
    finally:
        text.detach()  # or it would close the file


def _find_wide_encoding(head: bytes) -> str | None:
    """UTF-16 or UTF-32, by the byte order mark or by the zeros that they have in every Latin letter."""
    if head.startswith((b"\xff\xfe\0\0", b"\0\0\xfe\xff")):
        return "UTF-32"
    if head.startswith((b"\xff\xfe", b"\xfe\xff")) or head.count(0) > len(head) // 3:
        return "UTF-16"
    return None


def _describe_encoding(path: Path, suffix: str | None) -> str:
    with path.open("rb") as raw, _unpack(raw, suffix or path.name) as (file, _):
        number = next(number for number, line in enumerate(file, start=1) if not _is_utf8(line))
    return f"not UTF-8 in line {number}; save it as UTF-8 (it may be Windows-1252 or Latin-1)"


def _is_utf8(line: bytes) -> bool:
    try:
        line.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def read_lines(path: Path) -> list[str]:
    """Lines of a UTF-8 text file that hold text; only \\n, \\r\\n and \\r end a line.

    Raises:
        UserError: where it is not UTF-8, without the file's name.
    """
    with path.open("rb") as file:
        try:
            with _as_text(file) as lines:
                return [line.rstrip("\n") for line in lines if line.strip()]
        except UnicodeDecodeError:
            raise UserError(_describe_encoding(path, ".txt")) from None
