"""The engine's end of the pipe: blocking reads, locked writes."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator

from protocol.engine_wire import Up, encode
from protocol.framing import Frame, FrameDecoder

_READ_BYTES = 2**20
_IOV_MAX = 16


class Wire:
    """Private descriptors of the wire, see boot.take_descriptors.

    `json` says how we write: in kind with the last frame read, so a person at a shell gets lines back.
    """

    def __init__(self, fd_in: int, fd_out: int, *, json: bool = False) -> None:
        self._in, self._out = fd_in, fd_out
        self._lock = threading.Lock()
        self.json = json

    def frames(self) -> Iterator[Frame]:
        """Yield frames until the host closes its end. Raises FramingError."""
        decoder = FrameDecoder()
        while data := os.read(self._in, _READ_BYTES):
            decoder.feed(data)
            yield from decoder

    def encode(self, message: Up) -> list[memoryview]:
        """The buffers of one frame. Raises FramingError when the message exceeds a limit."""
        return [memoryview(part).cast("B") for part in encode(message, self.json)]

    def write(self, buffers: list[memoryview]) -> None:
        """Write one frame whole; safe from any thread. Ends the process when the host is gone."""
        with self._lock:
            try:
                self._write_all(buffers)
            except BrokenPipeError:
                sys.stderr.write("the host closed the pipe\n")
                os._exit(0)

    def _write_all(self, buffers: list[memoryview]) -> None:
        while buffers:
            written = os.writev(self._out, buffers[:_IOV_MAX])
            while buffers and written >= len(buffers[0]):
                written -= len(buffers.pop(0))
            if written:
                buffers[0] = buffers[0][written:]
