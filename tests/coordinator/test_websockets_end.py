"""The server's end over connections in the worst state: a peer that closes and does not read."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import pytest
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.exceptions import InvalidState

from coordinator.server import Server, Serving, listen, uvicorn_config
from coordinator.websockets_end import EndingWebSockets

WAIT_S = 60.0
MUCH = bytes(16 * 2**20)  # more than two socket buffers hold
UPGRADE = (
    b"GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
)
CLOSE = b"\x88\x82\0\0\0\0\x03\xe8"  # 1000, masked with zeros


class Talker:
    """An application that sends more than its peer reads. `closing` is set when the peer's close has come."""

    def __init__(self) -> None:
        self.accepted, self.closing, self.ended = asyncio.Event(), asyncio.Event(), False

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            for answer in ("startup", "shutdown"):
                await receive()
                await send({"type": f"lifespan.{answer}.complete"})
            self.ended = True
            return
        await receive()
        await send({"type": "websocket.accept"})
        self.accepted.set()
        sending = asyncio.create_task(send({"type": "websocket.send", "bytes": MUCH}))
        while (await receive())["type"] != "websocket.disconnect":
            pass
        self.closing.set()
        await sending


async def end_with_a_peer_that_closes_and_does_not_read(protocol: type[WebSocketsSansIOProtocol]) -> Talker:
    """Serve, let a peer close without reading, and stop. Raises what the server raises."""
    talker = Talker()
    listener = listen("127.0.0.1:0")
    port = listener.getsockname()[1]
    config = uvicorn_config(talker, Serving())
    config.ws = protocol
    server = Server(config)
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    with socket.socket() as raw:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        raw.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(raw, ("127.0.0.1", port))
        await loop.sock_sendall(raw, UPGRADE)
        await talker.accepted.wait()
        await loop.sock_sendall(raw, CLOSE)
        await talker.closing.wait()
        server.should_exit = True
        await serving
    return talker


def test_a_peer_that_closes_and_does_not_read_does_not_break_the_end() -> None:
    async def main() -> Talker:
        async with asyncio.timeout(WAIT_S):
            return await end_with_a_peer_that_closes_and_does_not_read(EndingWebSockets)

    assert asyncio.run(main()).ended


def test_the_guard_is_still_needed() -> None:
    """When this fails, uvicorn has mended it, and `coordinator/websockets_end.py` can go."""

    async def main() -> None:
        async with asyncio.timeout(WAIT_S):
            await end_with_a_peer_that_closes_and_does_not_read(WebSocketsSansIOProtocol)

    with pytest.raises(InvalidState):
        asyncio.run(main())
