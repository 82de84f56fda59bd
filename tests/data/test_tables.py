"""Files to rows: as Python's csv module reads them, whatever the size; every other format; what ends a line."""

import csv
import gzip
import io
import json
import os
import random
import re
import subprocess
import zipfile
from pathlib import Path

import pandas as pd
import pytest
from conftest import PYTHON, ROOT

from neoflix.checkpoints.names import LIVE_SAMPLES_FILE
from neoflix.data.encodings import read_lines
from neoflix.data.fields import read_fields
from neoflix.data.sources import read_examples
from neoflix.data.tables import find_text_files, read_table
from neoflix.data.template import Template
from neoflix.judging.judge import read_samples
from neoflix.reporting.run_log import read_live_samples, write_live_samples
from neoflix.runtime.errors import UserError

# All that str.splitlines takes for a line's end and a file does not.
NOT_LINE_ENDS = "\u2028\u2029\x85\x0b\x0c\x1c\x1d\x1e"
PIECES = [*"abc ,;|\t\"'", "\n", "\r\n", "\r", '""', "word", "é", "日本", "😀", "\0", *NOT_LINE_ENDS]


def read_texts(path: Path, column: str | None = None) -> list[str]:
    return [example.completion for example in read_examples(path, column)]


def random_cell(rng: random.Random, longest: int) -> str:
    return "".join(rng.choices(PIECES, k=rng.randint(0, longest)))


def write_rows(path: Path, rows: list[list[str]], **dialect) -> None:
    with path.open("w", encoding=dialect.pop("encoding", "utf-8"), newline="") as file:
        csv.writer(file, **dialect).writerows(rows)


