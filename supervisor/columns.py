"""Plain text tables for terminals."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence


def width(text: str) -> int:
    """How many terminal cells `text` takes."""
    return sum(
        0 if unicodedata.combining(char) else 2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in text
    )


def columns(head: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[int] = ()) -> str:
    """Lay out a table.

    Args:
        head: titles of the columns.
        rows: cells; each row as long as `head`.
        right: numbers of the columns that are aligned to the right.
    """
    lines = [head, *rows]
    widths = [max(width(line[number]) for line in lines) for number in range(len(head))]
    return "\n".join(_line(line, widths, right) for line in lines)


def _line(cells: Sequence[str], widths: Sequence[int], right: Sequence[int]) -> str:
    parts = []
    for number, cell in enumerate(cells):
        gap = " " * (widths[number] - width(cell))
        parts.append(gap + cell if number in right else cell + gap)
    return "  ".join(parts).rstrip()
