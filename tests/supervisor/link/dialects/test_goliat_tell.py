"""What is told while a study runs: bounded, in order, not too often, and the end last."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import trio
import trio.testing

from supervisor.link.dialects import goliat_tell as tell
from supervisor.link.dialects.goliat_http import Trouble
from supervisor.link.dialects.goliat_tell import Teller
from supervisor.link.dialects.goliat_wire import Message, fatal, finished, memory, status
from supervisor.link.reconnect import Backoff

Clock = trio.testing.MockClock
GONE = Trouble("away")
THROTTLED = Trouble("slow down", status=429, retry_after_s=7.0)
REFUSED = Trouble("no", status=400, again=False)


class Peer:
    """Notes what it is told; raises what `troubles` has, first."""

    def __init__(self) -> None:
        self.told: list[tuple[float, Message]] = []
        self.troubles: list[Trouble] = []
        self.away = False
        self.tries = 0
        self.teller = Teller(self.send, utc=lambda: 0.0, backoff=lambda: Backoff(1.0, 4.0, chance=lambda: 1.0))

    async def send(self, message: Message) -> None:
        await trio.lowlevel.checkpoint()
        self.tries += 1
        if self.troubles:
            raise self.troubles.pop(0)
        if self.away:
            raise GONE
        self.told.append((trio.current_time(), message))

    @property
    def messages(self) -> list[Message]:
        return [message for _at, message in self.told]

    @property
    def lines(self) -> list[str]:
        return [
            line["message"] for message in self.messages if message["type"] == "log_batch" for line in message["logs"]
        ]

    def say(self, *texts: str) -> None:
        for text in texts:
            self.teller.add(status(text, "default", 0.0))


@pytest.fixture
def peer() -> Peer:
    return Peer()


def progress(current: int) -> dict[str, Any]:
    return {"type": "overall_progress", "current": current, "total": 9}


async def test_lines_go_in_numbered_batches_at_most_five_a_second(
    peer: Peer, nursery: trio.Nursery, autojump_clock: Clock
) -> None:
    texts = [str(number) for number in range(950)]
    peer.say(*texts)
    nursery.start_soon(peer.teller.run)
    await trio.sleep(10)
    assert peer.lines == texts
    assert [message["sequence"] for message in peer.messages] == list(range(1, 11))
    times = [at for at, _message in peer.told]
    assert all(later - sooner >= 0.199 for sooner, later in itertools.pairwise(times))
    assert peer.teller.waiting == 0


async def test_of_a_state_only_the_newest_is_told_and_lines_do_not_hold_it_up(
    peer: Peer, nursery: trio.Nursery, autojump_clock: Clock
) -> None:
    peer.say(*map(str, range(500)))
    for current in range(9):
        peer.teller.add(progress(current))
    peer.teller.add({"type": "stage_progress", "name": "solve", "current": 1, "total": 2})
    peer.teller.add({"type": "stage_progress", "name": "mesh", "current": 1, "total": 2})
    nursery.start_soon(peer.teller.run)
    await trio.sleep(10)
    assert [message for message in peer.messages if message["type"] == "overall_progress"] == [progress(8)]
    assert sum(message["type"] == "stage_progress" for message in peer.messages) == 2
    assert "progress" in peer.messages[1]["type"]


async def test_states_are_bounded(peer: Peer, nursery: trio.Nursery, autojump_clock: Clock) -> None:
    for number in range(1000):
        peer.teller.add({"type": "stage_progress", "name": str(number), "current": 1, "total": 2})
    nursery.start_soon(peer.teller.run)
    await trio.sleep(100)
    assert len(peer.told) == tell.MOST_STATES


async def test_while_it_is_away_the_oldest_lines_are_lost_and_counted(
    peer: Peer, nursery: trio.Nursery, autojump_clock: Clock
) -> None:
    peer.away = True
    nursery.start_soon(peer.teller.run)
    peer.say("first")
    await trio.sleep(1)
    peer.say(*map(str, range(tell.MOST_LINES + 25)))
    assert peer.teller.waiting == tell.MOST_LINES + 1
    peer.away = False
    await trio.sleep(30)
    assert peer.lines[:3] == ["first", "25 lines were left out here.", "25"]
    assert peer.lines[-1] == str(tell.MOST_LINES + 24)


async def test_lines_that_never_came_here_are_counted_too(
    peer: Peer, nursery: trio.Nursery, autojump_clock: Clock
) -> None:
    nursery.start_soon(peer.teller.run)
    peer.teller.lost(3)
    await trio.sleep(1)
    assert peer.lines == ["3 lines were left out here."]


async def test_a_batch_keeps_its_number_until_it_is_taken(
    peer: Peer, nursery: trio.Nursery, autojump_clock: Clock
) -> None:
    peer.troubles = [GONE, THROTTLED, GONE]
    peer.say("a")
    nursery.start_soon(peer.teller.run)
    await trio.sleep(0.1)
    peer.say("b")
    await trio.sleep(30)
    assert [(message["sequence"], len(message["logs"])) for message in peer.messages] == [(1, 1), (2, 1)]
    assert peer.told[0][0] >= 7.0, "what the dashboard asked for was not waited for"


async def test_a_message_that_is_refused_does_not_hold_up_the_others(
    peer: Peer, nursery: trio.Nursery, autojump_clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    peer.troubles = [REFUSED]
    peer.teller.add(progress(1))
    nursery.start_soon(peer.teller.run)
    await trio.sleep(1)
    peer.say("after")
    await trio.sleep(1)
    assert peer.lines == ["after"]
    assert "overall_progress is given up" in caplog.text


async def test_what_is_no_line_keeps_its_place_between_lines(
    peer: Peer, nursery: trio.Nursery, autojump_clock: Clock
) -> None:
    peer.say("a")
    peer.teller.add(memory("full"))
    peer.say("b")
    nursery.start_soon(peer.teller.run)
    await trio.sleep(3)
    assert [message["type"] for message in peer.messages] == ["log_batch", "memory_error", "log_batch"]


async def test_the_end_comes_last_and_is_known_to_have_come(
    peer: Peer, nursery: trio.Nursery, autojump_clock: Clock
) -> None:
    nursery.start_soon(peer.teller.run)
    peer.say(*map(str, range(300)))
    peer.teller.add(progress(9))
    peer.troubles = [GONE]
    assert await peer.teller.last(finished()) is None
    assert [message["type"] for message in peer.messages] == [
        *["log_batch", "overall_progress", "log_batch", "log_batch"],
        "finished",
    ]


async def test_an_end_that_is_refused_says_so(peer: Peer, nursery: trio.Nursery, autojump_clock: Clock) -> None:
    nursery.start_soon(peer.teller.run)
    peer.troubles = [REFUSED]
    assert await peer.teller.last(fatal("x")) is REFUSED


async def test_an_end_that_nobody_waits_for_any_more_is_not_told(
    peer: Peer, nursery: trio.Nursery, autojump_clock: Clock
) -> None:
    peer.away = True
    nursery.start_soon(peer.teller.run)
    with trio.move_on_after(5):
        await peer.teller.last(finished())
    peer.away = False
    peer.say("later")
    await trio.sleep(10)
    assert [message["type"] for message in peer.messages] == ["log_batch"]


def test_adding_never_waits() -> None:
    adds: Callable[[Message], None] = Teller(Peer().send, utc=lambda: 0.0).add
    for _ in range(3 * tell.MOST_LINES):
        adds(status("x", "default", 0.0))
