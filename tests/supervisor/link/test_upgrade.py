"""The way to a WebSocket ends when the connection does. What it refuses, and how, is told in test_session.py."""

from __future__ import annotations

import functools
import socket
import struct

import pytest
import trio
from wsproto import ConnectionType, WSConnection
from wsproto.events import AcceptConnection, BytesMessage, CloseConnection, Request

from protocol import link_wire as wire
from protocol.revision import LINK_SUBPROTOCOL
from supervisor.link.session import Address, Why, converse
from tests.supervisor.link.test_session import FakeSide

PING = b"\x89\x00"


@pytest.mark.parametrize("how", ["at once", "after the request", "in the answer", "with a reset"])
async def test_a_connection_that_closes_during_the_upgrade_is_over_at_once(how):
    """Not after `connect_s`: what a coordinator gives up of a worker that is away is decided in seconds."""

    async def serve(stream: trio.SocketStream) -> None:
        if how != "at once":
            await stream.receive_some(2**16)
        if how == "in the answer":
            await stream.send_all(b"HTTP/1.1 101 Switching Prot")
        if how == "with a reset":
            stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        stream.socket.close()

    async with trio.open_nursery() as nursery:
        (listener,) = await nursery.start(functools.partial(trio.serve_tcp, serve, 0, host="127.0.0.1"))
        with trio.fail_after(60):
            url = f"ws://127.0.0.1:{listener.socket.getsockname()[1]}"
            end = await converse(Address(url=url, token="t", connect_s=60), FakeSide())
        assert (end.why, "closed the connection during the upgrade" in end.sentence) == (Why.LOST, True), end
        nursery.cancel_scope.cancel()


async def test_a_ping_that_crosses_our_close_does_not_hide_why():
    """A coordinator's server pings by itself; what comes after our close frame cannot be answered any more."""

    async def serve(stream: trio.SocketStream) -> None:
        peer = WSConnection(ConnectionType.SERVER)
        async for data in stream:
            peer.receive_data(data)
            for event in peer.events():
                match event:
                    case Request():
                        await stream.send_all(peer.send(AcceptConnection(subprotocol=LINK_SUBPROTOCOL)))
                    case BytesMessage():
                        for body in (
                            wire.Welcome(session="s", revision=1),
                            wire.Error(code="auth_failed", message="no"),
                        ):
                            await stream.send_all(peer.send(BytesMessage(data=wire.encode(body))))
                    case CloseConnection():
                        await stream.send_all(PING + peer.send(event.response()))
                        return

    async with trio.open_nursery() as nursery:
        (listener,) = await nursery.start(functools.partial(trio.serve_tcp, serve, 0, host="127.0.0.1"))
        with trio.fail_after(60):
            url = f"ws://127.0.0.1:{listener.socket.getsockname()[1]}"
            end = await converse(Address(url=url, token="t", connect_s=60), FakeSide())
        assert end.why is Why.REFUSED, end
        nursery.cancel_scope.cancel()
