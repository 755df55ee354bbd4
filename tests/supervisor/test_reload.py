"""A running supervisor takes changes up, or keeps what it has and says why."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import trio

from supervisor import reload
from supervisor.config import load
from supervisor.errors import ConfigError
from supervisor.reload import Applier, Outcome, Reloader, look
from supervisor.reload_plan import Change
from supervisor.settings import Settings

BOUND_S = 60.0  # for one reload of a small file; it takes milliseconds


class Taken:
    """Appliers that note what they got."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, list[str], Settings]] = []

    def applier(self, name: str) -> Applier:
        async def apply(settings: Settings, changes: Sequence[Change]) -> None:
            await trio.lowlevel.checkpoint()
            self.calls.append((name, [change.key for change in changes], settings))

        return apply


class Outcomes:
    """What the reloader tells, to be waited for."""

    def __init__(self) -> None:
        self._send, self._receive = trio.open_memory_channel[Outcome](100)

    def __call__(self, outcome: Outcome) -> None:
        self._send.send_nowait(outcome)

    async def next(self) -> Outcome:
        with trio.fail_after(BOUND_S):
            return await self._receive.receive()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "worker.toml"
    path.write_text("[limits]\nstall_s = 10\n")
    return path


def made(path: Path, appliers: dict[str, Applier], tell: Callable[[Outcome], None] = lambda _: None) -> Reloader:
    return Reloader(path, load(path, {}), appliers, environ={}, period_s=0.01, on_outcome=tell)


def replace(path: Path, text: str) -> None:
    new = path.with_name("new")
    new.write_text(text)
    new.replace(path)


async def test_changes_go_to_the_applier_of_the_longest_key(path):
    taken = Taken()
    reloader = made(path, {name: taken.applier(name) for name in ("limits", "limits.restart", "log")})
    path.write_text("[limits]\nstall_s = 20\nload_s = 30\n[limits.restart]\nhealthy_s = 5\n[log]\nlevel = 'debug'\n")
    outcome = await reloader.reload("asked")
    calls = {name: keys for name, keys, _ in taken.calls}
    assert calls == {
        "limits": ["limits.load_s", "limits.stall_s"],
        "limits.restart": ["limits.restart.healthy_s"],
        "log": ["log.level"],
    }
    assert taken.calls[0][2] is reloader.settings
    assert reloader.settings.limits.stall_s == 20
    assert {change.key for change in outcome.applied} == {key for keys in calls.values() for key in keys}
    assert (outcome.problems, outcome.restart) == ((), ())
    assert (await reloader.reload("again")).applied == ()
    assert len(taken.calls) == 3


async def test_with_a_mistake_everything_stays_as_it_was(path, caplog):
    taken = Taken()
    reloader = made(path, {"limits": taken.applier("limits")})
    path.write_text("[limits]\nstall_s = 20\nload_s = 'x'\n[log]\nlevel = 'inf'\n")
    with caplog.at_level(logging.ERROR):
        outcome = await reloader.reload("asked")
    assert taken.calls == []
    assert reloader.settings.limits.stall_s == 10
    assert len(outcome.problems) == 2
    assert all(problem in caplog.text for problem in outcome.problems)
    assert "the old one stays in force" in caplog.text
    assert reloader.outcome is outcome
    assert outcome.plain()["ok"] is False
    path.write_text("[limits]\nstall_s = 20\n")
    assert (await reloader.reload("mended")).problems == ()
    assert [keys for _, keys, _ in taken.calls] == [["limits.stall_s"]]


async def test_what_needs_a_restart_stays_listed_until_it_is_changed_back(path):
    taken = Taken()
    reloader = made(path, {"worker": taken.applier("worker")})
    path.write_text("[limits]\nstall_s = 20\n[worker]\nname = 'a'\n")
    outcome = await reloader.reload("asked")
    assert {change.key for change in outcome.restart} == {"limits.stall_s", "worker.name"}, "nobody takes limits up"
    assert (outcome.applied, taken.calls) == ((), [])
    path.write_text("[limits]\nstall_s = 30\n[worker]\nname = 'b'\n")
    rows = {change.key: (change.old, change.new) for change in (await reloader.reload("again")).restart}
    assert rows == {"limits.stall_s": (10, 30), "worker.name": ("", "b")}, "old is what runs"
    path.write_text("[limits]\nstall_s = 10\n[worker]\nname = 'b'\n")
    assert [change.key for change in (await reloader.reload("back")).restart] == ["worker.name"]
    assert [change.key for change in (await reloader.reload("nothing new")).restart] == ["worker.name"]


