"""The way to another replica: gathered, bounded, made again, never waited for."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import anyio
import pytest
from websockets.asyncio.server import ServerConnection, serve

from coordinator.replicas import frames, peer
from coordinator.replicas.peer import Caller, Peer
from tests.certificates import self_signed
from tests.coordinator.replicas.rig import came_true

ME = Caller("gw_me", "secret-secret-secret")
PATIENCE_S = 60.0
Take = Callable[[ServerConnection], Awaitable[None]]


@contextlib.asynccontextmanager
async def listening(take: Take) -> AsyncIterator[str]:
    """A door of another replica; its URL."""
    async with serve(take, "127.0.0.1", 0, compression=None) as server:
        port = next(iter(server.sockets)).getsockname()[1]
        yield f"ws://127.0.0.1:{port}"


@contextlib.asynccontextmanager
async def running(one: Peer) -> AsyncIterator[Peer]:
    async with anyio.create_task_group() as group:
        group.start_soon(one.run)
        with anyio.fail_after(PATIENCE_S):
            yield one
        group.cancel_scope.cancel()


def chunk(seq: int, size: int = 1) -> frames.ChunkFrame:
    return frames.ChunkFrame("job", 1, seq, b"x" * size)


def hello() -> list[frames.Frame]:
    return [frames.WatchFrame("followed", True)]


def on_asyncio(test: Callable[[], Awaitable[None]]) -> None:
    """Replicas are asyncio programs: uvicorn is, and so is the client of WebSockets."""

    async def whole() -> None:
        await test()

    asyncio.run(whole())


def test_first_it_says_what_it_follows_then_what_comes_in_its_order() -> None:
    async def test() -> None:
        messages: list[list[frames.AnyFrame]] = []
        enough = anyio.Event()

        async def take(connection: ServerConnection) -> None:
            assert connection.request is not None
            assert connection.request.headers["authorization"] == f"Bearer {ME.secret}"
            assert (connection.request.headers[frames.FROM], connection.request.headers[frames.TO]) == (
                "gw_me",
                "gw_it",
            )
            async for data in connection:
                assert isinstance(data, bytes)
                messages.append(frames.decode(data))
                if sum(map(len, messages)) == 102:
                    enough.set()

        async with listening(take) as url:
            one = Peer("gw_it", url, ME, hello)
            for seq in range(100):
                assert one.push(chunk(seq))
            async with running(one):
                await came_true(lambda: len(messages) == 2)
                one.push(chunk(100), urgent=True)
                await enough.wait()
        assert messages[0] == hello()
        assert messages[1] == [chunk(seq) for seq in range(100)]  # gathered in one message
        assert messages[2] == [chunk(100)]

    on_asyncio(test)


def test_a_peer_that_is_away_costs_no_more_than_its_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        monkeypatch.setattr(peer, "MAX_FRAMES", 10)
        one = Peer("gw_it", "ws://127.0.0.1:9", ME, hello)
        assert [one.push(chunk(seq)) for seq in range(12)] == [True] * 10 + [False] * 2
        assert one.dropped == 2
        monkeypatch.setattr(peer, "MAX_FRAMES", 100)
        monkeypatch.setattr(peer, "MAX_BYTES", 4096)
        assert not one.push(chunk(12, 4096))
        assert one.push(chunk(13))

    on_asyncio(test)


def test_a_connection_that_ends_is_made_again_with_growing_pauses(caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        came: list[float] = []
        enough = anyio.Event()

        async def take(connection: ServerConnection) -> None:
            came.append(anyio.current_time())
            if len(came) == 4:
                enough.set()
            await connection.recv()  # so that it is never in the middle of saying something: that is another reason
            await connection.close(4002, "no frames")

        async with listening(take) as url, running(Peer("gw_it", url, ME, hello)):
            await enough.wait()
        gaps = [after - before for before, after in itertools.pairwise(came)]
        assert gaps[0] >= peer.FIRST_PAUSE_S * 0.5
        assert gaps[2] >= peer.FIRST_PAUSE_S * 4 * 0.5

    on_asyncio(test)
    told = [record.message for record in caplog.records if "is not reached" in record.message]
    assert len(told) == 1  # the same reason is said once


def test_why_it_is_refused_is_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        refused = anyio.Event()

        async def take(_connection: ServerConnection) -> None:
            raise AssertionError

        def refuse(connection: ServerConnection, _request: object) -> object:
            refused.set()
            return connection.respond(401, "The replicas' secret is another one.\n")

        async with serve(take, "127.0.0.1", 0, process_request=refuse) as server:  # type: ignore[arg-type]
            url = f"ws://127.0.0.1:{next(iter(server.sockets)).getsockname()[1]}"
            async with running(Peer("gw_it", url, ME, hello)):
                await refused.wait()
                await came_true(lambda: "refuses with 401: The replicas' secret" in caplog.text)

    on_asyncio(test)


@pytest.mark.parametrize("url", ["wss://127.0.0.1:9", "ws://127.0.0.1:99999", "http://x", "ws://[::1", "nonsense"])
def test_whatever_a_replica_advertises_it_is_only_not_reached(url: str, caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        async with running(Peer("gw_it", url, ME, hello)):
            await came_true(lambda: caplog.records)

    on_asyncio(test)
    assert "is not reached" in caplog.records[0].message


def test_a_certificate_that_nobody_signed_is_not_believed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pem, key = self_signed(tmp_path)
    theirs = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    theirs.load_cert_chain(pem, key)

    async def test() -> None:
        async def take(_connection: ServerConnection) -> None:
            raise AssertionError

        async with serve(take, "127.0.0.1", 0, ssl=theirs) as server:
            url = f"wss://127.0.0.1:{next(iter(server.sockets)).getsockname()[1]}"
            async with running(Peer("gw_it", url, ME, hello)):
                await came_true(lambda: any("certificate" in record.message for record in caplog.records))

    on_asyncio(test)
