"""A client of the streams: real HTTP over the owner's socket, event by event."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

import h11
import trio

BOUND_S = 60.0


class Told(NamedTuple):
    """One event as it came."""

    name: str
    data: Any
    id: str

    @property
    def number(self) -> int:
        return int(self.id.rpartition("-")[2])


class Reader:
    """One open stream."""

    def __init__(self, stream: trio.SocketStream, wire: h11.Connection, size: int) -> None:
        self._stream, self._wire, self._size = stream, wire, size
        self._text = b""
        self.status = 0
        self.headers: dict[str, str] = {}

    async def event(self) -> h11.Event:
        while (event := self._wire.next_event()) is h11.NEED_DATA:
            self._wire.receive_data(await self._stream.receive_some(self._size))
        if isinstance(event, h11.Response):
            self.status = event.status_code
            self.headers = {name.decode(): value.decode() for name, value in event.headers}
        return event

    async def next(self) -> Told:
        """The next event; EOFError when there are no more. Comments are skipped."""
        with trio.fail_after(BOUND_S):
            while True:
                while b"\n\n" not in self._text:
                    event = await self.event()
                    if isinstance(event, h11.EndOfMessage | h11.ConnectionClosed):
                        raise EOFError
                    if isinstance(event, h11.Data):
                        self._text += bytes(event.data)
                part, _, self._text = self._text.partition(b"\n\n")
                fields = dict(line.split(": ", 1) for line in part.decode().split("\n") if not line.startswith(":"))
                if fields:
                    return Told(fields["event"], json.loads(fields["data"]), fields["id"])

    async def until(self, name: str) -> Told:
        """The next event of this name."""
        while (told := await self.next()).name != name:
            pass
        return told


@asynccontextmanager
async def reading(
    path: Path, target: str, headers: Mapping[str, str] | None = None, *, size: int = 65_536
) -> AsyncIterator[Reader]:
    """Open a stream and hang up at the end of the block. With a small `size` it reads in small sips."""
    wire = h11.Connection(h11.CLIENT)
    async with await trio.open_unix_socket(str(path)) as stream:
        request = h11.Request(method="GET", target=target, headers=[("Host", "x"), *(headers or {}).items()])
        await stream.send_all((wire.send(request) or b"") + (wire.send(h11.EndOfMessage()) or b""))
        reader = Reader(stream, wire, size)
        with trio.fail_after(BOUND_S):
            while not reader.status:
                await reader.event()
        yield reader


async def asked(
    path: Path, method: str, target: str, body: object = None, headers: Mapping[str, str] | None = None
) -> tuple[int, dict[str, str], Any]:
    """One question: status, headers, decoded body."""
    wire = h11.Connection(h11.CLIENT)
    data = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    kind = {"Content-Type": "application/json", "Content-Length": str(len(data))} if data else {}
    lines = [("Host", "x"), *kind.items(), *(headers or {}).items()]
    async with await trio.open_unix_socket(str(path)) as stream:
        request = h11.Request(method=method, target=target, headers=lines)
        parts = [wire.send(request), wire.send(h11.Data(data=data)) if data else b"", wire.send(h11.EndOfMessage())]
        await stream.send_all(b"".join(part or b"" for part in parts))
        reader, got = Reader(stream, wire, 65_536), b""
        with trio.fail_after(BOUND_S):
            while not isinstance(event := await reader.event(), h11.EndOfMessage | h11.ConnectionClosed):
                got += bytes(event.data) if isinstance(event, h11.Data) else b""
    return reader.status, reader.headers, json.loads(got)
