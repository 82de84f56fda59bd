import gzip
import json
import os
import subprocess
import zipfile
from pathlib import Path

import pandas as pd
import pytest
from conftest import PYTHON, ROOT

from neoflix.data.sources import find_dataset, read_examples
from neoflix.data.tables import find_text_files, read_table
from neoflix.data.template import Template
from neoflix.runtime.errors import UserError


def read_texts(path: Path, column: str | None = None) -> list[str]:
    return [example.completion for example in read_examples(path, column)]


TEXTS = ["Plain.", 'Two,  "quoted" fields; and a\nline.', "  trimmed  ", "", "NA", "Café — naïve"]
KEPT = ["Plain.", 'Two,  "quoted" fields; and a\nline.', "trimmed", "NA", "Café — naïve"]


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
def test_every_format_gives_the_same_texts(tmp_path, suffix):
    path = tmp_path / f"texts{suffix}"
    frame = pd.DataFrame({"n": range(len(TEXTS)), "text": TEXTS})
    if suffix == ".jsonl":
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n\n" for row in frame.to_dict("records")))
    elif suffix == ".parquet":
        frame.to_parquet(path)
    else:
        frame.to_csv(path, index=False, sep="," if suffix == ".csv" else "\t")
    assert read_texts(path, "text") == KEPT


def test_null_values_are_rows_without_text(tmp_path):
    path = tmp_path / "nulls.jsonl"
    path.write_text('{"text": "one"}\n{"text": null}\n{"n": 1}\n{"text": "two"}\n')
    assert read_texts(path, "text") == ["one", "two"]


BAD_FILES = {
    "empty.csv": (b"", "is empty"),
    "blank.csv": (b"\n\n", "is empty"),
    "header_only.csv": (b"title,description\n", "no rows"),
    "wrong_column.csv": (b"title,synopsis\na,b\n", "it has title, synopsis"),
    "no_texts.csv": (b"title,description\na,\nb,  \n", "every row"),
    "latin1.csv": (b"title,description\n" + b"a,b\n" * 99_998 + "a,café\n".encode("latin-1"), "UTF-8 in line 100000;"),
    "latin1_header.csv": ("título,description\na,b\n".encode("latin-1"), "not UTF-8"),
    "short_row.csv": (b"title,description\na,b\nc\n", "line 3 has 1 field, the header has 2"),
    "long_row.csv": (b'title,description\n"a\na","b\nb"\nc,d,e\n', "line 5 has 3 fields, the header has 2"),
    "unclosed.csv": (b'title,description\na,b\na,"b\nc,d\n', "a quote that opens in line 3 is not closed"),
    "quotes.csv": (b'title,description\na,"b "c" d"\n', "line 2 has text after a closing quote"),
    "twice.csv": (b"description,title,description\na,b,c\n", "2 columns of .* have this name"),
    "utf16.csv": ("title,description\na,b\n".encode("utf-16"), "not UTF-8 but UTF-16"),
    "utf16_without_mark.csv": ("title,description\na,b\n".encode("utf-16-le"), "not UTF-8 but UTF-16"),
    "utf32.jsonl": ('{"description": "a"}\n'.encode("utf-32"), "not UTF-8 but UTF-32"),
    "semicolons.csv": (b"title;description\na;b\nc;d;e\n", "line 3 has 3 fields, the header has 2"),
    "mixed.jsonl": (b'{"description": "a"}\n{"description": 12345}\n', "row 2 of .* holds 12345, which is not text"),
    "lists.json": (b'[{"description": "a"}, ["b"]]', "item 2 .*JSON object"),
    "broken.json": (b'[{"description": "a"}', "not valid JSON"),
    "half.jsonl": (
        b'{"description": "a"}\n{"description": "b \\ud83d"}\n',
        r"line 2 has .ud83d, one half of a character",
    ),
    "half.json": (b'[{"description": "a \\uDE00"}]', r"the file has .ude00, one half of a character"),
    "cut.csv.gz": (gzip.compress(b"title,description\na,b\n" * 99)[:-9], "damaged or incomplete"),
    "not.csv.gz": (b"title,description\na,b\n", "cannot be read .Not a gzipped file"),
    "not.zip": (b"title,description\na,b\n", "cannot be unpacked"),
    "latin1.csv.gz": (gzip.compress("title,description\na,café\n".encode("latin-1")), "not UTF-8 in line 2"),
    "numbers.csv": (b"title,description\na,1999\nb,2001\n", "holds numbers"),
    "broken.jsonl": (b'{"description": "a"}\n{"description": "b"\n', "line 2"),
    "list.jsonl": (b'{"description": "a"}\n["b"]\n', "line 2"),
    "wrong_key.jsonl": (b'{"synopsis": "a"}\n', "it has synopsis"),
    "numbers.jsonl": (b'{"description": 1}\n{"description": 2}\n', "not text|numbers"),
    "latin1.jsonl": ('{"description": "café"}\n'.encode("latin-1"), "not UTF-8"),
    "not.parquet": (b"title,description\na,b\n", "not a Parquet file"),
    "prose.docx": (b"PK", "must be .csv"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files_are_refused(tmp_path, name):
    content, message = BAD_FILES[name]
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        read_texts(path, "description")
    assert "\n" not in str(error.value)
    assert name in str(error.value)


ROWS = [{"text": "One.", "n": 1}, {"text": "Two\nlines, 😀."}]
JSON_LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


@pytest.mark.parametrize("content", ['["One.", "Two."]', '"One."\n"Two."\n', '["One.", {"text": "Two."}]'])
def test_json_strings_are_texts(tmp_path, content):
    (tmp_path / "texts.json").write_text(content)
    assert read_texts(tmp_path / "texts.json", "text") == ["One.", "Two."]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "lines.json", "array.jsonl"])
