"""How commands of `coordinator` show what they found: lines, JSON, and tables that fit a terminal."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from typing import Any

_CELL_CHARS = 60


def line(text: str = "") -> None:
    """One line on standard output."""
    sys.stdout.write(text + "\n")


def say(answer: Any) -> int:
    """What was answered, as it was; returns the exit code 0."""
    line(json.dumps(answer, indent=2))
    return 0


def cell(value: Any, chars: int = _CELL_CHARS) -> str:
    """Fit for a terminal, whoever wrote it."""
    text = ", ".join(f"{name}={text}" for name, text in value.items()) if isinstance(value, dict) else str(value)
    return "".join(letter if letter.isprintable() else "?" for letter in text)[:chars]


def fault_cell(fault: dict[str, Any] | None, chars: int = _CELL_CHARS) -> str:
    """A fault in a few words; "" for none."""
    return cell(f"{fault['code']}: {fault['message']}", chars) if fault else ""


def date(ms: int | None) -> str:
    """An instant in UTC; "" for none."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(ms / 1000)) if ms else ""


def table(rows: Sequence[tuple[str, ...]]) -> None:
    """Columns as wide as their widest cell; the first row has their names."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        line("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())
