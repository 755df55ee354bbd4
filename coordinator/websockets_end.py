"""uvicorn's WebSocket protocol with an end that cannot fail.

uvicorn 0.54 sends a close frame to every connection when it stops, also to one whose peer has begun to close and
does not read what is still to be sent. That raises InvalidState out of `Server.shutdown`: the connections after it
get no close frame, and the application's lifespan never ends.
"""

from __future__ import annotations

from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.exceptions import InvalidState


class EndingWebSockets(WebSocketsSansIOProtocol):
    """Ends whatever state the connection is in."""

    def shutdown(self) -> None:
        """Say 1012 where that may still be said, and close."""
        try:
            super().shutdown()
        except InvalidState:
            self.transport.close()
