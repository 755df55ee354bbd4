"""The body of a result upload. Imported with httpx, which takes its time."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Callable, Mapping

import httpx

from protocol.engine_wire import OutputFile
from supervisor.link.pieces import Held, Pieces

FIELD = "image"  # for every kind
# As browsers write file names in forms; other control characters have no way to be written, and no use.
_QUOTED = {code: f"%{code:02X}" for code in (*range(0x20), ord('"'), 0x7F)}


class Multipart:
    """A form of text fields and one file, whose length is known beforehand.

    httpx would build it, and would read the file on the event loop.
    """

    def __init__(
        self, fields: Mapping[str, str], filename: str, mime: str, file: OutputFile, moved: Callable[[int], None]
    ) -> None:
        self._file, self._moved = file, moved
        boundary = secrets.token_hex(16)
        texts = "".join(
            f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{text}\r\n'
            for name, text in fields.items()
        )
        head = (
            f'{texts}--{boundary}\r\nContent-Disposition: form-data; name="{FIELD}"; '
            f'filename="{filename.translate(_QUOTED)}"\r\n'
            f"Content-Type: {mime}\r\n\r\n"
        )
        self._head, self._tail = head.encode(), f"\r\n--{boundary}--\r\n".encode()
        self.headers = {
            "Content-Type": f"multipart/form-data; boundary={boundary}",
            "Content-Length": str(len(self._head) + file.size + len(self._tail)),
        }

    def over(self, source: int | bytes) -> httpx.AsyncByteStream:
        """The body around this content, or this open file."""
        if isinstance(source, bytes):
            return _Around(self._head, Held(source, self._moved), self._tail)
        return _Around(self._head, Pieces(source, self._file, self._moved), self._tail)


class _Around(httpx.AsyncByteStream):
    """No generator, which nobody would close when the connection breaks."""

    def __init__(self, head: bytes, middle: Pieces | Held, tail: bytes) -> None:
        self._head, self._middle, self._tail = head, middle, tail

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        if head := self._head:
            self._head = b""
            return head
        if self._tail:
            try:
                return await self._middle.__anext__()
            except StopAsyncIteration:
                tail, self._tail = self._tail, b""
                return tail
        raise StopAsyncIteration
