"""`/v1/blobs`: where workers fetch inputs and leave outputs. The signature in the URL is the only right needed."""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing

import anyio
from starlette.convertors import Convertor, register_url_convertor
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from coordinator.blobs.answers import UNKNOWN, blob_response
from coordinator.blobs.base import PREFIX, Blobs, plain_name, upload_scope
from coordinator.blobs.bounds import WIDEST, Bounds, parse
from coordinator.errors import Json, fault_response
from protocol.faults import FaultError, refuse

NAME_CHARS = 150  # of a name that is no good, in a refusal
IDLE_S = 60.0  # twice what a worker waits before it gives a connection up
PLACED = "x-placed-bytes"  # of a PUT without a body: the output lies at its place, and has so many bytes
Admit = Callable[[str, int], Awaitable[bool]]


class _Attempt(Convertor[int]):
    """The number of an attempt. Of Starlette's own whole numbers Python may refuse to read one, for its length."""

    regex = "[0-9]{1,10}"

    def convert(self, value: str) -> int:
        return int(value)

    def to_string(self, value: int) -> str:
        return str(value)


register_url_convertor("attempt", _Attempt())


def blob_routes(blobs: Blobs, admit: Admit | None = None) -> list[Route]:
    """Routes of the blob endpoints.

    Args:
        blobs: where the files are.
        admit: whether outputs of (job, attempt) are still wanted; others are refused as conflict before a byte
            of them is read.
    """

    async def upload(request: Request) -> Response:
        try:
            return await _upload(request, blobs, admit)
        except FaultError as error:
            return fault_response(error.fault)
        except ClientDisconnect:
            return Response(status_code=400)

    async def received(request: Request) -> Response:
        try:
            job, attempt = (request.path_params[part] for part in ("job", "attempt"))
            _bounds(request, blobs)
            count = await blobs.received(job, attempt, request.headers.get("x-content-sha256", ""))
        except FaultError as error:
            return fault_response(error.fault)
        return Response(headers={"upload-offset": str(count), "cache-control": "no-store"})

    async def place(request: Request) -> Response:
        try:
            job, attempt, name, bounds = await _admitted(request, blobs, admit)
            url = await blobs.place(job, attempt, name, request.headers.get("x-content-sha256", ""), bounds)
        except FaultError as error:
            return fault_response(error.fault)
        return Json({"url": url}, headers={"cache-control": "no-store"})

    return [
        Route(PREFIX + "/{job}/{attempt:attempt}/{name}", upload, methods=["PUT"]),
        Route(PREFIX + "/{job}/{attempt:attempt}/{name}/place", place, methods=["GET"]),
        Route(PREFIX + "/{job}/{attempt:attempt}/{name}/received", received, methods=["GET"]),
        download_route(PREFIX + "/{key:path}", blobs),
    ]


def download_route(path: str, blobs: Blobs) -> Route:
    """The route by which files are fetched; `path` has the place `{key:path}`."""

    async def download(request: Request) -> Response:
        try:
            return await _download(request, blobs)
        except FaultError as error:
            return fault_response(error.fault)

    return Route(path, download, methods=["GET"])


def _bounds(request: Request, blobs: Blobs) -> Bounds:
    """What the URL allows, which is judged here. One of a coordinator that did not bound it yet is as good as ever."""
    job, attempt = (request.path_params[part] for part in ("job", "attempt"))
    told = request.query_params.get("max", "")
    blobs.check("PUT", upload_scope(job, attempt, told), *_signature(request))
    return parse(told) if told else WIDEST


async def _admitted(request: Request, blobs: Blobs, admit: Admit | None) -> tuple[str, int, str, Bounds]:
    job, attempt, name = (request.path_params[part] for part in ("job", "attempt", "name"))
    bounds = _bounds(request, blobs)
    if admit is not None and not await admit(job, attempt):
        raise refuse("conflict", "This attempt is over; its outputs are not wanted any more.")
    return job, attempt, name, bounds


async def _upload(request: Request, blobs: Blobs, admit: Admit | None) -> Response:
    job, attempt, name, bounds = await _admitted(request, blobs, admit)
    expected = request.headers.get("x-content-sha256", "")
    placed = request.headers.get(PLACED)
    if placed is not None:
        size = int(placed) if re.fullmatch(r"[0-9]{1,15}", placed) else -1
        stored = await blobs.claim(job, attempt, name, size, expected.lower(), bounds)
        return Json({"key": stored.key, "size": stored.size, "sha256": stored.sha256}, status_code=201)
    declared = request.headers.get("content-length", "0")
    most = bounds.of(name, blobs.max_output_bytes)
    if not declared.isdigit() or int(declared) > most:
        raise refuse("payload_too_large", f"The file {name[:NAME_CHARS]!r} may have at most {most} bytes.", "name")
    at = _offset(request.headers.get("content-range", ""), bool(expected))
    async with aclosing(request.stream()) as body, aclosing(_paced(body)) as data:
        stored = await blobs.put_output(job, attempt, name, data, expected, at, bounds)
    return Json({"key": stored.key, "size": stored.size, "sha256": stored.sha256}, status_code=201)


async def _download(request: Request, blobs: Blobs) -> Response:
    key: str = request.path_params["key"]
    blobs.check("GET", key, *_signature(request))
    return await blob_response(request, blobs, key, UNKNOWN, plain_name(key))


async def _paced(body: AsyncIterator[bytes]) -> AsyncGenerator[bytes, None]:
    """A body, as long as it keeps coming; what came before is kept for the next try. Raises FaultError."""
    while True:
        piece: bytes | None = None
        with anyio.move_on_after(IDLE_S) as patience:
            piece = await anext(body, None)
        if patience.cancelled_caught:
            raise refuse("upload_failed", f"Nothing of the file came for {IDLE_S:g} s; send the rest.")
        if piece is None:
            return
        yield piece


def _offset(header: str, described: bool) -> int:
    """Where the body begins within the file: 0 without a Content-Range."""
    if not header:
        return 0
    found = re.fullmatch(r"bytes ([0-9]{1,18})-([0-9]{1,18})/([0-9]{1,18})", header)
    if found is None or not described or int(found[2]) + 1 != int(found[3]):
        raise refuse("invalid_request", "A rest of a file comes to its end and with its sha256.", "Content-Range")
    return int(found[1])


def _signature(request: Request) -> tuple[str, str]:
    values = request.query_params
    return values.get("exp", ""), values.get("sig", "")
