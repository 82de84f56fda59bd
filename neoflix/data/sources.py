"""Reads the texts of a data set: finds its file, chooses the column, leaves out rows without text.

`tables.py` reads each format. Nothing here imports torch, because `--plan` reads the first texts too.
"""

import urllib.request
from http.client import HTTPException
from pathlib import Path

from neoflix.data.columns import choose_column, clean_texts, is_text
from neoflix.data.fields import as_field
from neoflix.data.hub import download_from_hub, find_hub_copy
from neoflix.data.rows import Table
from neoflix.data.tables import find_text_files, read_table
from neoflix.data.template import Example, Template
from neoflix.runtime.cache import default_cache_dir, new_path
from neoflix.runtime.console import say
from neoflix.runtime.errors import UserError
from neoflix.runtime.files import ROOT

SAMPLE_PATH = ROOT / "data" / "sample_titles.csv"
NETFLIX_PATH = ROOT / "data" / "netflix_titles.csv"
NETFLIX_URL = (
    "https://raw.githubusercontent.com/rfordatascience/tidytuesday/main/data/2021/2021-04-20/netflix_titles.csv"
)


def find_dataset(name: str, cache_dir: Path | None = None) -> Path:
    """The file or folder of a `--dataset`.

    Args:
        name: 'netflix' (downloaded once), 'sample', a path, or 'hf:NAME', a data set of the Hugging Face hub, which is
            kept in `cache_dir` as a Parquet file.

    Raises:
        UserError: if there is no such file, folder or data set, or a folder has no .txt file.
    """
    if not name.strip():
        raise UserError("--dataset is empty; use 'netflix', 'sample', a file, a folder of .txt files, or hf:NAME")
    if name == "sample":
        return SAMPLE_PATH
    if name == "netflix":
        if not NETFLIX_PATH.is_file():
            download_netflix(NETFLIX_PATH)
        return NETFLIX_PATH
    if name.startswith("hf:"):
        return download_from_hub(name, cache_dir or default_cache_dir())
    path = Path(name).expanduser()
    if path.is_dir():
        if not find_text_files(path):
            raise UserError(
                f"--dataset {name}: a folder without a .txt file; name one that has some, or a CSV, TSV, JSONL, JSON "
                "or Parquet file"
            )
    elif not path.is_file():
        raise UserError(f"--dataset {name}: no such file or folder (other names are 'netflix', 'sample' and hf:NAME)")
    return path


def find_local_dataset(name: str, cache_dir: Path) -> Path | None:
    """As `find_dataset`, but without the network: None if the data would have to be downloaded."""
    if name.startswith("hf:"):
        return find_hub_copy(name, cache_dir)
    if name == "netflix" and not NETFLIX_PATH.is_file():
        return None
    return find_dataset(name)


def download_netflix(path: Path, url: str = NETFLIX_URL) -> None:
    """Downloads the Netflix catalogue (3 MB, no login). `path` appears complete and checked, or not at all."""
    say(f"Downloading the Netflix titles to {path}")
    try:
        with new_path(path) as partial, urllib.request.urlopen(url, timeout=60) as response:
            partial.write_bytes(response.read())
            if len(read_table(partial, ["description"], suffix=".csv").rows) < 1000:
                raise UserError("the file is too short to be the catalogue")
    except (OSError, HTTPException, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise UserError(
            f"--dataset netflix: could not be downloaded from {url} ({reason}); save that file as {path}, "
            "or use --dataset sample"
        ) from error


def read_dataset(args) -> list[Example]:
    """Reads the texts that the arguments of `train.py` name: `--dataset`, `--text_column`, `--template`."""
    path = find_dataset(args.dataset, args.cache_dir and Path(args.cache_dir))
    return read_examples(path, args.text_column, args.text_template)


def read_examples(path: Path, column: str | None = None, template: Template | None = None) -> list[Example]:
    """Reads the texts of one column, trimmed, in the file's order. Opens the file once.

    Prints which column it is and how many rows have no text; these are left out.

    Args:
        column: None: the template's, or else the one that `choose_column` finds.
        template: makes each text a prompt of other columns.

    Raises:
        UserError: if the file is not a table with such columns.
    """
    table = _read_columns(path, column, template)
    column = table.names[0]
    examples = _to_examples(table, path, template)
    num_empty = len(table.rows) - len(examples)
    from_lines = ", one a line" if path.suffix.lower() == ".txt" else ""
    empty = f"; {num_empty:,} of {len(table.rows):,} rows have no text there and are left out" if num_empty else ""
    for name in template.fields if template else []:
        if missing := sum(not as_field(cell) for cell in table.column(name)):
            empty += f"; column {name} is empty in {missing:,}"
    warning = "warning: " if num_empty > len(examples) else ""
    say(f"{warning}{path}: {len(examples):,} texts of column {column}{from_lines}{empty}")
    return examples


def sample_examples(
    path: Path, column: str | None, template: Template | None, num_rows: int
) -> tuple[list[Example], int]:
    """(the texts of the first rows, as `read_examples` reads them; about how many texts the file has)

    Opens the file once, or twice if the first rows have no text.
    """
    table = _read_columns(path, column, template, limit=num_rows)
    if not any(map(is_text, table.column(table.names[0]))):  # the first text is further down, or there is none
        table = _read_columns(path, column, template)
    examples = _to_examples(table, path, template)
    return examples, round(len(examples) / table.share)


def _read_columns(path: Path, column: str | None, template: Template | None, limit: int | None = None) -> Table:
    """A table whose first column holds the texts and whose others are the template's fields."""

    def choose(head: Table) -> list[str]:
        return [choose_column(head, path)]

    if template:
        return read_table(path, [template.text_field, *template.fields], limit, column_flag="--template")
    return read_table(path, [column] if column else choose, limit)


def _to_examples(table: Table, path: Path, template: Template | None) -> list[Example]:
    column = table.names[0]
    texts = clean_texts(table.column(column), path, column)
    if template is None:
        return [Example("", text) for text in texts if text]
    rows = zip(texts, table.rows, strict=True)
    return [
        template.fill({name: as_field(cell) for name, cell in zip(table.names, row, strict=True)} | {column: text})
        for text, row in rows
        if text
    ]
