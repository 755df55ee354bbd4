"""From an address to a WebSocket: TCP, TLS, and the upgrade that ends when the connection does."""

from __future__ import annotations

import logging
import ssl
import urllib.parse
from collections.abc import Awaitable, Callable, Sequence
from typing import cast

import trio
from trio_websocket import WebSocketConnection, wrap_client_stream
from wsproto.utilities import LocalProtocolError

from protocol.link_wire import MAX_MESSAGE_BYTES

log = logging.getLogger(__name__)

INBOX_MESSAGES = 64
Stream = trio.SocketStream | trio.SSLStream[trio.SocketStream]


async def open_stream(parts: urllib.parse.SplitResult, tls: ssl.SSLContext | None) -> Stream:
    """TCP, and TLS with its handshake done, so that a bad certificate is told as what it is.

    Raises:
        OSError, trio.BrokenResourceError, ExceptionGroup of them: nobody is there, or speaks TLS that we trust.
    """
    host = parts.hostname or ""
    secure = parts.scheme == "wss"
    plain = await trio.open_tcp_stream(host, parts.port or (443 if secure else 80))
    if not secure:
        return plain
    stream = trio.SSLStream(plain, tls or ssl.create_default_context(), server_hostname=host, https_compatible=True)
    try:
        await stream.do_handshake()
    except BaseException:
        await trio.aclose_forcefully(plain)
        raise
    return stream


async def upgrade(
    nursery: trio.Nursery,
    stream: Stream,
    parts: urllib.parse.SplitResult,
    subprotocol: str,
    headers: Sequence[tuple[bytes, bytes]],
    *,
    max_message_bytes: int = MAX_MESSAGE_BYTES,
    inbox: int = INBOX_MESSAGES,
) -> WebSocketConnection | None:
    """Ask for the WebSocket of an address; None when the connection was closed before there was one.

    Args:
        nursery: where it is read, for as long as it lasts; a refusal (`ConnectionRejected`) is raised there.
        stream: a connection to where `parts` says.
        max_message_bytes: a larger message ends the connection with 1009.
        inbox: messages that may wait to be taken.
    """
    socket: WebSocketConnection | None = None
    over = trio.Event()
    async with trio.open_nursery() as race:
        race.start_soon(_end_after, over, race.cancel_scope)
        socket = await wrap_client_stream(
            cast("trio.Nursery", _Reading(nursery, over)),
            stream,
            parts.netloc.rpartition("@")[2],
            parts.path + (f"?{parts.query}" if parts.query else ""),
            subprotocols=[subprotocol],
            extra_headers=list(headers),
            max_message_size=max_message_bytes,
            message_queue_size=inbox,
            receive_buffer_size=2**16,
        )
        race.cancel_scope.cancel()
    return socket


class _Reading:
    """Stands in for the nursery of a WebSocket: sets `over` when its reader has ended.

    The library waits for the answer to its upgrade even when the connection is closed meanwhile.
    """

    def __init__(self, nursery: trio.Nursery, over: trio.Event) -> None:
        self._nursery, self._over = nursery, over

    def start_soon(self, read: Callable[[], Awaitable[None]]) -> None:
        """See `trio.Nursery.start_soon`."""

        async def run() -> None:
            try:
                await read()  # a refused upgrade is raised, and says more than that it is over
            except LocalProtocolError:  # a ping after our close frame: the library cannot answer it any more
                log.debug("something came after the close of a WebSocket")
            self._over.set()

        self._nursery.start_soon(run)


async def _end_after(over: trio.Event, scope: trio.CancelScope) -> None:
    await over.wait()
    scope.cancel()
