from pathlib import Path

import pytest

from neoflix.data.rows import HEAD, ColumnError, Table, fill_table

NAMES = ["a", "b", "b"]


def rows(number: int):
    return ([f"a{i}", f"b{i}", f"c{i}"] for i in range(number))


def test_a_table_keeps_the_columns_that_are_named():
    assert fill_table(NAMES, rows(2), None) == Table(NAMES, [["a0", "b0", "c0"], ["a1", "b1", "c1"]])
    assert fill_table(["a", "b", "c"], rows(2), ["c", "a"]).rows == [["c0", "a0"], ["c1", "a1"]]
    assert fill_table(["a", "b", "c"], rows(2), ["c", "a"]).column("a") == ["a0", "a1"]


def test_columns_are_chosen_by_the_first_rows():
    seen = []

    def choose(head: Table) -> list[str]:
        seen.append(len(head.rows))
        return ["c"]

    table = fill_table(["a", "b", "c"], rows(HEAD + 5), choose)
    assert seen == [HEAD]
    assert table.rows == [[f"c{i}"] for i in range(HEAD + 5)]
    assert fill_table(["a"], iter([]), choose).rows == []
    assert seen == [HEAD], "there is nothing to choose by"


@pytest.mark.parametrize(("name", "words"), [("d", "d: not a column of a.csv; it has a, b, b"), ("b", "b: 2 columns")])
def test_missing_and_doubled_columns_are_refused(name, words):
    read = rows(1)
    with pytest.raises(ColumnError) as error:
        fill_table(NAMES, read, [name])
    assert words in error.value.describe(Path("a.csv"))
    assert next(read), "before any row is read"
