"""Where the other replicas connect to, on a listener of its own, behind a shared secret.

One route is a WebSocket for frames, one takes the uploads that came to another replica than the worker's session.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import anyio
import uvicorn
from starlette.applications import Starlette
from starlette.requests import HTTPConnection, Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect

from coordinator.errors import EXCEPTION_HANDLERS, fault_response
from coordinator.http_bounds import BoundedHttp
from coordinator.replicas import frames
from coordinator.websockets_end import EndingWebSockets
from protocol.faults import FaultError

log = logging.getLogger(__name__)

CLOSE_PROTOCOL = 4002
PING_S = 5.0
END_S = 5.0


class Host(Protocol):
    """Who is told of what comes in at the door."""

    def came(self, sender: str) -> None:
        """A replica has connected."""

    def take(self, sender: str, told: Sequence[frames.AnyFrame]) -> None:
        """It has sent frames."""

    def left(self, sender: str) -> None:
        """A connection of it has ended."""

    async def take_upload(self, request: Request, worker: str, job: str) -> Response:
        """An upload that it passes on. Raises FaultError; passes nothing on itself."""


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are the coordinator's."""
        yield


def door(name: str, secret: str, host: Host) -> Starlette:
    """The application behind the listener.

    Args:
        name: of this replica.
        secret: that all replicas share.
        host: is told of everything.
    """

    async def endpoint(websocket: WebSocket) -> None:
        status, why = _judge(websocket, name, secret)
        if status:
            log.warning("A connection from %s is refused: %s", websocket.client, why)
            await websocket.send_denial_response(PlainTextResponse(why, status))
            return
        await _read(websocket, host)

    async def upload(request: Request) -> Response:
        status, why = _judge(request, name, secret)
        if status:
            log.warning("An upload from %s is refused: %s", request.client, why)
            return PlainTextResponse(why, status)
        try:
            answer = await host.take_upload(request, request.path_params["worker"], request.path_params["job"])
        except FaultError as error:
            answer = fault_response(error.fault)
        answer.headers[frames.FROM] = name  # what has no such word, the door has said, or somebody on the way
        return answer

    routes = [WebSocketRoute(frames.PATH, endpoint), Route(frames.UPLOADS, upload, methods=["POST"])]
    return Starlette(routes=routes, exception_handlers=EXCEPTION_HANDLERS)


def _judge(came: HTTPConnection, name: str, secret: str) -> tuple[int, str]:
    """(0, "") for a replica that means us, else the status and the sentence that refuse it."""
    kind, _, given = came.headers.get("authorization", "").partition(" ")
    if kind.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), secret.encode()):
        return 401, "The replicas' secret is missing or another one; give all of them the same secret_file."
    sender, meant = came.headers.get(frames.FROM, ""), came.headers.get(frames.TO, "")
    if not sender or len(sender) > 256:
        return 400, f"The header {frames.FROM} is missing."
    if sender == name:
        return 409, "This replica has reached itself; give each replica an `advertise` of its own."
    if meant != name:
        return 421, f"This is the replica {name}, not {meant[:256]}; it was started anew, or `advertise` names another."
    return 0, ""


async def _read(websocket: WebSocket, host: Host) -> None:
    sender = websocket.headers[frames.FROM]
    await websocket.accept()
    host.came(sender)
    try:
        while True:
            message = await websocket.receive()
            if message["type"] == "websocket.disconnect":
                return
            data = message.get("bytes")
            try:
                if data is None:
                    raise frames.FrameError("a text message")
                told = frames.decode(data)
            except frames.FrameError as error:
                log.error("Replica %s sent what is no frames, its connection is closed: %s", sender, error)
                await websocket.close(CLOSE_PROTOCOL, "no frames")
                return
            host.take(sender, told)
    except (WebSocketDisconnect, RuntimeError, OSError):
        return  # it is gone
    finally:
        host.left(sender)


async def serve(app: Starlette, listener: socket.socket, tls: tuple[Path, Path] | None) -> None:
    """Serve the door until cancelled; then the connections are closed, for at most `END_S`."""
    cert, key = tls or (None, None)
    config = uvicorn.Config(
        app,
        http=BoundedHttp,
        ws=EndingWebSockets,
        ws_max_size=frames.MAX_PEER_MESSAGE,
        ws_per_message_deflate=False,
        ws_ping_interval=PING_S,
        ws_ping_timeout=PING_S,
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=1,
        ssl_certfile=cert,
        ssl_keyfile=key,
    )
    server = _Server(config)
    task = asyncio.get_running_loop().create_task(server.serve(sockets=[listener]))
    try:
        await asyncio.shield(task)
    finally:
        server.should_exit = True
        with anyio.move_on_after(END_S, shield=True):
            await task
