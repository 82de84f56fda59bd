"""Files of texts: find -> read -> clean. One row is one text, and what else is known of it.

A table is a CSV, TSV, JSONL or Parquet file, or a folder of .txt files, whose columns are `name` and `text`.
"""

import json
import re
import urllib.request
import uuid
from http.client import HTTPException
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from neoflix.console import say
from neoflix.ds_config import ROOT
from neoflix.errors import UserError
from neoflix.hub_copies import hub_copy_file
from neoflix.plan import USUAL_COLUMNS
from neoflix.template import Template

NETFLIX_PATH = ROOT / "data" / "netflix_titles.csv"
NETFLIX_URL = (
    "https://raw.githubusercontent.com/rfordatascience/tidytuesday/main/data/2021/2021-04-20/netflix_titles.csv"
)
SAMPLE_PATH = ROOT / "data" / "sample_titles.csv"
PROSE = 5  # words that the texts of a column have on average, at least; names, dates and lists of genres have fewer
HEAD = 1000  # rows that are looked at where the columns are not known
HUB_NAME = re.compile(r"hf:(?P<path>[^@:]+)(@(?P<config>[^:]+))?(:(?P<split>.+))?")


def default_cache_dir() -> Path:
    """Caches lie beside Hugging Face's data set cache (HF_DATASETS_CACHE moves both)."""
    from datasets import config

    return Path(config.HF_DATASETS_CACHE) / "neoflix"


# ---- find -----------------------------------------------------------------------------------------------


def find_dataset(name: str, cache_dir: Path | None = None) -> Path:
    """A file or folder for `--dataset`: 'netflix' (downloaded if need be), 'sample', a path, or 'hf:NAME', a data set
    of the Hugging Face hub, which becomes a Parquet file in `cache_dir`."""
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
        if not any(path.rglob("*.txt")):
            raise UserError(
                f"--dataset {name}: a folder without a .txt file; name one that has some, or a CSV, TSV, JSONL or "
                "Parquet file"
            )
    elif not path.is_file():
        raise UserError(f"--dataset {name}: no such file (or say 'netflix', 'sample', or hf:NAME for one of the hub)")
    return path