@pytest.mark.parametrize("packing", ["", ".gz", ".zip"])
def test_json_and_what_it_is_packed_in(tmp_path, name, packing):
    content = (json.dumps(ROWS, indent=1) if "array" in name or name == "rows.json" else JSON_LINES).encode()
    path = tmp_path / f"{name}{packing}"
    if packing == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(f"folder/{name}", content)
            archive.writestr("__MACOSX/._rows.jsonl", b"x")
    else:
        path.write_bytes(gzip.compress(content) if packing else content)
    assert read_texts(path) == ["One.", "Two\nlines, 😀."]
    assert read_table(path).rows == [["One.", 1], ["Two\nlines, 😀.", None]]


def test_a_column_that_is_the_index_of_a_parquet_file(tmp_path):
    frame = pd.DataFrame({"text": ["One.", None], "key": ["a", "b"], "n": [1, None]}).set_index("key")
    frame.to_parquet(tmp_path / "index.parquet")
    assert read_table(tmp_path / "index.parquet", ["key", "text"]).rows == [["a", "One."], ["b", None]]
    assert [
        each[:2] for each in read_examples(tmp_path / "index.parquet", template=Template("{n} | {key}: {text}"))
    ] == [("1 | a:", " One.")]
    frame[:0].to_parquet(tmp_path / "empty.parquet")
    with pytest.raises(UserError, match=r"empty\.parquet: .*no rows"):
        read_texts(tmp_path / "empty.parquet")


def test_each_file_of_a_folder_is_a_text(tmp_path):
    (tmp_path / "old").mkdir()
    for name, text in (
        ("b.txt", "The second."),
        ("a.txt", " The first.\n"),
        ("old/c.txt", "The third."),
        ("n.md", "No."),
    ):
        (tmp_path / name).write_text(text, encoding="utf-8")
    found = find_dataset(str(tmp_path))
    assert read_texts(found) == ["The first.", "The second.", "The third."]
    assert read_examples(found, template=Template("{name}: {text}"))[2].whole == "old/c: The third."
    (tmp_path / "d.txt").write_bytes("é".encode("latin-1"))
    with pytest.raises(UserError, match=r"d\.txt: not UTF-8"):
        read_texts(found)


def test_the_text_files_of_a_folder(tmp_path):
    """In any letter case, by links too, each once; drafts in hidden folders are not read."""
    folder, elsewhere = tmp_path / "texts", tmp_path / "elsewhere"
    for path in (folder / ".ipynb_checkpoints", folder / "b", elsewhere):
        path.mkdir(parents=True)
    for path in ("a.TXT", ".ipynb_checkpoints/a-checkpoint.txt", ".hidden.txt", "b/c.txt", "notes.md"):
        (folder / path).write_text(f"Text {path}.")
    (elsewhere / "d.txt").write_text("Text d.")
    os.symlink(elsewhere, folder / "linked")
    os.symlink(folder, folder / "b" / "loop")
    os.symlink(folder / "a.TXT", folder / "z.txt")
    assert [str(path.relative_to(folder)) for path in find_text_files(folder)] == ["a.TXT", "b/c.txt", "linked/d.txt"]
    assert read_texts(folder) == ["Text a.TXT.", "Text b/c.txt.", "Text d."]
    os.symlink(tmp_path / "gone.txt", folder / "broken.txt")
    with pytest.raises(UserError, match=r"broken\.txt: a link"):
        read_texts(folder)


@pytest.mark.process
def test_reading_needs_no_torch():
    code = "import neoflix.data.sources, sys; sys.exit(bool({'torch', 'pandas', 'datasets'} & sys.modules.keys()))"
    subprocess.run([PYTHON, "-c", code], cwd=ROOT, check=True, timeout=120)
