"""The form of a results upload: `relativePath`, then every file of the assignment in the field `files`.

All files go in one request, because each upload deletes what an earlier one brought. Imported with httpx.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import AsyncIterator, Callable, Sequence
from typing import NamedTuple

import httpx

from protocol.engine_wire import OutputFile
from supervisor.link.pieces import Pieces


class Part(NamedTuple):
    """One file. `open` returns a descriptor, which the form closes; `moved` is told of bytes that went out."""

    file: OutputFile
    open: Callable[[], int]
    moved: Callable[[int], None]


class Form(httpx.AsyncByteStream):
    """See the module. One file is open at a time, and is believed only when it is what the engine said.

    Raises:
        FaultError: engine_protocol, from the iteration.
        OSError: a file cannot be read.
    """

    def __init__(self, relative_path: str, parts: Sequence[Part]) -> None:
        self._boundary = secrets.token_hex(16)
        field = 'Content-Disposition: form-data; name="relativePath"'
        self._head = f"--{self._boundary}\r\n{field}\r\n\r\n{relative_path}\r\n".encode()
        self._tail = f"--{self._boundary}--\r\n".encode()
        self._parts = [(self._part_head(part.file), part) for part in parts]
        self._steps = self._walk()

    @property
    def headers(self) -> dict[str, str]:
        """Content type and length."""
        size = len(self._head) + len(self._tail)
        size += sum(len(head) + part.file.size + 2 for head, part in self._parts)
        return {"Content-Type": f"multipart/form-data; boundary={self._boundary}", "Content-Length": str(size)}

    def _part_head(self, file: OutputFile) -> bytes:
        name = file.name.replace('"', "%22").replace("\r", "%0D").replace("\n", "%0A")
        return (
            f'--{self._boundary}\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n'
            f"Content-Type: {file.mime}\r\n\r\n"
        ).encode()

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self._steps

    async def _walk(self) -> AsyncIterator[bytes]:
        yield self._head
        for head, part in self._parts:
            yield head
            fd = part.open()
            try:
                pieces = Pieces(fd, part.file, part.moved)
                async for piece in pieces:
                    yield piece
            finally:
                os.close(fd)
            yield b"\r\n"
        yield self._tail

    async def aclose(self) -> None:
        """Close what is open. Called by httpx, and by whoever made it."""
        await self._steps.aclose()  # type: ignore[attr-defined]
