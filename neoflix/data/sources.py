"""Texts of a file: find it, choose its column, read it, leave out rows without text. No torch: `--plan` uses this too.

How each format becomes rows is in `tables.py`.
"""

import os
import re
import urllib.request
from http.client import HTTPException
from pathlib import Path

from neoflix.data.columns import choose_column, clean_texts, is_text
from neoflix.data.fields import as_field
from neoflix.data.hub_copies import find_hub_copy, hub_copy_file
from neoflix.data.rows import Table
from neoflix.data.tables import find_text_files, read_table
from neoflix.data.template import Example, Template
from neoflix.runtime.cache import in_cache, new_path
from neoflix.runtime.console import say
from neoflix.runtime.errors import UserError
from neoflix.runtime.files import ROOT

NETFLIX_PATH = ROOT / "data" / "netflix_titles.csv"


NETFLIX_URL = (
    "https://raw.githubusercontent.com/rfordatascience/tidytuesday/main/data/2021/2021-04-20/netflix_titles.csv"
)


SAMPLE_PATH = ROOT / "data" / "sample_titles.csv"


HUB_NAME = re.compile(r"hf:(?P<path>[^@:]+)(@(?P<config>[^:]+))?(:(?P<split>.+))?")


def default_cache_dir() -> Path:
    """Caches lie beside Hugging Face's data set cache, where its own variables say; `datasets` takes long to import."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache"))
    home = Path(os.environ.get("HF_HOME", cache / "huggingface"))
    return Path(os.environ.get("HF_DATASETS_CACHE", home / "datasets")).expanduser() / "neoflix"


def find_dataset(name: str, cache_dir: Path | None = None) -> Path:
    """A file or folder for `--dataset`: 'netflix' (downloaded if need be), 'sample', a path, or 'hf:NAME', a data set
    of the Hugging Face hub, which becomes a Parquet file in `cache_dir`."""
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
    """As `find_dataset`, for data that is on this machine already; None if it would have to be downloaded."""
    if name.startswith("hf:"):
        return find_hub_copy(name, cache_dir)
    if name == "netflix" and not NETFLIX_PATH.is_file():
        return None
    return find_dataset(name)


def download_netflix(path: Path, url: str = NETFLIX_URL) -> None:
    """Fetches the Netflix catalogue (3 MB, no login); `path` appears whole and checked, or not at all."""
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
            "or try --dataset sample"
        ) from error


def download_from_hub(name: str, cache_dir: Path) -> Path:
    """'hf:PATH[@CONFIG][:SPLIT]' -> a Parquet file of that split ('train', if unsaid), downloaded once.

    PATH may be a folder that `datasets` can load. No code of the data set's own is run. UserError, in one sentence,
    where there is no such data set or split.
    """
    from datasets import load_dataset

    match = HUB_NAME.fullmatch(name)
    if match is None:
        raise UserError(f"--dataset {name}: must be hf:NAME, hf:NAME:SPLIT or hf:NAME@CONFIG:SPLIT")
    path, split = match["path"], match["split"] or "train"
    try:
        dataset = load_dataset(path, match["config"], split=split)
    except Exception as error:  # every data set's builder raises its own
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"--dataset {name}: could not be loaded ({reason}); the name is as on huggingface.co/datasets, behind it "
            "@CONFIG where the data set has several and :SPLIT for another one than train"
        ) from error
    file = hub_copy_file(name, dataset._fingerprint, cache_dir)
    if not file.is_file():
        with in_cache(cache_dir), new_path(file) as unfinished:
            dataset.to_parquet(unfinished)
    return file


def read_examples(
    path: Path, column: str | None = None, template: Template | None = None, suffix: str | None = None
) -> list[Example]:
    """Reads the texts of one column, trimmed, in the file's order. Prints which column it is and how many rows have no
    text; these are left out.

    Args:
        column: None: the template's, else the one that `choose_column` finds.
        template: makes each text a prompt of other columns.
        suffix: the format, if the file's name does not end in it.

    Raises:
        UserError: if the file is not a table with such columns.
    """
    column = template.text_field if template else column or choose_column(path, suffix)
    table = _read_columns(path, column, template, suffix=suffix)
    examples = _to_examples(table, path, column, template)
    num_empty = len(table.rows) - len(examples)
    from_lines = ", one a line" if path.suffix.lower() == ".txt" else ""
    empty = f"; {num_empty:,} of {len(table.rows):,} rows have no text there and are left out" if num_empty else ""
    for name in template.fields if template else []:
        if missing := sum(not as_field(cell) for cell in table.column(name)):
            empty += f"; column {name} is empty in {missing:,}"
    warning = "warning: " if num_empty > len(examples) else ""
    say(f"{warning}{path}: {len(examples):,} texts of column {column}{from_lines}{empty}")
    return examples


def read_dataset(args) -> list[Example]:
    """Reads the texts that `train.py`'s arguments name: `--dataset`, `--text_column`, `--template`."""
    path = find_dataset(args.dataset, args.cache_dir and Path(args.cache_dir))
    return read_examples(path, args.text_column, args.text_template)


def sample_examples(
    path: Path, column: str | None, template: Template | None, num_rows: int
) -> tuple[list[Example], int]:
    """(examples of the first rows, by the same rules as all of them; about how many texts the file has)"""
    column = template.text_field if template else column or choose_column(path)
    table = _read_columns(path, column, template, limit=num_rows)
    if not any(map(is_text, table.column(column))):  # the first text is further down, or there is none
        table = _read_columns(path, column, template)
    examples = _to_examples(table, path, column, template)
    return examples, round(len(examples) / table.share)


def _read_columns(path: Path, column: str, template: Template | None, **options) -> Table:
    columns = [column, *(template.fields if template else [])]
    return read_table(path, columns, column_flag="--template" if template else "--text_column", **options)


def _to_examples(table: Table, path: Path, column: str, template: Template | None) -> list[Example]:
    texts = clean_texts(table.column(column), path, column)
    if template is None:
        return [Example("", text) for text in texts if text]
    rows = zip(texts, table.rows, strict=True)
    return [
        template.fill({name: as_field(cell) for name, cell in zip(table.names, row, strict=True)} | {column: text})
        for text, row in rows
        if text
    ]
