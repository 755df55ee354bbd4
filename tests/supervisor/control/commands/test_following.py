"""`logs` and `events`: what is kept, what comes, and what comes after a restart."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import trio

from supervisor.cli import main
from supervisor.control.client import Event, NotRunning
from supervisor.control.commands import following
from supervisor.control.commands.following import event_line, log_line, resumed
from supervisor.control.commands.layout import Paper
from supervisor.control.server import open_control
from supervisor.observe.ring import Ring

ENTRY = {"seq": 1, "time": 0.5, "level": "warning", "logger": "x.y", "message": "m", "job": "j", "fields": {"n": 1}}


def add(ring: Ring, text: str, level: int = logging.INFO, **extras: Any) -> None:
    ring.add(logging.LogRecord("supervisor.test", level, __file__, 1, text, (), None), extras)


@pytest.fixture
async def ring(box, tmp_path) -> AsyncIterator[Ring]:
    """The log of a served supervisor; worker.toml beside it names it."""
    ring = Ring()
    (tmp_path / "worker.toml").write_text('[control]\nsocket = "logs.sock"\n')
    async with open_control(tmp_path / "logs.sock", box.surface._replace(lines=ring)):
        yield ring


async def typed(tmp_path: Path, *words: str) -> int:
    argv = [*words, "--config", str(tmp_path / "worker.toml")]
    return await trio.to_thread.run_sync(functools.partial(main, argv), abandon_on_cancel=True)


async def test_logs(ring, tmp_path, capsys):
    for number in range(150):
        add(ring, f"line {number}", job=f"j{number % 2}")
    add(ring, "bad\x1b[2J", logging.ERROR, model="chat")
    assert await typed(tmp_path, "logs") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 100
    assert lines[-1].endswith("error    test: bad [2J model=chat")
    assert await typed(tmp_path, "logs", "-n", "3", "--grep", "LINE", "--job", "j1") == 0
    assert [line.split("test: ", 1)[1] for line in capsys.readouterr().out.splitlines()] == [
        "line 145 job=j1",
        "line 147 job=j1",
        "line 149 job=j1",
    ]
    assert await typed(tmp_path, "logs", "--level", "error", "--json") == 0
    assert json.loads(capsys.readouterr().out)["model"] == "chat"
    assert await typed(tmp_path, "logs", "--since", "1h", "-n", "1000") == 0
    assert len(capsys.readouterr().out.splitlines()) == 151


async def test_follow(ring, tmp_path, capsys, monkeypatch):
    """The last line of the test is its Ctrl-C."""

    began = trio.Event()

    def line(entry: Any, _paper: Paper) -> str:
        trio.from_thread.run_sync(began.set)
        if entry["message"] == "stop":
            raise KeyboardInterrupt
        return str(entry["message"])

    monkeypatch.setattr(following, "log_line", line)
    add(ring, "old")
    add(ring, "older than that", logging.DEBUG)
    async with trio.open_nursery() as nursery:

        async def follow() -> None:
            with trio.fail_after(20):
                assert await typed(tmp_path, "logs", "-f", "--level", "info") == 0

        nursery.start_soon(follow)
        with trio.fail_after(20):
            await began.wait()
        add(ring, "new")
        add(ring, "stop")
    assert capsys.readouterr().out == "old\nnew\n"


# ---- across a restart


class Lives:
    """Streams of one supervisor after the other; None is a time in which nobody is there."""

    def __init__(self, *lives: list[Event] | None) -> None:
        self.asked: list[str] = []
        self._lives = iter(lives)

    def follow(self, _path: Path, route: str) -> Iterator[Event]:
        self.asked.append(route)
        life = next(self._lives)
        if life is None:
            raise NotRunning("nobody")
        yield from life


def take(monkeypatch: pytest.MonkeyPatch, lives: Lives, since: str = "", count: int = 10) -> list[str]:
    monkeypatch.setattr(following, "follow", lives.follow)
    monkeypatch.setattr(following, "AGAIN_S", 0.0)
    seen: list[str] = []
    with contextlib.suppress(RuntimeError):  # no life is left
        for event in resumed(Path("x"), lambda since: f"since={since}", since):
            seen.append(event.id)
            if len(seen) == count:
                break
    return seen


def test_goes_on_after_the_last_that_it_has_seen(monkeypatch, capsys):
    first = [Event("line", "a-1", {}), Event("line", "a-2", {}), Event("note", "", {})]
    lives = Lives(first, None, None, [Event("gap", "b-0", {}), Event("line", "b-1", {})], [])
    assert take(monkeypatch, lives) == ["a-1", "a-2", "", "b-0", "b-1"]
    assert lives.asked[:5] == ["since=", "since=a-2", "since=a-2", "since=a-2", "since=b-1"]
    told = capsys.readouterr().err.splitlines()
    assert told == [
        "supervisor: The supervisor has ended; waiting for it to come back.",
        "supervisor: The supervisor is back.",
    ]


def test_a_life_of_which_nothing_was_seen(monkeypatch):
    lives = Lives([], None, [Event("line", "b-1", {})])
    assert take(monkeypatch, lives) == ["b-1"]
    assert lives.asked[:3] == ["since=", "since=", "since=0"]


@pytest.mark.parametrize("since", ["", "a-3"])
def test_nobody_there_at_the_beginning(monkeypatch, since):
    with pytest.raises(NotRunning):
        take(monkeypatch, Lives(None), since)


async def test_events_without_a_supervisor(tmp_path, capsys):
    (tmp_path / "worker.toml").write_text('[control]\nsocket = "none.sock"\n')
    for verb in ("events", "logs"):
        assert await typed(tmp_path, verb) == 3
    assert await typed(tmp_path, "logs", "-f") == 3
    assert "supervisor run" in capsys.readouterr().err


def test_what_is_missing_is_told_beside_the_lines(monkeypatch, capsys, tmp_path):
    (tmp_path / "worker.toml").touch()
    events = [
        Event("hello", "a-3", {"boot": "a", "oldest": 1}),
        Event("gap", "a-7", {"missed": 4, "oldest": 8}),
        Event("status", "a-8", {"at": 0.0, "state": "busy", "why": ""}),
        Event("gap", "b-0", {"missed": None, "oldest": 1}),
    ]

    def follow(_path: Path, _route: str) -> Iterator[Event]:
        yield from events
        raise KeyboardInterrupt

    monkeypatch.setattr(following, "follow", follow)
    assert main(["events", "--json", "--config", str(tmp_path / "worker.toml")]) == 0
    seen = capsys.readouterr()
    assert json.loads(seen.out) == {"event": "status", "id": "a-8", "at": 0.0, "state": "busy", "why": ""}
    assert "4 are missing here" in seen.err
    assert "has been started again" in seen.err


# ---- lines


def test_lines_of_the_log():
    text = log_line(ENTRY, Paper())
    assert text[8:] == ".500 warning  x.y: m job=j n=1"
    assert "\x1b[33mwarning" in log_line(ENTRY, Paper(80, colour=True))
    assert log_line({**ENTRY, "traceback": "a\nb"}, Paper()).splitlines()[1:] == ["    a", "    b"]


def test_a_long_line_of_the_log_wraps_beside_its_time():
    text = log_line({**ENTRY, "message": "word " * 30}, Paper(60)).splitlines()
    assert len(text) > 2
    assert all(len(line) <= 60 for line in text)
    assert all(line.startswith(" " * 22 + "word") for line in text[1:-1])


def test_lines_of_events_fit_the_terminal():
    event = Event("model", "a-1", {"at": 0.25, "model": "chat\n", "state": "busy", "reason": "", "waits": "x" * 200})
    assert event_line(event, Paper())[8:].startswith(".250 model     model=chat  state=busy waits=xxx")
    assert len(event_line(event, Paper(80))) <= 80
