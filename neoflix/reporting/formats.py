"""Numbers, sizes, times and pairs of texts as a reader of a report sees them."""

import textwrap
from itertools import zip_longest

from neoflix.runtime.console import GIB, printable


def format_number(value: float | None, digits: int = 2) -> str:
    """1234.5 -> '1,234.50'; None -> ''"""
    return "" if value is None else f"{value:,.{digits}f}"


def format_size(num_bytes: float | None) -> str:
    """1,610,612,736 -> '1.5 GiB'; None -> ''"""
    if num_bytes is None:
        return ""
    for unit, name in ((GIB, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if num_bytes >= unit:
            return f"{num_bytes / unit:.1f} {name}"
    return f"{num_bytes:,.0f} bytes"


def format_duration(seconds: float | None) -> str:
    """7,200 -> '2.0 h'; None or 0 -> ''"""
    if not seconds:
        return ""
    if seconds > 5400:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 60:.0f} min" if seconds > 90 else f"{seconds:.0f} s"


def side_by_side(titles: tuple[str, str], pairs: list[tuple[str, str]], columns: int) -> str:
    """Pairs of texts in two columns below their titles, at most `columns` wide and at most 120."""
    width = (max(40, min(columns, 120)) - 3) // 2
    lines = [f"{titles[0]:{width}}   {titles[1]}", f"{'-' * width}   {'-' * width}"]
    for pair in pairs:
        wrapped = [textwrap.wrap(" ".join(printable(text).split()), width) for text in pair]
        lines += [f"{left:{width}}   {right}".rstrip() for left, right in zip_longest(*wrapped, fillvalue="")] + [""]
    return "\n".join(lines)
