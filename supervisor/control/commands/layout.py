"""How answers are laid out for people: tables that fit the terminal, sentences that wrap, colours that may be missing.

A table has short cells and, for each row, a sentence: why this is so. Where there is room the sentence is the last
column; where there is not, it stands below its row, in full. Without a terminal nothing is cut and nothing wraps, so
that `grep` finds what it looks for.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TextIO

from supervisor.columns import width

_GIB = 2**30
_NARROWEST = 8  # cells that a column keeps when it has to give
_INDENT = "    "
_HUES = {"red": "31", "green": "32", "yellow": "33", "blue": "34", "cyan": "36", "dim": "2", "bold": "1"}
_STATES = {
    "green": ("busy", "running", "ready", "ok", "done", "finished", "succeeded", "completed"),
    "yellow": ("paused", "draining", "starting", "loading", "backoff", "cordoned", "warning", "waiting", "queued"),
    "red": ("offline", "quarantined", "failed", "fault", "error", "critical", "dead", "poisoned"),
    "dim": ("cold", "idle", "unloaded", "debug", "cancelled"),
}
_HUE_OF = {state: hue for hue, states in _STATES.items() for state in states}


class Paper(NamedTuple):
    """What is written on.

    Attributes:
        width: cells of a line; None when lines may be as long as they like.
        colour: whether escape sequences are welcome.
        height: lines of the terminal; 0 when there is none.
    """

    width: int | None = None
    colour: bool = False
    height: int = 0

    def paint(self, text: str, hue: str) -> str:
        """`text` in a colour, where there are colours."""
        return f"\x1b[{_HUES[hue]}m{text}\x1b[0m" if self.colour and hue and text.strip() else text

    def state(self, text: str) -> str:
        """A text that begins with a state, in the colour of that state."""
        return self.paint(text, hue_of(text))


def paper_of(stream: TextIO, environ: Mapping[str, str] = os.environ) -> Paper:
    """What `stream` is: a terminal with its width, or something else.

    COLUMNS counts as a shell sets it; NO_COLOR and TERM=dumb take the colours away.
    """
    if not stream.isatty():
        return Paper()
    try:
        size = os.get_terminal_size(stream.fileno())
        cells, lines = size.columns, size.lines
    except (OSError, ValueError):
        cells, lines = 0, 0
    given = environ.get("COLUMNS", "")
    cells = int(given) if given.isascii() and given.isdecimal() and int(given) else cells
    colour = not environ.get("NO_COLOR") and environ.get("TERM") != "dumb"
    return Paper(max(cells or 80, 20), colour, lines or 24)


def say(text: str) -> None:
    """Write a text and end its line."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def hue_of(text: str) -> str:
    """The colour of a text that begins with a state; "" for any other."""
    return _HUE_OF.get(text.partition(" ")[0].rstrip(".,:").lower(), "")


# ---- tables


class Row(NamedTuple):
    """Cells, and the sentence that goes with them."""

    cells: Sequence[str]
    why: str = ""


def table(
    head: Sequence[str],
    rows: Sequence[Row],
    paper: Paper,
    *,
    why: str = "WHY",
    right: Sequence[int] = (),
    state: int = -1,
    whole: Sequence[int] = (),
    spare: Sequence[int] = (),
) -> str:
    """Lay out a table; no line is wider than the paper, unless what must be whole is.

    Args:
        head: titles of the cells.
        why: title of the sentences, where they have a column.
        right: numbers of the columns that are aligned to the right.
        state: number of the column that is coloured by what it says.
        whole: numbers of the columns that are never cut: what people copy, such as ids.
        spare: numbers of the columns that are left out where there is no room, the first one first.
    """
    kept = _kept(head, rows, paper, spare)
    head = [head[number] for number in kept]
    cells = [[plain(row.cells[number]) for number in kept] for row in rows]
    right = [place for place, number in enumerate(kept) if number in right]
    whole = [place for place, number in enumerate(kept) if number in whole]
    state = kept.index(state) if state in kept else -1
    widths = [max(width(line[number]) for line in (head, *cells)) for number in range(len(head))]
    whys = [plain(row.why) for row in rows]
    beside = any(whys)
    if paper.width is not None:
        _squeeze(widths, (*right, *whole), paper.width)
        beside = beside and sum(widths) + 2 * len(widths) + max(map(width, [why, *whys])) <= paper.width
    lines = [paper.paint(_line([*head, why] if beside else head, widths, right), "bold")]
    for line, reason in zip(cells, whys, strict=True):
        hues = {state: hue_of(line[state])} if state >= 0 else {}
        lines.append(_line([*line, reason] if beside else line, widths, right, paper.paint, hues))
        if reason and not beside:
            lines += [paper.paint(each, "yellow") for each in wrapped(reason, paper, indent=_INDENT)]
    return "\n".join(lines)


