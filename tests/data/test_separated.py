"""CSV files are read exactly as Python's csv module reads them, whatever their size."""

import csv
import gzip
import io
import random
import re
from pathlib import Path

import pytest

from neoflix.data.fields import read_fields
from neoflix.data.sources import read_examples
from neoflix.data.tables import read_table
from neoflix.data.template import Template
from neoflix.judging.judge import read_samples

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
def test_large_files_are_read_exactly_everywhere(tmp_path, suffix):
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


def test_written_csv_is_read_as_written(tmp_path, titles):
    path = tmp_path / "again.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([["description"], *([text] for text in titles)])
    assert read_texts(path, "description") == titles


def test_crlf_and_byte_order_mark(tmp_path):
    path = tmp_path / "windows.csv"
    path.write_bytes(b"\xef\xbb\xbftext,n\r\none,1\r\ntwo,2\r\n")
    assert read_texts(path, "text") == ["one", "two"]
