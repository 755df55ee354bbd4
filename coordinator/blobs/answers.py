"""A file of the blobs as an HTTP answer, with one byte range, whatever store it lies in.

It comes from a worker or a client, so no browser may take it for a page of ours: it is never rendered, its type is
never guessed, and scripts in it get a sandbox of nothing. It goes through the coordinator, because a URL of another
store would be answered without these headers.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from contextlib import aclosing
from typing import Any
from urllib.parse import quote

from anyio.to_thread import run_sync
from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from coordinator import deliveries
from coordinator.blobs.base import Blobs
from protocol.faults import refuse

SAFE_HEADERS = {
    "x-content-type-options": "nosniff",
    "content-security-policy": "default-src 'none'; sandbox",
    "cache-control": "private, no-store",
}
PIECE_BYTES = 2**18
UNKNOWN = "application/octet-stream"

_RANGE = re.compile(r"bytes=([0-9]{0,18})-([0-9]{0,18})\Z")


class BlobResponse(StreamingResponse):
    """Made by `blob_response`.

    Attributes:
        sent_whole: called once when the last byte of the whole file was given to the connection.
    """

    sent_whole: Callable[[], None]

    def __init__(self, blobs: Blobs, key: str, first: int, count: int, whole: bool, **more: Any) -> None:
        self._blobs, self._key, self._first, self._count, self._whole = blobs, key, first, count, whole
        self.sent_whole = functools.partial(deliveries.note_blob, key)
        super().__init__(self._pieces(), **more)

    async def _pieces(self) -> Any:
        left = self._count
        async with await self._blobs.open(self._key) as file:
            await file.seek(self._first)
            while left and (piece := await file.read(min(PIECE_BYTES, left))):
                left -= len(piece)
                yield piece

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send; a file that is deleted meanwhile ends the connection, as its length was told."""
        if scope["method"] == "HEAD":
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            await send({"type": "http.response.body", "body": b""})
            return
        sent = 0

        async def counted(message: Any) -> None:
            nonlocal sent
            await send(message)
            if message["type"] == "http.response.body":
                sent += len(message.get("body", b""))

        async with aclosing(self.body_iterator):  # type: ignore[type-var]
            await super().__call__(scope, receive, counted)
        if self._whole and sent == self._count:
            self.sent_whole()


async def blob_response(
    request: Request, blobs: Blobs, key: str, mime: str, filename: str, headers: Mapping[str, str] | None = None
) -> BlobResponse:
    """Send a file, or the one part of it that the client asked for.

    Several ranges in one request are answered with the whole file, which is allowed, and cheaper than what can be
    asked for with a thousand of them.

    Raises:
        FaultError: not_found.
    """
    size = await run_sync(blobs.size, key)
    if size is None:
        raise refuse("not_found", "The file is gone; files are deleted with their job.")
    tag = f'"{key.rsplit("/", 1)[-1][:64]}"'  # the digest of an output; an input's key, which has one content for ever
    told = {
        **SAFE_HEADERS,
        "accept-ranges": "bytes",
        "content-disposition": f"attachment; filename*=utf-8''{quote(filename, safe='')}",
        "etag": tag,
        **(headers or {}),
    }
    wanted = request.headers.get("range", "") if request.headers.get("if-range", tag) == tag else ""
    part = part_of(wanted, size)
    if part is None:
        told |= {"content-range": f"bytes */{size}", "content-length": "0"}
        return BlobResponse(blobs, key, 0, 0, False, status_code=416, headers=told, media_type=mime)
    first, count = part
    told["content-length"] = str(count)
    partial = _asks_for_part(wanted, size)
    if partial:
        told["content-range"] = f"bytes {first}-{first + count - 1}/{size}"
    status = 206 if partial else 200
    return BlobResponse(blobs, key, first, count, count == size, status_code=status, headers=told, media_type=mime)


def part_of(header: str, size: int) -> tuple[int, int] | None:
    """First byte and count that a Range header asks for; the whole where it says nothing; None: there is no such."""
    if not _asks_for_part(header, size):
        return 0, size
    low, _, high = header.removeprefix("bytes=").partition("-")
    if not low:
        count = min(int(high), size)
        return (size - count, count) if count else None
    first, last = int(low), min(int(high), size - 1) if high else size - 1
    return (first, last - first + 1) if first < size else None


def _asks_for_part(header: str, size: int) -> bool:
    found = _RANGE.match(header)
    if found is None or not size or found[1] == found[2] == "":
        return False
    return not (found[1] and found[2] and int(found[2]) < int(found[1]))  # then it is no range, says the standard
