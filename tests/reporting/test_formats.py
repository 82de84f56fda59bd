"""Numbers, sizes and times in words."""

import pytest

from neoflix.reporting.formats import format_duration, format_number, format_size


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
