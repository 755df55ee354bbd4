"""uvicorn's HTTP protocol with bounds on what a stranger may make us hold before any key was seen.

httptools collects a request's head without any limit, and uvicorn waits for it without any limit. A body needs no
bound here: it is read only by routes, which check the key first.
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HEAD_BYTES = 64 * 2**10  # plus at most one read of the socket
HEAD_S = 30.0  # from the connection to the end of the first head, and from a later head's first byte to its end


class BoundedHttp(HttpToolsProtocol):
    """Answers 400 to a head beyond `HEAD_BYTES` and hangs up on one that does not end within `HEAD_S`.

    An upgrade to a WebSocket that brings a body is answered 400, too: the parser swallows the body and never says that
    it is an upgrade, so that nobody would answer, nor ever hang up.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._in_head = True
        self._head_bytes = 0
        self._ended = 0
        self._head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the clock."""
        super().connection_made(transport)
        self._head_timer = self.loop.call_later(HEAD_S, transport.close)

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the clock."""
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Count what belongs to a head that has not ended."""
        if self._in_head and self._head_bytes > HEAD_BYTES:
            self._stop_timer()
            self.send_400_response("The request's head is too large.")
            return
        ended = self._ended
        super().data_received(data)
        # A read in which a message ended says nothing of the next head, whose beginning it may hold.
        if self._in_head and self._ended == ended:
            self._head_bytes += len(data)
            if self._head_timer is None:  # uvicorn's own ended with the first byte
                self._head_timer = self.loop.call_later(HEAD_S, self.transport.close)

    def on_headers_complete(self) -> None:
        """The head has ended."""
        self._in_head = False
        self._stop_timer()
        if self.parser.should_upgrade() and self._should_upgrade() and self._announces_body():
            raise ValueError("An upgrade has no body.")  # the parser's error then, which is answered 400
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """The next byte belongs to a new head."""
        super().on_message_complete()
        self._ended += 1
        self._in_head = True
        self._head_bytes = 0

    def _announces_body(self) -> bool:
        return any(
            name == b"transfer-encoding" or (name == b"content-length" and value != b"0")
            for name, value in self.headers
        )

    def _stop_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None
