"""`drain --wait`: how far it is, until nobody is there any more."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest

from supervisor.control.client import NotRunning, RequestFailed
from supervisor.control.commands import waiting
from supervisor.control.commands.waiting import drained, progress
from supervisor.control.snapshot import Snapshot

NOBODY = 2**22  # above the highest pid that Linux gives
FIRST = {"pid": NOBODY, "jobs": 2, "now": 100.0, "drain_until": 160.0}


def arguments(**more: Any) -> argparse.Namespace:
    return argparse.Namespace(**{"json": False, "restart": False, **more})


@pytest.fixture
def answers(monkeypatch) -> Callable[..., None]:
    """What the next questions are answered with."""

    def give(*seen: Any) -> None:
        rest = iter(seen)

        def ask(*_question: object) -> Any:
            found = next(rest)
            if isinstance(found, BaseException):
                raise found
            return found

        monkeypatch.setattr(waiting, "ask", ask)
        monkeypatch.setattr(waiting, "EVERY_S", 0.0)

    return give


def test_until_it_has_ended(answers, capsys):
    answers({**FIRST, "jobs": 1}, RequestFailed("busy"), {**FIRST, "jobs": 0}, NotRunning("nobody"))
    assert drained(arguments(), FIRST) == 0
    seen = capsys.readouterr()
    assert seen.out == "The supervisor has ended.\n"
    assert seen.err.splitlines() == [
        "Draining: 2 jobs left, ended in 1m 00s at the latest",
        "Draining: 1 job left, ended in 1m 00s at the latest",
        "Draining: no jobs left",
    ]


def test_the_process_is_waited_for_that_has_closed_its_socket(answers, capsys):
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        answers(NotRunning("nobody"))
        ended: list[int] = []
        waits = threading.Thread(target=lambda: ended.append(drained(arguments(), {**FIRST, "pid": process.pid})))
        waits.start()
        waits.join(0.3)
        assert not ended, "it said that a process has ended that runs"
        assert process.stdin is not None
        process.stdin.close()  # it ends, and nobody has asked for its exit code yet
        waits.join(20)
        assert ended == [0]


def test_until_another_one_is_there(answers, capsys):
    answers({**FIRST, "pid": 8})
    assert drained(arguments(restart=True), FIRST) == 0
    assert "to be started again" in capsys.readouterr().out


def test_for_programs(answers, capsys):
    answers(NotRunning("nobody"))
    assert drained(arguments(json=True), FIRST) == 0
    assert json.loads(capsys.readouterr().out) == {"ended": True, "pid": NOBODY}


def test_one_that_falls_silent(answers, monkeypatch):
    monkeypatch.setattr(waiting, "MUTE_S", -1.0)
    answers(RequestFailed("it did not answer"))
    with pytest.raises(RequestFailed):
        drained(arguments(), FIRST)


def test_ctrl_c_ends_the_wait(answers):
    answers(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        drained(arguments(), FIRST)


def test_a_drain_without_an_end():
    assert progress({"jobs": 3, "now": 1.0, "drain_until": None}) == "Draining: 3 jobs left"


async def test_the_verb(box, types, answers, capsys):
    box.shown = Snapshot(version="1.2", worker="box", pid=NOBODY)  # else it waits for whoever has that number here
    answers(NotRunning("nobody"))
    assert await types("drain", "--wait", "--reason", "moving") == 0
    assert box.acts.asked == [("drain", "moving", False)]
    assert capsys.readouterr().out == "The supervisor has ended.\n"
