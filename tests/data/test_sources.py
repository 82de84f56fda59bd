"""Files of texts: every format, every bad file in one sentence; downloads."""

import csv
import gzip
import json
import os
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pandas as pd
import pytest
from conftest import as_examples
from datasets import Dataset

from neoflix.data.sources import (
    SAMPLE_PATH,
    default_cache_dir,
    download_netflix,
    find_dataset,
    read_examples,
    sample_examples,
)
from neoflix.data.template import Example, Template
from neoflix.runtime.errors import UserError


def read_texts(path: Path, column: str | None = None) -> list[str]:
    return [example.completion for example in read_examples(path, column)]


def test_sample_catalogue_has_the_shape_it_promises(titles):
    frame = pd.read_csv(SAMPLE_PATH, keep_default_na=False)
    assert len(frame) >= 300
    assert (
        list(frame.columns)
        == (
            "show_id type title director cast country date_added release_year rating duration listed_in description"
        ).split()
    )
    assert frame["title"].is_unique
    assert frame["description"].is_unique
    assert read_texts(SAMPLE_PATH, "description") == [text.strip() for text in titles]


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


def test_crlf_and_byte_order_mark(tmp_path):
    path = tmp_path / "windows.csv"
    path.write_bytes(b"\xef\xbb\xbftext,n\r\none,1\r\ntwo,2\r\n")
    assert read_texts(path, "text") == ["one", "two"]


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
    "lists.json": (b'[{"description": "a"}, ["b"]]', "item 2 is not a JSON object"),
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
def test_bad_files_are_told_in_one_sentence(tmp_path, name):
    content, message = BAD_FILES[name]
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        read_texts(path, "description")
    assert "\n" not in str(error.value)
    assert name in str(error.value)


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        find_dataset(str(tmp_path / "none.csv"))
    (tmp_path / "notes.md").write_text("no text file")
    with pytest.raises(ValueError, match=r"a folder without a \.txt file"):
        find_dataset(str(tmp_path))


# ---- download -------------------------------------------------------------------------------------------


@pytest.fixture
def web():
    """A real web server on this machine; set `web.body` to what it answers."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Length", str(self.server.promised or len(self.server.body)))
            self.end_headers()
            self.wfile.write(self.server.body)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.promised, server.body = None, b""
    server.url = f"http://127.0.0.1:{server.server_port}/netflix_titles.csv"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_download_is_whole_and_checked(web, tmp_path):
    path = tmp_path / "data" / "netflix_titles.csv"
    web.body = b"title,description\r\n" + b"".join(b"t,text %d.\r\n" % i for i in range(1500))
    download_netflix(path, web.url)
    assert len(read_texts(path, "description")) == 1500
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("case", ["cut short", "an error page", "no server"])
def test_failed_download_says_where_to_put_the_file(web, tmp_path, case):
    path, url = tmp_path / "netflix_titles.csv", web.url
    web.body = b"title,description\r\n" + b"t,text.\r\n" * 1500
    if case == "cut short":
        web.promised = len(web.body) + 10
    elif case == "an error page":
        web.body = b"<html>try again later</html>"
    else:
        url = "http://127.0.0.1:9/netflix_titles.csv"  # the discard port: nobody listens
    with pytest.raises(ValueError, match="save that file as") as error:
        download_netflix(path, url)
    assert str(path) in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_written_csv_is_read_as_written(tmp_path, titles):
    path = tmp_path / "again.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([["description"], *([text] for text in titles)])
    assert read_texts(path, "description") == titles


# ---- folders, the hub -----------------------------------------------------------------------------------


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
    with pytest.raises(ValueError, match=r"d\.txt: not UTF-8"):
        read_texts(found)


def test_a_data_set_of_the_hub_is_a_table(tmp_path, monkeypatch):
    """`datasets` loads a folder as it does a name of the hub: the same code, without the network."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = tmp_path / "poems"
    for split, texts in (("train", ["One.", "Two."]), ("test", ["Three."])):
        Dataset.from_dict({"text": texts, "label": [1] * len(texts)}).to_parquet(
            folder / f"{split}-00000-of-00001.parquet"
        )
    assert read_texts(find_dataset(f"hf:{folder}", tmp_path / "cache"), "text") == ["One.", "Two."]
    again = find_dataset(f"hf:{folder}:test", tmp_path / "cache")
    assert read_texts(again, "text") == ["Three."]
    assert find_dataset(f"hf:{folder}:test", tmp_path / "cache") == again
    for name in (f"hf:{folder}:none", f"hf:{tmp_path / 'nowhere'}", "hf:"):
        with pytest.raises(ValueError, match="--dataset hf:") as error:
            find_dataset(name, tmp_path / "cache")
        assert "\n" not in str(error.value)


# ---- which column ---------------------------------------------------------------------------------------

ROWS = {
    "id": ["1", "2"],
    "name": ["A Ship", "The Cook"],
    "story": ["A ship is lost at sea for years.", "A cook finds a map in an old pot."],
}


def write(path, rows):
    pd.DataFrame(rows).to_csv(path, index=False)
    return path


def test_the_one_column_of_texts_is_taken_and_said(tmp_path, capsys):
    path = write(tmp_path / "mine.csv", ROWS)
    assert read_texts(path) == ROWS["story"]
    assert "2 texts of column story" in capsys.readouterr().out
    usual = write(tmp_path / "usual.csv", ROWS | {"description": ["Short.", "Shorter."]})
    assert read_texts(usual) == ["Short.", "Shorter."]