def _kept(head: Sequence[str], rows: Sequence[Row], paper: Paper, spare: Sequence[int]) -> list[int]:
    """Numbers of the columns that are shown: empty ones say nothing, and spare ones may have no room."""
    kept = [number for number in range(len(head)) if any(row.cells[number] for row in rows)]
    widths = [max(width(line[number]) for line in (head, *(row.cells for row in rows))) for number in range(len(head))]
    for number in spare:
        if paper.width is not None and sum(widths[one] + 2 for one in kept) - 2 > paper.width and number in kept:
            kept.remove(number)
    return kept


def _squeeze(widths: list[int], fixed: Sequence[int], room: int) -> None:
    """Take from the widest column that is not fixed until the line fits, or nobody can give any more."""
    while sum(widths) + 2 * (len(widths) - 1) > room:
        giving = [n for n, cells in enumerate(widths) if n not in fixed and cells > _NARROWEST]
        if not giving:
            return
        widths[max(giving, key=lambda n: widths[n])] -= 1


def _line(
    cells: Sequence[str],
    widths: Sequence[int],
    right: Sequence[int],
    paint: Callable[[str, str], str] = lambda text, _hue: text,
    hues: Mapping[int, str] = {},
) -> str:
    parts = []
    for number, whole in enumerate(cells):
        if number >= len(widths):
            parts.append(whole)
            continue
        cell = cut(whole, widths[number])
        gap = " " * (widths[number] - width(cell))
        shown = paint(cell, hues.get(number, ""))
        parts.append(gap + shown if number in right else shown + gap)
    return "  ".join(parts).rstrip()


def cut(text: str, cells: int) -> str:
    """At most so many cells of `text`; "…" stands for what is missing."""
    if width(text) <= cells:
        return text
    kept = ""
    for char in text:
        if width(kept + char) > cells - 1:
            break
        kept += char
    return kept + "…"


def wrapped(text: str, paper: Paper, *, indent: str = "") -> list[str]:
    """Lines of a sentence, none wider than the paper; every line begins with `indent`. The words are made plain."""
    if paper.width is None:
        return [indent + plain(text)]
    room = max(paper.width - width(indent), _NARROWEST)
    lines, line = [], ""
    for word in plain(text).split():
        if line and width(line) + 1 + width(word) > room:
            lines.append(line)
            line = ""
        line = f"{line} {word}" if line else word
        while width(line) > room:  # a word longer than a line: a path, or a language without spaces
            head = cut(line, room + 1)[:-1] if width(line) > room else line
            lines.append(head)
            line = line[len(head) :]
    return [indent + each for each in (*lines, line) if each]


# ---- words


def plain(text: str, most: int = 0) -> str:
    """Fit for one line of a terminal: engines write what they like, escape sequences too.

    Args:
        most: characters that are shown; 0 for all. `--json` has all of them.
    """
    shown = "".join(char if char.isprintable() else " " for char in text)
    return f"{shown[: most - 1]}…" if most and len(shown) > most else shown


def now_of(seen: Mapping[str, Any]) -> float:
    """When an answer was true, in seconds since the epoch: it comes from this machine, a moment ago."""
    return float(seen.get("now") or time.time())


def span(seconds: float | None) -> str:
    """A length of time: 12s, 3m 04s, 1h 12m, 2d 03h."""
    if seconds is None:
        return ""
    whole = int(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02}s"
    if whole < 86_400:
        return f"{whole // 3600}h {whole % 3600 // 60:02}m"
    return f"{whole // 86_400}d {whole % 86_400 // 3600:02}h"


def ago(when: float, now: float) -> str:
    """A moment in the past: "12s ago"."""
    return f"{span(max(0.0, now - when))} ago"


def until(when: float | None, now: float, otherwise: str) -> str:
    """A moment to come: "in 1h 48m"; `otherwise` when there is none."""
    if when is None:
        return otherwise
    return f"in {span(when - now)}" if when > now else "now"


def clock(seconds: float) -> str:
    """A moment as the clock on the wall shows it."""
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))


def count(number: int, noun: str) -> str:
    """ "no jobs", "1 job", "2 jobs"."""
    return f"{number or 'no'} {noun}{'' if number == 1 else 's'}"


def gib(size: int | None) -> str:
    """ "1.4G"; "?" for what is not known, "-" for nothing."""
    return "?" if size is None else f"{size / _GIB:.1f}G" if size else "-"


def joined(parts: Sequence[str]) -> str:
    """One line of facts, the empty ones left out."""
    return " · ".join(part for part in parts if part)
