import random

import pandas as pd
import pytest

from neoflix.data.fields import NUM_ROWS, FieldPool, as_field, read_fields
from neoflix.data.template import Template
from neoflix.runtime.errors import UserError

TEMPLATE = Template("{type} | {title}: {description}")


def test_left_out_fields_are_drawn_from_rows_that_fit():
    rows = [["Movie", "Crime", "A"], ["Movie", "Comedy", "B"], ["TV Show", "Crime", "C"], ["TV Show", "Crime", "D"]]
    pool = FieldPool([dict(zip(("type", "listed_in", "title"), row, strict=True)) for row in rows])
    drawn = [pool.draw({"type": "TV Show", "listed_in": "Crime"}, 1, index)["title"] for index in range(40)]
    assert set(drawn) == {"C", "D"}
    assert pool.draw({"title": "New", "listed_in": "Comedy"}, 1, 5) == {
        "type": "Movie",
        "listed_in": "Comedy",
        "title": "New",
    }
    assert pool.draw({}, 1, 5) == pool.draw({}, 1, 5)
    assert len({pool.draw({}, 1, index)["title"] for index in range(40)}) == 4


def test_a_pool_holds_some_of_many_training_texts():
    rows = [{"type": "Movie", "title": str(number), "description": "Text."} for number in range(2 * NUM_ROWS)]
    examples = list(map(TEMPLATE.fill, rows))
    pool = FieldPool.from_examples(examples)
    assert [row["title"] for row in pool.rows] == random.Random(0).sample([row["title"] for row in rows], NUM_ROWS)
    assert FieldPool.from_examples(examples).rows == pool.rows
    assert len(FieldPool.from_examples(examples[:3]).rows) == 3


def test_given_fields_are_checked():
    assert read_fields({"title": "A"}, None, TEMPLATE) == [{"title": "A"}]
    with pytest.raises(UserError, match="--fields tilte"):
        read_fields({"tilte": "A"}, None, TEMPLATE)
    with pytest.raises(UserError, match=r"--fields: .*--template.*--prompt"):
        read_fields({"title": "A"}, None, None)


def test_fields_come_from_a_file(tmp_path):
    path = tmp_path / "new.csv"
    pd.DataFrame({"title": ["The Last Ferry", ""], "note": ["x", "y"]}).to_csv(path, index=False)
    assert read_fields({}, str(path), TEMPLATE) == [{"title": "The Last Ferry"}, {}]
    assert read_fields({"title": "A", "type": "B"}, str(path), TEMPLATE) == [
        {"title": "The Last Ferry", "type": "B"},
        {"title": "A", "type": "B"},
    ]
    other = tmp_path / "other.csv"
    pd.DataFrame({"note": ["x"]}).to_csv(other, index=False)
    with pytest.raises(UserError, match=r"--fields_file .*other\.csv.*type, title.*note"):
        read_fields({}, str(other), TEMPLATE)
    with pytest.raises(UserError, match=r"--fields_file .*none\.csv: no such file"):
        read_fields({}, str(tmp_path / "none.csv"), TEMPLATE)


@pytest.mark.parametrize(
    ("cell", "field"),
    [
        (" A ", "A"),
        (None, ""),
        (float("nan"), ""),
        (1979.0, "1979"),
        (7.5, "7.5"),
        (True, "True"),
        (["Horror", 1.0], "Horror, 1"),
    ],
)
def test_cells_become_text(cell, field):
    assert as_field(cell) == field
