"""uvicorn's WebSocket protocol with an end that cannot fail, and with refusals that are no errors.

uvicorn 0.54 sends a close frame to every connection when it stops, also to one whose peer has begun to close and
does not read what is still to be sent. That raises InvalidState out of `Server.shutdown`: the connections after it
get no close frame, and the application's lifespan never ends.

It also calls an upgrade that was refused with a response an error of the application's, unless the peer hangs up first:
strangers would fill the log with them.
"""

from __future__ import annotations

from typing import Any

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

    async def send(self, message: Any) -> None:
        """Send; a response that was sent whole ends the handshake."""
        await super().send(message)
        if message["type"] == "websocket.http.response.body" and not message.get("more_body", False):
            self.handshake_complete = True
