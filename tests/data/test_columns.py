from pathlib import Path

import pandas as pd
import pytest

from neoflix.data.columns import clean_texts, is_missing, is_text
from neoflix.data.sources import read_examples, sample_examples
from neoflix.runtime.errors import UserError


def read_texts(path: Path, column: str | None = None) -> list[str]:
    return [example.completion for example in read_examples(path, column)]


ROWS = {
    "id": ["1", "2"],
    "name": ["A Ship", "The Cook"],
    "story": ["A ship is lost at sea for years.", "A cook finds a map in an old pot."],
}


def write(path: Path, rows: dict) -> Path:
    pd.DataFrame(rows).to_csv(path, index=False)
    return path


def test_the_one_column_of_texts_is_taken_and_named(tmp_path, capsys):
    path = write(tmp_path / "mine.csv", ROWS)
    assert read_texts(path) == ROWS["story"]
    assert "2 texts of column story" in capsys.readouterr().out
    usual = write(tmp_path / "usual.csv", ROWS | {"description": ["Short.", "Shorter."]})
    assert read_texts(usual) == ["Short.", "Shorter."]


def test_a_file_without_a_header_is_refused(tmp_path):
    """Its first text would be taken for the column's name, and be lost."""
    path = tmp_path / "texts.csv"
    path.write_text('"The keeper finds a letter that was never sent.",1\n"A chef returns to the small town.",2\n')
    with pytest.raises(UserError, match=r"--text_column .*header line"):
        read_texts(path)
    assert read_texts(path, "The keeper finds a letter that was never sent.") == ["A chef returns to the small town."]


def test_several_columns_of_texts_are_listed(tmp_path):
    path = write(tmp_path / "two.csv", ROWS | {"review": ROWS["story"][::-1]})
    with pytest.raises(UserError, match=r"--text_column .*id, name, story, review.* story \(2 .* review \(2 "):
        read_texts(path)
    path = write(tmp_path / "none.csv", {"id": ["1"], "name": ["A Ship"]})
    with pytest.raises(UserError, match=r"--text_column .*id, name.* 5 words"):
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
    with pytest.raises(UserError, match=r"--text_column is not given") as error:
        read_texts(path)
    assert all(words in str(error.value) for words in found)
    with pytest.raises(UserError, match=r"--text_column is not given"):
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


def test_cells_become_texts():
    assert clean_texts([" a ", None, float("nan"), "", "12"], Path("a.csv"), "text") == ["a", "", "", "", "12"]
    for cells, words in (([None, " "], "every row"), (["1", 2.5], "numbers"), (["a", ["b"]], "row 2")):
        with pytest.raises(UserError, match=rf"--text_column text: .*{words}"):
            clean_texts(cells, Path("a.csv"), "text")
    assert [is_missing(cell) for cell in (None, float("nan"), "", 0)] == [True, True, False, False]
    assert [is_text(cell) for cell in (" ", "a", 1, None)] == [False, True, False, False]
