import json
import zipfile
from pathlib import Path

import pytest

from neoflix.checkpoints.names import LIVE_SAMPLES_FILE
from neoflix.data.encodings import read_lines
from neoflix.data.sources import read_examples
from neoflix.judging.judge import read_samples
from neoflix.reporting.run_log import read_live_samples, write_live_samples
from neoflix.runtime.errors import UserError

NOT_LINE_ENDS = "\u2028\u2029\x85\x0b\x0c\x1c\x1d\x1e"  # str.splitlines splits here, and a file does not


def read_texts(path: Path, column: str | None = None) -> list[str]:
    return [example.completion for example in read_examples(path, column)]


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


def test_byte_order_marks_are_left_out(tmp_path):
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


def test_a_zip_of_several_files_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "two.zip", "w") as archive:
        archive.writestr("a.csv", "text\nOne.\n")
        archive.writestr("b.csv", "text\nTwo.\n")
    with pytest.raises(UserError, match=r"two\.zip: .*2 files .*a\.csv, b\.csv"):
        read_texts(tmp_path / "two.zip")


def test_lines_that_are_not_utf8_are_refused(tmp_path):
    path = tmp_path / "lines.txt"
    for content, words in (("One.\né".encode("latin-1"), "line 2"), ("One.".encode("utf-16"), "UTF-16")):
        path.write_bytes(content)
        with pytest.raises(UserError, match=rf"not UTF-8.*{words}"):
            read_lines(path)