@pytest.mark.parametrize("error", [ConfigError(["no such level"]), ZeroDivisionError("oops")])
async def test_an_applier_that_fails_ends_nothing(path, error, caplog):
    async def fails(_settings: Settings, _changes: Sequence[Change]) -> None:
        await trio.lowlevel.checkpoint()
        raise error

    taken = Taken()
    reloader = made(path, {"limits": fails, "log": taken.applier("log")})
    path.write_text("[limits]\nstall_s = 20\n[log]\nlevel = 'debug'\n")
    outcome = await reloader.reload("asked")
    assert [change.key for change in outcome.applied] == ["log.level"]
    assert [change.key for change in outcome.restart] == ["limits.stall_s"]
    assert outcome.problems == (f"limits.stall_s: could not be taken up: {error}",)
    assert outcome.problems[0] in caplog.text


async def test_the_files_are_watched(path, nursery):
    taken, outcomes = Taken(), Outcomes()
    reloader = made(path, {"limits": taken.applier("limits")}, outcomes)
    await nursery.start(reloader.run)
    replace(path, "[limits]\nstall_s = 20\n")  # another inode
    assert [change.new for change in (await outcomes.next()).applied] == [20]
    path.write_text("[limits]\nstall_s = 300\n")  # in place
    assert [change.new for change in (await outcomes.next()).applied] == [300]
    (path.parent / "conf.d").mkdir()
    (path.parent / "conf.d" / "a.toml").write_text("limits.stall_s = 40\n")
    assert [change.new for change in (await outcomes.next()).applied] == [40]
    (path.parent / "conf.d" / "a.toml").unlink()
    assert [change.new for change in (await outcomes.next()).applied] == [300]
    path.unlink()
    assert "cannot be read" in (await outcomes.next()).problems[0]
    replace(path, "[limits]\nstall_s = 20\n")
    assert [change.new for change in (await outcomes.next()).applied] == [20]


async def test_what_changed_before_the_watch_began_is_taken_up(path, nursery):
    taken, outcomes = Taken(), Outcomes()
    reloader = made(path, {"limits": taken.applier("limits")}, outcomes)
    path.write_text("[limits]\nstall_s = 20\n")
    await nursery.start(reloader.run)
    assert [change.new for change in (await outcomes.next()).applied] == [20]


async def test_a_file_that_is_being_written_is_left_in_peace(path, nursery, monkeypatch):
    looks: list[int] = []
    enough = trio.Event()

    def changing(_path: Path) -> reload.Look:
        looks.append(len(looks))
        if len(looks) > 20:
            trio.from_thread.run_sync(enough.set)
        return (("worker.toml", 1, len(looks), 1),)

    outcomes = Outcomes()
    reloader = made(path, {}, outcomes)
    monkeypatch.setattr(reload, "look", changing)
    await nursery.start(reloader.run)
    with trio.fail_after(BOUND_S):
        await enough.wait()
    assert reloader.outcome is None, "it never looked the same twice"


async def test_sighup(path, nursery, monkeypatch):
    taken, outcomes = Taken(), Outcomes()
    looked, moved_on = trio.Event(), Reloader._moved_on

    def first_look(self: Reloader) -> bool:
        found = moved_on(self)
        trio.from_thread.run_sync(looked.set)
        return found

    monkeypatch.setattr(Reloader, "_moved_on", first_look)
    reloader = Reloader(
        path, load(path, {}), {"limits": taken.applier("limits")}, environ={}, period_s=600, on_outcome=outcomes
    )
    await nursery.start(reloader.run)
    with trio.fail_after(BOUND_S):
        await looked.wait()  # else the watch may be the one that finds the change
    path.write_text("[limits]\nstall_s = 20\n")
    os.kill(os.getpid(), signal.SIGHUP)
    outcome = await outcomes.next()
    assert (outcome.reason, [change.new for change in outcome.applied]) == ("SIGHUP", [20])


@pytest.mark.parametrize(("before", "after", "hangups"), [(True, False, 1), (True, True, 0), (False, False, 0)])
async def test_a_closed_terminal_asks_nobody_to_reload(path, nursery, monkeypatch, before, after, hangups):
    terminal = [before]
    monkeypatch.setattr(reload, "_has_terminal", lambda: terminal[0])
    hung, outcomes = Outcomes(), Outcomes()
    reloader = Reloader(
        path, load(path, {}), {}, environ={}, period_s=600, on_outcome=outcomes,
        on_hangup=lambda: hung(Outcome("hangup")),
    )  # fmt: skip
    await nursery.start(reloader.run)
    terminal[0] = after
    os.kill(os.getpid(), signal.SIGHUP)
    told = await (hung if hangups else outcomes).next()
    assert told.reason == ("hangup" if hangups else "SIGHUP")


def test_a_look_at_the_files(path):
    first = look(path)
    assert [name for name, *_ in first] == [str(path)]
    replace(path, path.read_text())
    assert look(path) != first
    path.unlink()
    assert look(path) == ()
