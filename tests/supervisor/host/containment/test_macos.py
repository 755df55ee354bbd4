"""macOS's way to see a child's end, with a kqueue that keeps books; and its leash on processes that any POSIX has."""

from __future__ import annotations

import signal
import sys
from types import SimpleNamespace

import pytest
import trio

from supervisor.host.child import ChildSpec, Exit, open_child
from supervisor.host.containment import macos
from supervisor.host.containment.linux import LinuxLeash

ADD, DELETE, ONESHOT, PROC, NOTE_EXIT = 1, 2, 16, -5, 0x8000_0000


class Queue:
    """Knows these pids."""

    def __init__(self, *alive: int) -> None:
        self.alive = alive
        self.asked: list[tuple[int, int, int, int]] = []

    def control(self, changes, most):
        assert most == 0
        for change in changes:
            if change[0] not in self.alive:
                raise ProcessLookupError
            self.asked.append(change)
        return []


@pytest.fixture
def kqueue(monkeypatch: pytest.MonkeyPatch):
    """Installs a queue; returns what `wait_kevent` was called with."""
    waited: list[tuple[int, int]] = []

    def install(queue: Queue, outcome: str) -> list[tuple[int, int]]:
        async def wait_kevent(ident: int, filter: int, abort) -> None:
            waited.append((ident, filter))
            if outcome == "cancelled":
                await trio.lowlevel.wait_task_rescheduled(abort)

        names = {"KQ_FILTER_PROC": PROC, "KQ_EV_ADD": ADD, "KQ_EV_DELETE": DELETE, "KQ_EV_ONESHOT": ONESHOT}
        fake = SimpleNamespace(kevent=lambda *words: words, KQ_NOTE_EXIT=NOTE_EXIT, **names)
        monkeypatch.setattr(macos, "select", fake)
        monkeypatch.setattr(trio.lowlevel, "current_kqueue", lambda: queue, raising=False)
        monkeypatch.setattr(trio.lowlevel, "wait_kevent", wait_kevent, raising=False)
        return waited

    return install


async def test_the_end_is_asked_for_before_it_is_waited_for(kqueue):
    queue = Queue(7)
    waited = kqueue(queue, "ended")
    await macos.wait_exit(7)
    assert queue.asked == [(7, PROC, ADD | ONESHOT, NOTE_EXIT)]
    assert waited == [(7, PROC)]


async def test_a_child_that_kqueue_no_longer_knows_has_ended(kqueue):
    waited = kqueue(Queue(), "ended")
    await macos.wait_exit(7)
    assert waited == []


@pytest.mark.parametrize("alive", [True, False])
async def test_cancellation_takes_the_question_back_even_when_the_answer_came_in_between(kqueue, alive: bool):
    queue = Queue(7)
    kqueue(queue, "cancelled")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(macos.wait_exit, 7)
        await trio.testing.wait_all_tasks_blocked()
        if not alive:
            queue.alive = ()
        nursery.cancel_scope.cancel()
    assert [asked[2] for asked in queue.asked] == ([ADD | ONESHOT, DELETE] if alive else [ADD | ONESHOT])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the wait for the end is borrowed from Linux")
async def test_the_leash_ends_a_family_by_the_process_table(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(macos.MacosLeash, "leader_dead", LinuxLeash.leader_dead)
    code = (
        "import os, signal\nsignal.signal(15, signal.SIG_IGN)\n"
        "if os.fork() == 0: os.setsid()\nos.write(1, b'%d\\n' % os.getpid())\nsignal.pause()"
    )
    spec = ChildSpec(name="family", argv=(sys.executable, "-c", code))
    said = b""
    with trio.fail_after(20):
        async with open_child(spec, backend=macos.Macos()) as child:
            while said.count(b"\n") < 2:
                said += await child.read()
            pids = {int(word) for word in said.split()}
            assert child._leash.members().keys() == pids - {child.pid}
            child.kill("test")
            assert await child.wait() == Exit(signal=signal.SIGKILL)
            while await child.read():  # the pipe ends when its last writer does
                pass


def test_a_number_that_has_changed_hands_is_not_hit():
    leash = object.__new__(macos.MacosLeash)
    assert leash.signal_exactly(1, "not its start", signal.SIGKILL) is False
    assert leash.signal_exactly(2**22 + 1, "0", signal.SIGKILL) is False


def test_facts():
    assert macos.Macos().facts() == {"platform": "macos"}
    assert macos.Macos().verdicts() == {}
