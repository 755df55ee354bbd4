"""A studio worker's upload that a load balancer has given to another replica than the worker's session.

It goes on to the replica of the session as it comes, by an HTTP request to that one's door, and the answer comes back:
at most a network read of it is in memory here. Who takes it at the door judges it by its own sessions alone and passes
nothing on, so that no upload can go in circles. Imported with httpx, which takes its time.
"""

from __future__ import annotations

import logging
import ssl
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import TYPE_CHECKING
from urllib.parse import quote

import anyio
import httpx
from starlette.responses import Response

from coordinator.bodies import check_length
from coordinator.elsewhere import Upload, not_reached
from coordinator.errors import fault_response
from coordinator.replicas import frames
from coordinator.replicas import peer as way
from protocol.faults import Fault, refuse

if TYPE_CHECKING:
    from starlette.requests import Request

    from coordinator.replicas.peer import Caller, Peer

log = logging.getLogger(__name__)

# A worker gives its upload up after 60 s; a replica that is gone is found out within seconds, see `Peer.while_there`.
ANSWER_S = 60.0
_PASSED_BACK = ("content-type", "retry-after", "x-should-retry")


class _Stalled(Exception):
    """Nothing of the upload has come for too long."""


class _NoAnswer(Exception):
    """What came back is not the answer of the replica that is meant."""


class _Coming(httpx.AsyncByteStream):
    """A body as it comes. httpx would wrap any other stream in a generator, and nobody closes that when it breaks off.

    Raises:
        FaultError: payload_too_large, from the iteration.
    """

    def __init__(self, pieces: AsyncIterator[bytes], most: int, idle_s: float) -> None:
        self._pieces, self._most, self._left, self._idle_s = pieces, most, most, idle_s

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        piece: bytes | None = b""
        while not piece:
            with anyio.move_on_after(self._idle_s) as patience:
                piece = await anext(self._pieces, None)
            if patience.cancelled_caught:
                raise _Stalled
            if piece is None:
                raise StopAsyncIteration
        self._left -= len(piece)
        if self._left < 0:
            raise refuse("payload_too_large", f"The form exceeds {self._most} bytes.")
        return piece


class Uploads:
    """Passes uploads on. Everything is called on the event loop.

    Args:
        caller: who we are to the others.
    """

    def __init__(self, caller: Caller) -> None:
        self._caller = caller
        self._tls: ssl.SSLContext | None = caller.tls

    async def pass_on(self, peer: Peer, upload: Upload) -> Response:
        """Give the upload to a replica, and return what that one answers.

        Raises:
            FaultError: overloaded, when it does not answer, or goes away; payload_too_large.
            ClientDisconnect: the worker left while sending.

        Cancellation: the other replica takes it for an upload that broke off.
        """
        check_length(upload.request, upload.most)
        answer: Response | None = None
        why = "it is gone"
        with anyio.CancelScope() as going, peer.while_there(going.cancel):
            try:
                answer = await self._exchange(peer, upload)
            except _Stalled:
                answer = fault_response(Fault("invalid_request", "The upload stalled."), 408)
            except (_NoAnswer, httpx.HTTPError, httpx.InvalidURL, OSError) as error:
                # What another replica advertises, and how that goes wrong, may be anything.
                why = str(error) or type(error).__name__
        if answer is None:
            log.warning("An upload for replica %s at %s was not passed on: %s", peer.name, peer.url, why)
            raise not_reached()
        return answer

    async def _exchange(self, peer: Peer, upload: Upload) -> Response:
        """The replica's answer. Raises _NoAnswer, also for what an older one says, which takes no uploads."""
        timeout = httpx.Timeout(ANSWER_S, connect=way.OPEN_S)
        async with (
            httpx.AsyncClient(verify=self._trust(peer), trust_env=False, timeout=timeout) as client,
            aclosing(upload.request.stream()) as pieces,
        ):
            request = client.build_request("POST", _where(peer, upload), headers=self._headers(peer, upload.request))
            request.stream = _Coming(pieces, upload.most, upload.idle_s)
            answer = await client.send(request)
        if answer.headers.get(frames.FROM) != peer.name:
            raise _NoAnswer(f"it says {answer.status_code}: {answer.text[:300]}")
        headers = {name: answer.headers[name] for name in _PASSED_BACK if name in answer.headers}
        return Response(answer.content, answer.status_code, headers)

    def _headers(self, peer: Peer, request: Request) -> list[tuple[bytes, bytes]]:
        """What proves us, and how the body is framed."""
        told = {name: value for name, value in request.headers.raw if name in (b"content-type", b"content-length")}
        if b"content-length" not in told:
            told[b"transfer-encoding"] = b"chunked"
        ours = {
            "authorization": f"Bearer {self._caller.secret}",
            frames.FROM: self._caller.name,
            frames.TO: peer.name,
        }
        return [*((name.encode(), value.encode()) for name, value in ours.items()), *told.items()]

    def _trust(self, peer: Peer) -> ssl.SSLContext | bool:
        if not peer.url.startswith("wss:"):
            return False  # nothing to judge
        if self._tls is None:
            self._tls = ssl.create_default_context()  # the system's authorities, not those that httpx brings
        return self._tls


def _where(peer: Peer, upload: Upload) -> str:
    path = frames.UPLOADS.format(worker=quote(upload.worker, safe=""), job=quote(upload.job, safe=""))
    return peer.url.replace("ws", "http", 1) + path
