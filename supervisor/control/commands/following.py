"""`supervisor logs | events`: what happened, and with `-f` what happens, also across a restart of the supervisor."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from supervisor.control.client import Event, NotRunning, follow
from supervisor.control.commands import asking
from supervisor.control.commands.asking import ask
from supervisor.control.commands.layout import Paper, cut, paper_of, plain, wrapped
from supervisor.errors import ExitCode

AGAIN_S = 0.5
_LEVELS = ("debug", "info", "warning", "error", "critical")
_HUES = {"debug": "dim", "warning": "yellow", "error": "red", "critical": "red"}
_MARGIN = 22  # cells of the time and the level
_RING = 2000  # lines that the supervisor keeps (observe/ring.py)
# Members of a log line that have their own place.
_PLACED = frozenset({"seq", "time", "level", "logger", "message", "traceback", "fields"})


def add_arguments(name: str, parser: argparse.ArgumentParser) -> None:
    """Describe the arguments of one verb."""
    asking.add_common(parser)
    if name == "logs":
        parser.add_argument("-f", "--follow", action="store_true", help="go on until Ctrl-C, also after a restart")
        parser.add_argument("--level", choices=_LEVELS, default="", help="this one and worse")
        parser.add_argument("--grep", metavar="TEXT", default="", help="only lines with this in them, in either case")
        parser.add_argument("--job", metavar="ID", default="", help="only lines of this job")
        parser.add_argument("--since", metavar="TIME", type=asking.duration, help="not older than this: 90s, 10m, 2h")
        parser.add_argument("-n", "--lines", metavar="COUNT", type=asking.positive, help="the latest so many (100)")
    else:
        parser.add_argument("--since", metavar="ID", default="", help="go on after this event; 0 for all that are kept")
    parser.set_defaults(command=_logs if name == "logs" else _events)


# ---- the verbs


def _logs(arguments: argparse.Namespace) -> int:
    wanted: dict[str, object] = {"level": arguments.level, "q": arguments.grep, "job": arguments.job}
    wanted["limit"] = min(arguments.lines or (_RING if arguments.since else 100), _RING)
    oldest = time.time() - arguments.since if arguments.since else 0.0
    paper = paper_of(sys.stdout)

    def line(entry: Mapping[str, Any]) -> str:
        return json.dumps(entry, ensure_ascii=False) if arguments.json else log_line(entry, paper)

    if arguments.follow:
        # `limit` is about the beginning only: of what came since the last line nothing is to be left out.
        return _go_on(
            arguments,
            lambda since: _route({**wanted, "follow": 1, **({"since": since, "limit": None} if since else {})}),
            lambda event: line(event.data) if event.name == "line" and event.data["time"] >= oldest else None,
        )
    seen = ask(arguments, "GET", _route(wanted))
    for entry in seen["lines"]:
        if entry["time"] >= oldest:
            sys.stdout.write(line(entry) + "\n")
    sys.stdout.flush()
    return int(ExitCode.STOPPED)


def _events(arguments: argparse.Namespace) -> int:
    paper = paper_of(sys.stdout)

    def line(event: Event) -> str | None:
        if event.name == "hello":
            return None
        if arguments.json:
            return json.dumps({"event": event.name, "id": event.id, **event.data}, ensure_ascii=False)
        return event_line(event, paper)

    return _go_on(arguments, lambda since: "/v1/events" + (f"?since={since}" if since else ""), line, arguments.since)


def _route(wanted: Mapping[str, object]) -> str:
    return f"/v1/logs?{urlencode({name: value for name, value in wanted.items() if value not in ('', None)})}"


def _go_on(
    arguments: argparse.Namespace, route: Callable[[str], str], line: Callable[[Event], str | None], since: str = ""
) -> int:
    """Write a line for each event until Ctrl-C, which is how it is meant to end: exit code 0."""
    try:
        for event in resumed(asking.socket_of(arguments), route, since):
            if event.name in ("gap", "dropped"):
                _note(_missed(event.data))
            elif (text := line(event)) is not None:
                sys.stdout.write(text + "\n")
                sys.stdout.flush()
    except KeyboardInterrupt:
        pass
    return int(ExitCode.STOPPED)


def resumed(
    path: Path, route: Callable[[str], str], since: str = "", *, sleep: Callable[[float], None] = time.sleep
) -> Iterator[Event]:
    """Events of a stream and of those that follow it, for as long as the caller wants them.

    Args:
        route: what to ask for, given the id of the last event that was seen ("" when there was none).

    Raises:
        SupervisorError: the first stream does not begin, or a later one is refused.
    """
    begun = gone = False
    while True:
        try:
            for event in follow(path, route(since)):
                if gone:
                    _note("The supervisor is back.")
                begun, gone, since = True, False, event.id or since
                yield event
            begun = True
        except NotRunning:
            if not begun:
                raise
            if not gone:
                _note("The supervisor has ended; waiting for it to come back.")
                gone = True
                since = since or "0"  # nothing was seen of that life, and the next one is read from its beginning
        sleep(AGAIN_S)


def _note(text: str) -> None:
    """Beside the lines, not among them."""
    sys.stderr.write(f"supervisor: {text}\n")
    sys.stderr.flush()


def _missed(data: Mapping[str, Any]) -> str:
    number = data.get("lines", data.get("missed"))
    if number is None:
        return "It has been started again; what was said before its end may be missing here."
    return f"{number} {'is' if number == 1 else 'are'} missing here: they came faster than they are kept."


# ---- lines


def log_line(entry: Mapping[str, Any], paper: Paper) -> str:
    """One line of the log: when, how bad, what, and what it is about."""
    level = entry["level"]
    about = {name: value for name, value in entry.items() if name not in _PLACED} | entry.get("fields", {})
    tail = "".join(f" {name}={value}" for name, value in about.items())
    text = f"{entry['logger'].removeprefix('supervisor.')}: {entry['message']}{tail}"
    first, *more = wrapped(text, paper, indent=" " * _MARGIN)
    head = f"{_moment(entry['time'])} {paper.paint(f'{level:<8}', _HUES.get(level, ''))}"
    trace = [f"    {plain(line)}" for line in entry.get("traceback", "").splitlines()]
    return "\n".join([head + first[_MARGIN - 1 :], *more, *trace])


def event_line(event: Event, paper: Paper) -> str:
    """One event: when, what it is about, and its data."""
    data = dict(event.data)
    at = data.pop("at", None)
    facts = " ".join(f"{name}={_value(value)}" for name, value in data.items() if value not in ("", None, {}, []))
    name = paper.paint(f"{event.name:<9}", "bold")
    room = None if paper.width is None else max(paper.width - 23, 20)
    return f"{_moment(at) if at is not None else ' ' * 12} {name} {facts if room is None else cut(facts, room)}"


def _value(value: object) -> str:
    return plain(value) if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _moment(seconds: float) -> str:
    return time.strftime("%H:%M:%S", time.localtime(seconds)) + f".{int(seconds * 1000) % 1000:03}"