def download_netflix(path: Path, url: str = NETFLIX_URL) -> None:
    """Fetches the Netflix catalogue (3 MB, no login); `path` appears whole and checked, or not at all."""
    say(f"Downloading the Netflix titles to {path}")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.part")
    try:
        with urllib.request.urlopen(url, timeout=60) as response:
            partial.write_bytes(response.read())
        if len(read_texts(partial, "description", suffix=".csv")) < 1000:
            raise UserError("the file is too short to be the catalogue")
        partial.replace(path)
    except (OSError, HTTPException, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise UserError(
            f"--dataset netflix: could not be downloaded from {url} ({reason}); save that file as {path}, "
            "or try --dataset sample"
        ) from error
    finally:
        partial.unlink(missing_ok=True)


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
        file.parent.mkdir(parents=True, exist_ok=True)
        unfinished = file.with_name(f"{file.name}.{uuid.uuid4().hex}.part")
        dataset.to_parquet(unfinished)
        unfinished.replace(file)
    return file


# ---- read -----------------------------------------------------------------------------------------------


def read_texts(
    path: Path, column: str | None = None, template: Template | None = None, suffix: str | None = None
) -> list[str]:
    """Texts of one column, trimmed, rows without text left out; otherwise as they stand, in the file's order.

    Args:
        column: None: the template's, else the one that `guess_column` finds.
        template: gives each text a prompt of other columns (`PromptedText`).
        suffix: what kind of file it is, where its name does not say.

    Raises:
        UserError, in one sentence, for every file that is not a table with such columns.
    """
    if template:
        column = template.text_field
    elif column is None:
        column = guess_column(path)
    columns = [column, *(template.fields if template else [])]
    table = read_table(path, columns, suffix, ("--dataset", "--template" if template else "--text_column"))
    texts = _clean(table[column], path, column)
    if not template:
        return texts.tolist()
    fields = [table[name][texts.index].map(_as_field) for name in template.fields]
    rows = zip(texts, *fields, strict=True)
    return [template.fill(dict(zip([column, *template.fields], row, strict=True))) for row in rows]


def read_dataset(args) -> list[str]:
    """The texts that `train.py`'s arguments name: `--dataset`, `--text_column`, `--template`."""
    path = find_dataset(args.dataset, args.cache_dir and Path(args.cache_dir))
    return read_texts(path, args.text_column, args.text_template)


def read_fields(given: dict[str, str], file: str | None, template: Template | None) -> list[dict[str, str]]:
    """The fields of one prompt or, with a file, of one for each row: those of its columns that the template has, where
    they are not empty, and `given` besides.

    UserError where there is no template, or the file has none of its columns, or a field is none of its.
    """
    if template is None:
        raise UserError("--fields: the model was trained without --template; say how texts begin with --prompt")
    template.check(given, f"--fields {' '.join(given)}")
    if file is None:
        return [given]
    path = Path(file)
    if not path.is_file():
        raise UserError(f"--fields_file {file}: no such file")
    said = ("--fields_file", "--fields_file")
    columns = list(read_table(path, None, said=said).columns)
    known = [name for name in template.fields if name in columns]
    if not known:
        raise UserError(
            f"--fields_file {file}: has none of the columns {', '.join(template.fields)}, but {', '.join(columns)}"
        )
    table = read_table(path, known, said=said).map(_as_field)
    return [given | {name: value for name, value in row.items() if value} for row in table.to_dict("records")]


def _as_field(value) -> str:
    """A cell as a prompt has it: nothing where it is empty, whole numbers without a point, lists with commas."""
    if isinstance(value, str):
        return value.strip()
    if isinstance(value, list | tuple) or type(value).__name__ == "ndarray":
        return ", ".join(map(_as_field, value))
    if pd.isna(value):
        return ""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def guess_column(path: Path) -> str:
    """The column of a table that holds the texts, where nobody says: 'description', 'text', or the only one that looks
    like texts. UserError, with the columns to choose from, where there is none or more than one."""
    head = read_table(path, None)
    if usual := [name for name in USUAL_COLUMNS if name in head.columns]:
        return usual[0]
    texts = head.select_dtypes(["object", "string"])
    lengths = {
        name: values[values.map(type).eq(str) & values.ne("")].str.split().str.len().mean()
        for name, values in texts.items()
    }
    prose = [name for name, length in lengths.items() if length >= PROSE]
    if len(prose) == 1:
        say(f"--text_column is not given: taking {prose[0]}, the one column of {path} that holds texts")
        return prose[0]
    few = "none of them holds" if not prose else f"{' and '.join(prose)} hold"
    raise UserError(
        f"--text_column is not given, and {path} has no column {' or '.join(USUAL_COLUMNS)}; it has "
        f"{', '.join(map(str, head.columns))}, and {few} texts of {PROSE} words or more: name one"
    )


def read_table(
    path: Path,
    columns: list[str] | None,
    suffix: str | None = None,
    said: tuple[str, str] = ("--dataset", "--text_column"),
) -> pd.DataFrame:
    """These columns of a table, as they stand; None: all of them, of the first 1,000 rows.

    Args:
        said: the flags by which the user named the file, and the columns.
    """
    suffix = (suffix or path.suffix).lower()
    readers = {".csv": _read_separated, ".tsv": _read_separated, ".jsonl": _read_jsonl, ".parquet": _read_parquet}
    reader = _read_folder if path.is_dir() else readers.get(suffix)
    if reader is None:
        raise UserError(
            f"{said[0]} {path}: ends in {suffix or 'nothing'!r}; must be .csv, .tsv, .jsonl or .parquet, or a folder "
            "of .txt files"
        )
    if path.is_file() and path.stat().st_size == 0:
        raise UserError(f"{said[0]} {path}: the file is empty")
    try:
        table = reader(path, columns)
    except MissingColumnError as error:
        raise UserError(f"{said[1]} {error}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{said[0]} {path}: not UTF-8 at byte {error.start}; save it as UTF-8") from error
    except OSError as error:
        raise UserError(f"{said[0]} {path}: cannot be read ({error.strerror or error})") from error
    except ValueError as error:
        raise UserError(f"{said[0]} {path}: {error}") from error
    if len(table) == 0:
        raise UserError(f"{said[0]} {path}: has a header but no rows")
    return table


class MissingColumnError(UserError):
    pass


def _require(path: Path, columns: list[str] | None, found) -> None:
    for name in columns or []:
        if name not in found:
            raise MissingColumnError(f"{name}: not a column of {path}; it has {', '.join(map(str, found))}")


def _read_separated(path: Path, columns: list[str] | None) -> pd.DataFrame:
    # pandas' own parser fills short rows up in silence; pyarrow's refuses rows of the wrong width.
    options = {"sep": "\t" if path.suffix.lower() == ".tsv" else ",", "dtype": str, "keep_default_na": False}
    try:
        if columns is None:
            return pd.read_csv(path, nrows=HEAD, encoding="utf-8", **options)
        _require(path, columns, list(pd.read_csv(path, nrows=0, encoding="utf-8", **options).columns))
        return pd.read_csv(path, usecols=columns, engine="pyarrow", **options)
    except pd.errors.EmptyDataError as error:
        raise UserError("the file is empty") from error
    except (pd.errors.ParserError, pa.ArrowInvalid) as error:
        if "UTF8" in str(error):
            raise UserError(f"not UTF-8 ({error}); save it as UTF-8") from error
        message = " ".join(str(error).split())
        raise UserError(f"a row has too many or too few fields, or a quote is not closed ({message[:160]})") from error


def _read_jsonl(path: Path, columns: list[str] | None) -> pd.DataFrame:
    rows, found = [], {}
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise UserError(f"line {number} is not valid JSON ({error})") from error
            if not isinstance(row, dict):
                raise UserError(f"line {number} is not a JSON object, {{...}}")
            found |= dict.fromkeys(row)
            rows.append([row.get(name) for name in columns] if columns else row)
            if columns is None and len(rows) == HEAD:
                break
    if rows:
        _require(path, columns, found)
    if columns is None:
        columns, rows = list(found), [[row.get(name) for name in found] for row in rows]
    return pd.DataFrame(rows, columns=columns, dtype=object)


def _read_parquet(path: Path, columns: list[str] | None) -> pd.DataFrame:
    try:
        if columns is None:
            return next(pq.ParquetFile(path).iter_batches(HEAD)).to_pandas()
        _require(path, columns, pq.read_schema(path).names)
        return pd.read_parquet(path, columns=columns)
    except pa.ArrowInvalid as error:
        raise UserError(f"not a Parquet file ({error})") from error


def _read_folder(path: Path, columns: list[str] | None) -> pd.DataFrame:
    _require(path, columns, ["name", "text"])
    files = sorted(path.rglob("*.txt"))[: HEAD if columns is None else None]
    rows = []
    for file in files:
        try:
            rows.append((str(file.relative_to(path).with_suffix("")), file.read_text(encoding="utf-8")))
        except UnicodeDecodeError as error:
            raise UserError(f"{file.name} is not UTF-8 at byte {error.start}; save it as UTF-8") from error
    return pd.DataFrame(rows, columns=["name", "text"], dtype=object)


# ---- clean ----------------------------------------------------------------------------------------------


def _clean(values: pd.Series, path: Path, column: str) -> pd.Series:
    """The rows that hold a text, trimmed, with their place in the file as index."""
    values = values.dropna()
    if pd.api.types.is_numeric_dtype(values) and len(values):
        raise UserError(f"--text_column {column}: holds numbers in {path}; name a column of texts")
    if not values.map(type).eq(str).all():
        raise UserError(f"--text_column {column}: holds values that are not text in {path}; name a column of texts")
    texts = values.str.strip()
    texts = texts[texts.ne("")]
    if not len(texts):
        raise UserError(f"--text_column {column}: every row of {path} is empty there")
    if pd.to_numeric(texts, errors="coerce").notna().all():
        raise UserError(f"--text_column {column}: holds numbers in {path}; name a column of texts")
    return texts
