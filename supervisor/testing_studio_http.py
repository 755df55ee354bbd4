"""The HTTP of the studio for tests: one port for requests and for the upgrade."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import msgspec
import trio

MAX_HEAD_BYTES = 2**16


class Exchange(msgspec.Struct, kw_only=True):
    """A request. `rest`: what came after its head."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes = b""
    rest: bytes = b""

    @property
    def bearer(self) -> str:
        """Its token."""
        return self.headers.get("authorization", "").removeprefix("Bearer ")


class Redirect(msgspec.Struct, frozen=True):
    """Answers with a way to somewhere else."""

    location: str


class Replayed(trio.abc.Stream):
    """A stream whose beginning was read already."""

    def __init__(self, stream: trio.abc.Stream, first: bytes) -> None:
        self._stream, self._first = stream, first

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """See trio."""
        if first := self._first:
            self._first = b""
            return first
        return bytes(await self._stream.receive_some(max_bytes))

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """See trio."""
        await self._stream.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        """See trio."""
        await self._stream.wait_send_all_might_not_block()

    async def aclose(self) -> None:
        """See trio."""
        await self._stream.aclose()


async def head(stream: trio.abc.Stream) -> tuple[bytes, Exchange] | None:
    """All that came up to the end of a request's head, and the request; None when there is none any more."""
    raw = b""
    while b"\r\n\r\n" not in raw:
        piece = await stream.receive_some(65536)
        if not piece or len(raw) > MAX_HEAD_BYTES:
            return None
        raw += piece
    first, _, rest = raw.partition(b"\r\n\r\n")
    lines = first.decode("latin-1").split("\r\n")
    method, path, _version = lines[0].split(" ", 2)
    pairs = (line.partition(":") for line in lines[1:])
    headers = {name.strip().lower(): value.strip() for name, _, value in pairs}
    return raw, Exchange(method=method, path=path, headers=headers, rest=bytes(rest))


async def answer(stream: trio.abc.Stream, asked: Exchange, exchange: Callable[[Exchange], tuple[int, Any]]) -> bool:
    """Read the body and answer; returns whether the connection goes on. A status of 0 breaks it without an answer."""
    size = int(asked.headers.get("content-length", "0"))
    body = bytearray(asked.rest)
    while len(body) < size:
        piece = await stream.receive_some(2**20)
        if not piece:
            return False
        body += piece
    asked.body = bytes(body[:size])
    status, value = exchange(asked)
    if status == 0:
        return False
    more = ""
    if isinstance(value, Redirect):
        more, value = f"Location: {value.location}\r\n", b""
    if isinstance(value, bytes):
        kind, content = "application/octet-stream", value
    else:
        kind, content = "application/json", msgspec.json.encode(value)
    first = f"HTTP/1.1 {status} x\r\nContent-Type: {kind}\r\nContent-Length: {len(content)}\r\n{more}\r\n"
    await stream.send_all(first.encode() + content)
    return True


def form(content_type: str, body: bytes) -> tuple[dict[str, str], dict[str, tuple[str, str, bytes]]]:
    """The text fields of a form, and its files as (filename, content type, content)."""
    fields: dict[str, str] = {}
    files: dict[str, tuple[str, str, bytes]] = {}
    found = re.search(r'boundary="?([^";]+)', content_type)
    if not found:
        return fields, files
    for part in (b"\r\n" + body).split(b"\r\n--" + found[1].encode())[1:-1]:
        first, _, content = part.removeprefix(b"\r\n").partition(b"\r\n\r\n")
        text = first.decode()
        name = re.search(r'\bname="([^"]*)"', text)
        filename = re.search(r'\bfilename="([^"]*)"', text)
        kind = re.search(r"(?i)content-type:\s*(\S+)", text)
        if name and filename:
            files[name[1]] = (filename[1], kind[1] if kind else "", content)
        elif name:
            fields[name[1]] = content.decode()
    return fields, files
