"""The content of an output on its way out. Imported with httpx, which takes its time."""

from __future__ import annotations

import hashlib
import os
from collections.abc import AsyncIterator, Callable

import httpx
import trio

from protocol.engine_wire import OutputFile
from protocol.faults import refuse

PIECE_BYTES = 2**20


class Pieces(httpx.AsyncByteStream):
    """The content of an open file of an engine, read in threads and believed only when it is what the engine said.

    The engine may still write to it: what is sent is what is hashed, and the last piece is held back until the hash
    is right, so that no coordinator ever holds a whole file that is another one.

    A stream of httpx's own kind, because it would wrap any other in a generator, and nobody closes that when the
    connection breaks.

    Args:
        skip: bytes that the other side has: hashed, not sent.

    Raises:
        FaultError: engine_protocol, from the iteration.
    """

    def __init__(self, fd: int, file: OutputFile, moved: Callable[[int], None], skip: int = 0) -> None:
        self._fd, self._file, self._moved, self._skip = fd, file, moved, skip
        self._digest = hashlib.sha256()
        self._at = 0

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        piece = await self._next()
        while self._at <= self._skip:  # the whole is hashed, and only the rest is sent
            piece = await self._next()
        piece = piece[-(self._at - self._skip) :]
        self._moved(len(piece))
        return piece

    async def _next(self) -> bytes:
        name, size = self._file.name, self._file.size
        if self._at == size:
            if size == 0 and self._digest.hexdigest() != self._file.sha256.lower():
                raise refuse("engine_protocol", f"The sha256 of the output {name!r} is not the one that was told.")
            raise StopAsyncIteration
        wanted = min(PIECE_BYTES, size - self._at)
        piece = await trio.to_thread.run_sync(os.pread, self._fd, wanted, self._at)
        if not piece:
            raise refuse("engine_protocol", f"The output {name!r} shrank to {self._at} of {size} bytes.")
        self._at += len(piece)
        self._digest.update(piece)
        if self._at == size:
            if (now := os.fstat(self._fd).st_size) != size:
                raise refuse("engine_protocol", f"The output {name!r} grew to {now} bytes while it was read.")
            if self._digest.hexdigest() != self._file.sha256.lower():
                raise refuse("engine_protocol", f"The sha256 of the output {name!r} is not the one that was told.")
        return piece


class Held(httpx.AsyncByteStream):
    """Content that is in memory, from `at` on; a stream for the same reason."""

    def __init__(self, content: bytes, moved: Callable[[int], None], at: int = 0) -> None:
        self._content, self._moved, self._at = content, moved, at

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        piece = self._content[self._at : self._at + PIECE_BYTES]
        if not piece:
            raise StopAsyncIteration
        self._at += len(piece)
        self._moved(len(piece))
        return piece
