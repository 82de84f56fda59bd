import io
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pandas as pd
import pytest
from conftest import as_examples

from neoflix.data.hub import hub_copy_file
from neoflix.data.sources import (
    NETFLIX_PATH,
    SAMPLE_PATH,
    download_netflix,
    find_dataset,
    find_local_dataset,
    read_examples,
    sample_examples,
)
from neoflix.data.template import Example, Template
from neoflix.runtime.errors import UserError


def read_texts(path: Path, column: str | None = None) -> list[str]:
    return [example.completion for example in read_examples(path, column)]


def write(path: Path, rows: dict) -> Path:
    pd.DataFrame(rows).to_csv(path, index=False)
    return path


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


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(UserError, match=r"--dataset .*none\.csv: no such file"):
        find_dataset(str(tmp_path / "none.csv"))
    (tmp_path / "notes.md").write_text("no text file")
    with pytest.raises(UserError, match=r"--dataset .*\.txt file"):
        find_dataset(str(tmp_path))


def test_no_data_set_is_no_folder(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("Notes.")
    monkeypatch.chdir(tmp_path)
    for name in ("", " "):
        with pytest.raises(UserError, match="--dataset is empty"):
            find_dataset(name)
    assert read_texts(find_dataset(".")) == ["Notes."]


def test_local_data_is_found_without_the_network(tmp_path, monkeypatch):
    monkeypatch.setattr("neoflix.data.sources.download_netflix", lambda path: pytest.fail("downloads"))
    monkeypatch.setattr("neoflix.data.sources.download_from_hub", lambda *args: pytest.fail("downloads"))
    assert find_local_dataset("sample", tmp_path) == SAMPLE_PATH
    assert find_local_dataset("hf:a/b", tmp_path) is None
    copy = hub_copy_file("hf:a/b", "0123456789abcdef", tmp_path)
    copy.touch()
    assert find_local_dataset("hf:a/b", tmp_path) == copy
    if not NETFLIX_PATH.is_file():
        assert find_local_dataset("netflix", tmp_path) is None
    with pytest.raises(UserError, match=r"--dataset nowhere\.csv"):
        find_local_dataset("nowhere.csv", tmp_path)


@pytest.fixture
def opened(monkeypatch) -> list[str]:
    """The names of the files that are opened, in order."""
    names, plain = [], io.open

    def count(file, *args, **kwargs):
        names.append(Path(file).name if isinstance(file, str | Path) else file)
        return plain(file, *args, **kwargs)

    monkeypatch.setattr(io, "open", count)
    return names


ROWS = {"title": ["A", "B"], "text": ["One text of several words.", "Another text of several words."]}


@pytest.mark.parametrize("suffix", [".csv", ".csv.gz", ".tsv", ".jsonl", ".parquet", ".txt"])
@pytest.mark.parametrize("column", [None, "text"])
def test_a_file_is_opened_once(tmp_path, opened, suffix, column):
    """A large file on a slow disk is read once for a run, and only its first rows for a plan."""
    path, frame = tmp_path / f"texts{suffix}", pd.DataFrame(ROWS)
    if suffix == ".parquet":
        frame.to_parquet(path)
    elif suffix == ".jsonl":
        frame.to_json(path, orient="records", lines=True)
    elif suffix == ".txt":
        path.write_text("\n".join(ROWS["text"]))
    else:
        frame.to_csv(path, index=False, sep="\t" if suffix == ".tsv" else ",")
    opened.clear()
    assert read_texts(path, column) == ROWS["text"]
    assert opened == [path.name]
    assert sample_examples(path, column, None, 2000) == (as_examples(ROWS["text"]), 2)
    assert opened == [path.name] * 2
    if suffix != ".txt":
        read_examples(path, template=Template("{title}: {text}"))
        assert opened == [path.name] * 3


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
    with pytest.raises(UserError, match=r"--template genre: .*table\.jsonl.* title"):
        read_examples(path, template=Template("{genre}: {plot}"))


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
def test_a_failed_download_names_the_path_for_the_file(web, tmp_path, case):
    path, url = tmp_path / "netflix_titles.csv", web.url
    web.body = b"title,description\r\n" + b"t,text.\r\n" * 1500
    if case == "cut short":
        web.promised = len(web.body) + 10
    elif case == "an error page":
        web.body = b"<html>try again later</html>"
    else:
        url = "http://127.0.0.1:9/netflix_titles.csv"  # the discard port: nobody listens
    with pytest.raises(UserError, match="--dataset netflix") as error:
        download_netflix(path, url)
    assert str(path) in str(error.value)
    assert list(tmp_path.iterdir()) == []
