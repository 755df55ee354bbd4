"""Bodies of streams: when they begin, what stands in their pauses, how those of bytes end."""

from __future__ import annotations

from typing import Any

import trio
import trio.testing

from coordinator.streams import EventWriter, Shape, sse


async def test_comment_lines_come_only_after_the_headers(autojump_clock: trio.testing.MockClock) -> None:
    sent: list[tuple[float, bytes]] = []

    async def send(message: Any) -> None:
        sent.append((trio.current_time(), message.get("body", b"start")))

    writer = EventWriter(send, {}, comment_s=15)
    begin = trio.current_time()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(writer.comment_forever)
        await trio.sleep(100)
        assert sent == []
        await writer.write(sse({"a": 1}))
        await trio.sleep(31)
        nursery.cancel_scope.cancel()
    times = [round(at - begin) for at, body in sent if body.startswith(b":")]
    assert times == [115, 130]
    assert sent[1][1] == b'data: {"a":1}\n\n'


def test_events() -> None:
    assert sse([1], "x") == b"event: x\ndata: [1]\n\n"


async def test_after_the_clients_patience_it_is_told_what_it_waits_for(autojump_clock: trio.testing.MockClock) -> None:
    sent: list[bytes] = []

    async def send(message: Any) -> None:
        sent.append(message.get("body", b"start"))

    writer = EventWriter(send, {}, comment_s=15)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(writer.comment_forever)
        nursery.start_soon(writer.begin_after, 10)
        await writer.waits("load 1 of 4")
        await trio.sleep(9)
        assert sent == [], "a refusal can still be a real one"
        await trio.sleep(2)
        assert sent == [b"start", b": waiting: load 1 of 4\n\n"]
        await writer.waits("load 1 of 4")
        await writer.waits("load 2 of 4")
        assert sent[2:] == [b": waiting: load 2 of 4\n\n"]
        nursery.cancel_scope.cancel()


async def test_nothing_of_ours_stands_between_bytes(autojump_clock: trio.testing.MockClock) -> None:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    writer = EventWriter(send, {}, comment_s=1, shape=Shape("audio/mpeg"))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(writer.comment_forever)
        nursery.start_soon(writer.begin_after, 1)
        await trio.sleep(5)
        assert sent == []
        await writer.write(b"abc")
        await writer.waits("x")
        await trio.sleep(5)
        nursery.cancel_scope.cancel()
    assert (b"content-type", b"audio/mpeg") in sent[0]["headers"]
    assert [message["body"] for message in sent[1:]] == [b"abc"]