def test_a_file_without_a_header_is_refused(tmp_path):
    """Its first text would be taken for the column's name, and be lost."""
    path = tmp_path / "texts.csv"
    path.write_text('"The keeper finds a letter that was never sent.",1\n"A chef returns to the small town.",2\n')
    with pytest.raises(UserError, match="looks like a text itself; add a header line"):
        read_texts(path)
    assert read_texts(path, "The keeper finds a letter that was never sent.") == ["A chef returns to the small town."]


def test_where_more_than_one_column_holds_texts_they_are_listed(tmp_path):
    path = write(tmp_path / "two.csv", ROWS | {"review": ROWS["story"][::-1]})
    with pytest.raises(ValueError, match=r"has the columns id, name, story, review; texts are in story .* and review"):
        read_texts(path)
    path = write(tmp_path / "none.csv", {"id": ["1"], "name": ["A Ship"]})
    with pytest.raises(ValueError, match="has the columns id, name, none of which holds texts"):
        read_texts(path)


@pytest.mark.parametrize(
    ("rows", "found"),
    [
        ({"description": ["Read more.", "", ""], "text": ["One.", "Two.", "Three."]}, ["text (3", "description (1"]),
        ({"text": ["One.", "", ""], "Text": ["", "Two.", "Three."]}, ["text (1", "Text (2"]),
        (
            {"text": ["One.", "", ""], "story": ["A ship is lost at sea.", "A cook finds a map.", ""]},
            ["text (", "story ("],
        ),
    ],
)
def test_an_unclear_column_is_asked_about(tmp_path, rows, found):
    path = write(tmp_path / "unclear.csv", rows)
    with pytest.raises(UserError, match="--text_column is not given") as error:
        read_texts(path)
    assert all(words in str(error.value) for words in found)
    with pytest.raises(UserError, match="--text_column is not given"):
        sample_examples(path, None, None, 10)


@pytest.mark.parametrize(
    ("rows", "column"),
    [
        ({"description": ["", "", ""], "text": ["One.", "Two.", ""]}, "text"),
        ({"id": ["1", "2"], "Description": ["One.", "Two."]}, "Description"),
        ({"title": ["河边", "山上"], "故事": ["一个年轻的厨师在海边发现了一封信", "两个兄弟回到了他们的老家"]}, "故事"),
    ],
)
def test_a_clear_column_is_taken(tmp_path, rows, column, capsys):
    path = write(tmp_path / "clear.csv", rows)
    assert read_texts(path) == [text for text in rows[column] if text]
    assert f"texts of column {column}" in capsys.readouterr().out


def test_rows_without_text_are_counted(tmp_path, capsys):
    path = write(tmp_path / "gaps.csv", {"title": ["A", "", "C"], "text": ["One.", " ", "Two."]})
    read_texts(path, "text")
    assert f"{path}: 2 texts of column text; 1 of 3 rows have no text there and are left out" in capsys.readouterr().out
    read_examples(path, template=Template("{title}: {text}"))
    assert "; column title is empty in 1" in capsys.readouterr().out
    write(path, {"title": ["A", "B", "C"], "text": ["One.", "", ""]})
    read_texts(path, "text")
    assert capsys.readouterr().out.startswith("warning: ")


def test_the_plan_samples_the_texts_of_training(tmp_path):
    rows = [f"Text {number} of a few words." for number in range(5_000)]
    path = write(tmp_path / "long.csv", {"story": rows})
    examples, about = sample_examples(path, None, None, 100)
    assert examples == read_examples(path)[:100]
    assert about == pytest.approx(5_000, rel=0.2)
    assert sample_examples(path, "story", None, 5_000) == (as_examples(rows), 5_000)
    write(path, {"n": range(5_000), "text": [""] * 4_999 + ["The last one."]})
    assert sample_examples(path, "text", None, 100) == (as_examples(["The last one."]), 1)


def test_a_folder_of_caches_is_that_of_datasets(monkeypatch, tmp_path):
    from datasets import config

    for name in ("HF_DATASETS_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        assert name not in os.environ or str(config.HF_DATASETS_CACHE).startswith(os.environ[name])
    assert default_cache_dir() == Path(config.HF_DATASETS_CACHE) / "neoflix"
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / "datasets" / "neoflix"


def test_no_data_set_is_no_folder(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("Notes.")
    monkeypatch.chdir(tmp_path)
    for name in ("", " "):
        with pytest.raises(UserError, match="--dataset is empty"):
            find_dataset(name)
    assert read_texts(find_dataset(".")) == ["Notes."]


# ---- templates ------------------------------------------------------------------------------------------


def test_rows_become_prompts_and_texts(tmp_path):
    path = tmp_path / "table.jsonl"
    rows = [
        {"title": "Alien: Again", "year": 1979.0, "genres": ["Horror", "Space"], "plot": " It comes back. "},
        {"title": None, "plot": "Nobody knows."},
        {"title": "Left out", "plot": ""},
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    template = Template("{genres} | {year} | {title}: {plot}")
    assert read_examples(path, template=template) == [
        Example(
            prompt="Horror, Space | 1979 | Alien\\: Again:",
            completion=" It comes back.",
            fields={"genres": "Horror, Space", "year": "1979", "title": "Alien: Again"},
        ),
        Example(" |  | :", " Nobody knows.", {"genres": "", "year": "", "title": ""}),
    ]
    with pytest.raises(ValueError, match=r"--template genre: not a column of .*; it has title"):
        read_examples(path, template=Template("{genre}: {plot}"))
