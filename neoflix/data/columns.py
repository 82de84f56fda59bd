"""Which column of a table holds the texts, and which of its values are texts."""

import re
import textwrap
from pathlib import Path

from neoflix.data.rows import Table
from neoflix.runtime.errors import UserError

USUAL_COLUMNS = ("description", "text")  # names of the column of texts

PROSE = 5  # words that the texts of a column have on average, at least; names, dates and lists of genres have fewer

WITHOUT_SPACES = re.compile(r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff]")  # Thai to Chinese


def choose_column(head: Table, path: Path) -> str:
    """The column of texts of a file, by its first rows: the only column named 'description' or 'text' (in any letter
    case), unless most of its rows are empty; else the only one that looks like texts.

    Raises:
        UserError: if there is no such column, or more than one; it lists the columns to choose from.
    """
    texts = {name: list(filter(is_text, head.column(name))) for name in head.names}
    usual = [name for name in texts if name.strip().lower() in USUAL_COLUMNS and texts[name]]
    prose = [name for name, cells in texts.items() if name not in usual and _num_words(cells) >= PROSE]
    choices = usual if len(usual) == 1 and 2 * len(texts[usual[0]]) >= len(head.rows) else usual + prose
    if len(choices) == 1:
        if _num_words(choices) >= PROSE:
            raise UserError(
                f"--text_column is not given, and the column of texts in {path} is named {choices[0]!r}, which looks "
                "like a text itself; add a header line to the file, or name the column"
            )
        return choices[0]
    flag = f"--text_column is not given, and {path} has the columns {', '.join(head.names)}"
    if not choices:
        raise UserError(f"{flag}; none of them holds texts of {PROSE} words or more: name one")
    counts = [f"{name} ({len(texts[name]):,} of {len(head.rows):,} rows)" for name in choices]
    raise UserError(f"{flag}; texts are in {' and '.join(counts)}: name one")


def is_text(cell) -> bool:
    return isinstance(cell, str) and bool(cell.strip())


def _num_words(cells: list[str]) -> float:
    """Words per text, on average; in a script without spaces, two letters count as a word."""
    num_words = sum(len(cell.split()) + len(WITHOUT_SPACES.findall(cell)) / 2 for cell in cells)
    return num_words / max(len(cells), 1)


def clean_texts(cells: list, path: Path, column: str) -> list[str]:
    """The text of each row, trimmed, or "" if it has none.

    Raises:
        UserError: for a column without texts, a column of numbers, and a cell that is not text.
    """
    values = ["" if is_missing(cell) else cell for cell in cells]
    texts = [value.strip() if isinstance(value, str) else value for value in values]
    filled = [text for text in texts if text != ""]
    if not filled:
        raise UserError(f"--text_column {column}: every row of {path} is empty there; name another column")
    if all(map(_is_number, filled)):
        raise UserError(f"--text_column {column}: holds numbers in {path}; name a column of texts")
    for number, text in enumerate(texts, start=1):
        if not isinstance(text, str):
            shown = textwrap.shorten(repr(text), 40)
            raise UserError(
                f"--text_column {column}: row {number} of {path} holds {shown}, which is not text; correct it there"
            )
    return texts


def _is_number(value) -> bool:
    try:
        float(value)
    except (TypeError, ValueError):
        return False
    return True


def is_missing(cell) -> bool:
    return cell is None or cell != cell  # NaN, as pandas writes it