@pytest.mark.parametrize("seed", range(120))
def test_every_csv_is_read_as_python_does(tmp_path, seed):
    rng = random.Random(seed)
    suffix = rng.choice([".csv", ".tsv"])
    dialect = {
        "delimiter": "," if suffix == ".csv" else "\t",
        "lineterminator": rng.choice(["\n", "\r\n", "\r"]),
        "quoting": rng.choice([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
        "encoding": rng.choice(["utf-8", "utf-8-sig"]),
    }
    names = [f"column {number}" for number in range(rng.randint(1, 7))]
    longest = rng.choice([3, 30, 300])
    rows = [[random_cell(rng, longest) for _ in names] for _ in range(rng.randint(1, 60))]
    if dialect["quoting"] == csv.QUOTE_MINIMAL and dialect["lineterminator"] != "\r\n":
        # The writer leaves the other line end without quotes, and every reader takes it for one.
        rows = [[re.sub("[\r\n]", dialect["lineterminator"], cell) for cell in row] for row in rows]
    path = tmp_path / f"table{suffix}"
    write_rows(path, [names, *rows], **dialect)
    with path.open(encoding="utf-8-sig", newline="") as file:
        header, *expected = (row for row in csv.reader(file, delimiter=dialect["delimiter"]) if row)
    assert (header, expected) == (names, rows)
    table = read_table(path)
    assert (table.names, table.rows) == (names, expected)
    some = rng.sample(names, rng.randint(1, len(names)))
    assert read_table(path, some).rows == [[row[names.index(name)] for name in some] for row in expected]
    assert read_table(path, limit=5).rows == expected[:5]


@pytest.mark.parametrize("suffix", [".csv", ".csv.gz", ".tsv"])
def test_large_files_are_read_exactly_by_all_who_read(tmp_path, suffix):
    """Above the block size of every fast reader (1 MB), with texts of many lines and one of 3 MB."""
    rng = random.Random(1)
    line = 'River of the night, and the "train" comes home' + NOT_LINE_ENDS
    rows = [[f"Song {i}", "\n".join([line] * rng.randint(1, 30)).strip()] for i in range(2_000)]
    rows[1_000][1] = "\r\n".join(["la la"] * 450_000)
    plain = io.StringIO(newline="")
    csv.writer(plain, delimiter="\t" if suffix == ".tsv" else ",").writerows([["title", "text"], *rows])
    path = tmp_path / f"lyrics{suffix}"
    content = plain.getvalue().encode()
    path.write_bytes(gzip.compress(content, 1) if suffix.endswith(".gz") else content)
    texts = [text for _, text in rows]
    assert read_texts(path) == texts
    assert [each[:2] for each in read_examples(path, template=Template("{title}: {text}"))[:2]] == [
        ("Song 0:", f" {texts[0]}"),
        ("Song 1:", f" {texts[1]}"),
    ]
    assert [row["text"] for row in read_samples(str(path))] == texts
    assert [row["title"] for row in read_fields({}, str(path), Template("{title}: {text}"))] == [t for t, _ in rows]


@pytest.mark.parametrize(
    ("content", "rows"),
    [
        (b"text\none\n\ntwo", [["one"], ["two"]]),
        (b'text\n""\none\n', [[""], ["one"]]),
        (b"text\rone\rtwo\r", [["one"], ["two"]]),
        (b'text\nsay "hi" to her\n', [['say "hi" to her']]),
        (b'text\n"say ""hi"""\n', [['say "hi"']]),
        (b"\n\ntext,n\n\none,1\n  \ntwo,2\n", [["one", "1"], ["two", "2"]]),
        (b"text,text\none,two\n", [["one", "two"]]),
        (b"text;n\none;1\ntwo, or three;2\n", [["one", "1"], ["two, or three", "2"]]),
        (b'"text";"n"\n"one; two";"1"\n', [["one; two", "1"]]),
        (b"text\tn\none\t1\n", [["one", "1"]]),
        (b"\xef\xbb\xbfsep=;\r\ntext;n\r\none, or two;1\r\n", [["one, or two", "1"]]),
        (b"text; or prose\none\ntwo\n", [["one"], ["two"]]),
        (b"text\none; two\nthree; four\n", [["one; two"], ["three; four"]]),
    ],
)
def test_shapes_of_csv(tmp_path, content, rows):
    path = tmp_path / "table.csv"
    path.write_bytes(content)
    assert read_table(path).rows == rows


# ---- what breaks lines, and what does not --------------------------------------------------------------------


def test_only_line_ends_break_lines(tmp_path):
    """U+2028 and its kind stay in texts, in every file with a text a line."""
    texts = [f"before{char}after" for char in NOT_LINE_ENDS]
    rows = [{"text": text, "prompt": "", "step": 1, "epoch": 1.0} for text in texts]
    jsonl = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (tmp_path / "samples.jsonl").write_text(jsonl, encoding="utf-8")
    assert [row["text"] for row in read_samples(str(tmp_path / "samples.jsonl"))] == texts
    assert read_texts(tmp_path / "samples.jsonl") == texts
    (tmp_path / "lines.txt").write_text("\n".join(texts), encoding="utf-8")
    assert read_lines(tmp_path / "lines.txt") == texts
    assert read_texts(tmp_path / "lines.txt") == texts
    write_live_samples(tmp_path, rows)
    assert (tmp_path / LIVE_SAMPLES_FILE).is_file()
    assert [row["text"] for row in read_live_samples(tmp_path)] == texts


def test_byte_order_marks_are_no_text(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a.txt").write_text("One.", encoding="utf-8-sig")
    (tmp_path / "lines.txt").write_bytes("\ufeffOne.\r\nTwo.\r\n".encode())
    (tmp_path / "rows.jsonl").write_text('\ufeff{"text": "One."}\n\ufeff{"text": "Two."}\n', encoding="utf-8")
    (tmp_path / "array.json").write_text('\ufeff[{"text": "One."}]', encoding="utf-8")
    (tmp_path / "table.csv").write_text("text\nOne.\n", encoding="utf-8-sig")
    assert read_texts(folder) == ["One."]
    assert read_lines(tmp_path / "lines.txt") == ["One.", "Two."]
    for name, texts in (("rows.jsonl", ["One.", "Two."]), ("array.json", ["One."]), ("table.csv", ["One."])):
        assert read_texts(tmp_path / name) == texts


# ---- formats -------------------------------------------------------------------------------------------------

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


def test_a_zip_of_several_files_is_asked_about(tmp_path):
    with zipfile.ZipFile(tmp_path / "two.zip", "w") as archive:
        archive.writestr("a.csv", "text\nOne.\n")
        archive.writestr("b.csv", "text\nTwo.\n")
    with pytest.raises(UserError, match=r"holds 2 files \(a.csv, b.csv\), must be one"):
        read_texts(tmp_path / "two.zip")


def test_a_column_that_is_the_index_of_a_parquet_file(tmp_path):
    frame = pd.DataFrame({"text": ["One.", None], "key": ["a", "b"], "n": [1, None]}).set_index("key")
    frame.to_parquet(tmp_path / "index.parquet")
    assert read_table(tmp_path / "index.parquet", ["key", "text"]).rows == [["a", "One."], ["b", None]]
    assert [
        each[:2] for each in read_examples(tmp_path / "index.parquet", template=Template("{n} | {key}: {text}"))
    ] == [("1 | a:", " One.")]
    frame[:0].to_parquet(tmp_path / "empty.parquet")
    with pytest.raises(UserError, match="has no rows"):
        read_texts(tmp_path / "empty.parquet")


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
    with pytest.raises(UserError, match=r"broken\.txt: a link to a file that is not there"):
        read_texts(folder)


def test_reading_needs_no_torch():
    code = "import neoflix.data.sources, sys; sys.exit(bool({'torch', 'pandas', 'datasets'} & sys.modules.keys()))"
    subprocess.run([PYTHON, "-c", code], cwd=ROOT, check=True, timeout=120)
