"""Answers that take their time, and streams: over real sockets, against clients that leave or do not read."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator

import pytest
import trio

from supervisor.control import conversation
from supervisor.control.conversation import MOST_STREAMS, Conversations
from supervisor.control.exchange import Answer, Refused, Request, Stream, event, query, reply
from tests.supervisor.control.test_server import everything, parse

GET = b"GET %s HTTP/1.1\r\nHost: x\r\n\r\n"


class Clock:
    """A stream that ticks for ever, and knows whether it was closed."""

    def __init__(self) -> None:
        self.sent = 0
        self.closed = trio.Event()

    async def parts(self, size: int) -> AsyncIterator[bytes]:
        try:
            while True:
                self.sent += 1
                yield event("tick", "x" * size, self.sent)
                await trio.lowlevel.checkpoint()
        finally:
            self.closed.set()


@pytest.fixture
async def clock():
    return Clock()


@pytest.fixture
async def port(clock, nursery):
    async def answer(request: Request) -> Answer:
        if request.path == "/three":
            return Stream(_three())
        if request.path == "/ever":
            return Stream(clock.parts(10))
        if request.path == "/flood":
            return Stream(clock.parts(100_000))
        if request.path == "/later":
            await trio.lowlevel.checkpoint()
            return reply({"late": True}, 202, x_more="yes")
        raise ValueError(request.path)

    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    nursery.start_soon(Conversations(answer).serve, listeners)
    return listeners[0].socket.getsockname()[1]


async def _three() -> AsyncIterator[bytes]:
    for number in range(3):
        yield event("count", number)


async def ask(port: int, path: bytes) -> trio.SocketStream:
    stream = await trio.open_tcp_stream("127.0.0.1", port)
    await stream.send_all(GET % path)
    return stream


async def test_an_answer_may_take_its_time_and_have_headers(port):
    async with await ask(port, b"/later") as stream:
        status, headers, body = parse(await everything(stream))
    assert (status, headers["x-more"], json.loads(body)) == (202, "yes", {"late": True})


async def test_a_client_that_closes_its_half_is_answered(port):
    async with await ask(port, b"/later") as stream:
        await stream.send_eof()
        assert parse(await everything(stream))[0] == 202


async def test_a_stream_ends_with_its_last_piece(port):
    async with await ask(port, b"/three") as stream:
        status, headers, body = parse(await everything(stream))
    assert (status, headers["content-type"]) == (200, "text/event-stream")
    assert body.count(b"event: count\ndata: ") == 3
    assert body.endswith(b"0\r\n\r\n")


async def test_a_stream_is_closed_when_its_client_leaves(port, clock):
    async with await ask(port, b"/ever") as stream:
        await stream.receive_some(100)
    with trio.fail_after(60):
        await clock.closed.wait()


async def test_a_client_that_does_not_read_loses_its_stream_and_nobody_elses_is_touched(port, clock, monkeypatch):
    async with await ask(port, b"/flood") as stream:
        await stream.receive_some(1)  # its request was heard
        monkeypatch.setattr(conversation, "PATIENCE_S", 0.2)
        with trio.fail_after(60):
            await clock.closed.wait()
    monkeypatch.undo()
    async with await ask(port, b"/later") as stream:
        assert parse(await everything(stream))[0] == 202


async def test_there_are_only_so_many_streams(port):
    held = []
    for _ in range(MOST_STREAMS):
        held.append(await ask(port, b"/ever"))
        assert (await held[-1].receive_some(20)).startswith(b"HTTP/1.1 200")
    async with await ask(port, b"/ever") as stream:
        status, _headers, body = parse(await everything(stream))
    assert status == 503
    assert b"streams are open" in body
    for stream in held:
        await stream.aclose()


async def test_a_mistake_in_an_answer_is_a_500(port, caplog):
    async with await ask(port, b"/wrong") as stream:
        assert parse(await everything(stream))[0] == 500
    assert "ValueError" in caplog.text


def test_a_query_is_checked():
    import msgspec

    class Since(msgspec.Struct, forbid_unknown_fields=True):
        since: int = 0
        q: str = ""

    found = query(Request("GET", "/v1/logs?since=4&q=a%20b"), Since)
    assert (found.since, found.q) == (4, "a b")
    for wrong in ("since=x", "sinec=4"):
        with pytest.raises(Refused) as refusal:
            query(Request("GET", f"/v1/logs?{wrong}"), Since)
        assert refusal.value.status == 400
