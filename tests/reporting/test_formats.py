"""Numbers, sizes and times in words."""

import pytest

from neoflix.reporting.formats import format_duration, format_number, format_size, side_by_side


def test_numbers():
    assert [format_number(1234.5), format_number(1234.5, 0), format_number(None)] == ["1,234.50", "1,234", ""]


@pytest.mark.parametrize(
    ("num_bytes", "words"),
    [(None, ""), (0, "0 bytes"), (1023, "1,023 bytes"), (1536, "1.5 KiB"), (2**20, "1.0 MiB"), (3 * 2**29, "1.5 GiB")],
)
def test_sizes(num_bytes, words):
    assert format_size(num_bytes) == words


@pytest.mark.parametrize(
    ("seconds", "words"), [(None, ""), (0, ""), (90, "90 s"), (91, "2 min"), (5400, "90 min"), (7200, "2.0 h")]
)
def test_durations(seconds, words):
    assert format_duration(seconds) == words


def test_texts_side_by_side():
    lines = side_by_side(("before", "after"), [("one two three four five", "six\x1b"), ("a", "")], 40).splitlines()
    assert lines == [
        "before               after",
        "------------------   ------------------",
        "one two three four   six",
        "five",
        "",
        "a",
    ]
    assert max(map(len, side_by_side(("", ""), [("x " * 300, "y " * 300)], 500).splitlines())) <= 120
