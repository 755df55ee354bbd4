"""Pipes to children on Windows: named pipes with overlapped I/O, waited for by trio's completion port.

They do what pipe.py does elsewhere. There is no writev, so small parts of a frame are joined before they are written.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence

import trio

from supervisor.host.containment.windows_api import Kernel32

PIPE_BYTES = 2**20
READ_BYTES = 2**18
# Copying this much costs less than one more system call.
_JOINED_BYTES = 2**16
# One write of any size is legal, but locks all its pages in memory.
_WRITE_BYTES = 2**20


class OverlappedReader:
    """Reads one pipe; see `PipeReader`. Owns the handle from now on."""

    def __init__(self, kernel: Kernel32, handle: int, over: Callable[[], bool]) -> None:
        if sys.platform == "win32":
            trio.lowlevel.register_with_iocp(handle)
        self._kernel, self._handle, self._over = kernel, handle, over
        self._buffer = bytearray(READ_BYTES)
        self._waiting: trio.CancelScope | None = None

    async def read(self, max_bytes: int = READ_BYTES) -> bytes:
        """Return what is there, waiting for at least one byte; b"" at the end.

        Cancellation: nothing is lost; an operation that has completed is not cancelled any more.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        while self._handle >= 0:
            if self._over() and not self._kernel.bytes_waiting(self._handle):
                return b""
            with trio.CancelScope() as self._waiting, memoryview(self._buffer)[:max_bytes] as view:
                try:
                    size = await _read_into(self._handle, view)
                except (BrokenPipeError, trio.ClosedResourceError):  # the other end, or ours
                    await trio.lowlevel.cancel_shielded_checkpoint()
                    return b""
                return bytes(view[:size])
            # woken: look again
        return b""

    def wake(self) -> None:
        """Make a waiting read look again, because `over` has changed."""
        if self._waiting is not None:
            self._waiting.cancel()

    def close(self) -> None:
        """Close the handle; a waiting read returns b"". It is cancelled first: CancelIoEx wants a valid handle."""
        if self._handle >= 0:
            handle, self._handle = self._handle, -1
            self.wake()
            self._kernel.close(handle)


class OverlappedWriter:
    """Writes one pipe; see `PipeWriter`. Owns the handle from now on."""

    def __init__(self, kernel: Kernel32, handle: int) -> None:
        if sys.platform == "win32":
            trio.lowlevel.register_with_iocp(handle)
        self._kernel, self._handle = kernel, handle
        self._lock = trio.StrictFIFOLock()
        self._cut = False  # a frame was begun and is not finished

    async def write(self, *buffers: bytes | memoryview) -> None:
        """Write all buffers.

        Raises:
            BrokenPipeError: nobody reads any more.
            trio.ClosedResourceError: closed on our side, or a frame before it was cut short.

        Cancellation: as `PipeWriter.write`; how much of a cancelled operation was written cannot be known.
        """
        async with self._lock:
            if self._cut:
                raise trio.ClosedResourceError("the frame before this one was cut short")
            self._cut = True
            for part in gathered(buffers):
                left = memoryview(part).cast("B")
                while left:
                    if self._handle < 0:
                        raise trio.ClosedResourceError("the pipe is closed")
                    left = left[await _write_from(self._handle, left[:_WRITE_BYTES]) :]
            self._cut = False

    def close(self) -> None:
        """Close the handle; the child reads the end of its input."""
        if self._handle >= 0:
            handle, self._handle = self._handle, -1
            self._kernel.close(handle)


def gathered(buffers: Sequence[bytes | memoryview]) -> Iterator[bytes | memoryview]:
    """The same bytes in fewer parts: neighbours are joined while together they stay small. Empty ones are dropped."""
    small: list[bytes | memoryview] = []
    size = 0
    for part in buffers:
        length = memoryview(part).nbytes
        if small and size + length > _JOINED_BYTES:
            yield b"".join(small)
            small, size = [], 0
        if length > _JOINED_BYTES:
            yield part
        elif length:
            small.append(part)
            size += length
    if small:
        yield b"".join(small)


async def _read_into(handle: int, view: memoryview) -> int:
    if sys.platform == "win32":
        return await trio.lowlevel.readinto_overlapped(handle, view)
    else:
        raise OSError("overlapped reads are a thing of Windows")


async def _write_from(handle: int, view: memoryview) -> int:
    if sys.platform == "win32":
        return await trio.lowlevel.write_overlapped(handle, view)
    else:
        raise OSError("overlapped writes are a thing of Windows")
