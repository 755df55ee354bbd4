"""`--watch`: the same page again and again, until Ctrl-C.

On a terminal the page is drawn over the last one, line by line, so that nothing flickers; the screen that was there
before comes back at the end. Elsewhere a page is written whenever something has changed, with an empty line between.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from supervisor.control.client import NotRunning
from supervisor.control.commands.layout import Paper, clock, paper_of
from supervisor.errors import ExitCode

EVERY_S = 1.0
# What changes with every look and says nothing: alone it makes no new page.
_RESTLESS = frozenset({"now", "uptime_s", "idle_s", "age_s", "busy", "temperature_c", "power_w", "rss_bytes", "runs_s"})
_OTHER_SCREEN, _BACK = "\x1b[?1049h\x1b[?25l", "\x1b[?25h\x1b[?1049l"
_HOME, _REST_OF_LINE, _REST = "\x1b[H", "\x1b[K", "\x1b[J"
_HOLD, _SHOW = "\x1b[?2026h", "\x1b[?2026l"  # terminals that know it draw the whole frame at once


def add_watch(parser: argparse.ArgumentParser) -> None:
    """Add the option."""
    parser.add_argument("--watch", action="store_true", help="show it again and again, until Ctrl-C")


def watch(
    arguments: argparse.Namespace,
    look: Callable[[], Any],
    page: Callable[[Any, Paper], str],
    *,
    out: TextIO | None = None,
    sleep: Callable[[float], None] = time.sleep,
) -> int:
    """Look and show until Ctrl-C, which is how it is meant to end: exit code 0.

    Args:
        look: asks the supervisor. One that goes away is waited for, once it was seen.

    Raises:
        SupervisorError: the first look failed.
    """
    stream = out or sys.stdout
    try:
        if stream.isatty() and not arguments.json:
            _on_terminal(stream, look, page, sleep)
        else:
            _as_it_changes(stream, look, page, sleep, as_json=arguments.json)
    except KeyboardInterrupt:
        pass
    return int(ExitCode.STOPPED)


def _looks(look: Callable[[], Any], sleep: Callable[[float], None]) -> Iterator[Any]:
    """What was seen; a NotRunning while nobody is there."""
    yield look()
    while True:
        sleep(EVERY_S)
        try:
            yield look()
        except NotRunning as gone:
            yield gone


def _on_terminal(
    stream: TextIO, look: Callable[[], Any], page: Callable[[Any, Paper], str], sleep: Callable[[float], None]
) -> None:
    looks = _looks(look, sleep)
    seen, last = next(looks), ""
    with _other_screen(stream):
        while True:
            paper = paper_of(stream)
            if isinstance(seen, NotRunning):
                foot = f"{clock(time.time())}  The supervisor is gone; waiting for it to come back. Ctrl-C ends."
            else:
                last = page(seen, paper)
                foot = f"{time.strftime('%H:%M:%S')}  every {EVERY_S:g} s; Ctrl-C ends"
            stream.write(frame(last, foot, paper))
            stream.flush()
            seen = next(looks)


def frame(text: str, foot: str, paper: Paper) -> str:
    """Escape sequences that draw `text` over whatever the screen shows; what has no room is counted at its foot."""
    lines, room = text.split("\n"), max(paper.height - 2, 1)
    if len(lines) > room:
        foot = f"{len(lines) - room} more lines; {foot}"
        lines = lines[:room]
    drawn = "".join(f"{line}{_REST_OF_LINE}\r\n" for line in lines)
    blank = f"{_REST_OF_LINE}\r\n"
    return f"{_HOLD}{_HOME}{drawn}{blank}{paper.paint(foot[: paper.width], 'dim')}{_REST_OF_LINE}{_REST}{_SHOW}"


@contextmanager
def _other_screen(stream: TextIO) -> Iterator[None]:
    stream.write(_OTHER_SCREEN)
    try:
        yield
    finally:
        stream.write(_BACK)
        stream.flush()


def _as_it_changes(
    stream: TextIO,
    look: Callable[[], Any],
    page: Callable[[Any, Paper], str],
    sleep: Callable[[float], None],
    *,
    as_json: bool,
) -> None:
    before: Any = None
    for seen in _looks(look, sleep):
        gone = isinstance(seen, NotRunning)
        now = str(seen) if gone else _calm(seen)
        if now == before:
            continue
        if as_json:
            line = {"error": {"message": str(seen)}} if gone else seen
            stream.write(json.dumps(line, ensure_ascii=False) + "\n")
        else:
            stream.write(("" if before is None else "\n") + (str(seen) if gone else page(seen, Paper())) + "\n")
        stream.flush()
        before = now


def _calm(seen: Any) -> Any:
    """Without what never rests."""
    if isinstance(seen, dict):
        return {name: _calm(value) for name, value in seen.items() if name not in _RESTLESS}
    return [_calm(each) for each in seen] if isinstance(seen, list) else seen
