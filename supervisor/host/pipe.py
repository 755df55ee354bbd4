"""Pipes to children: eager non-blocking reads and gathered writes under trio.

`trio.lowlevel.FdStream` always takes a checkpoint before it tries; a pipe that already holds data is read here at
once, which is worth 3-5 µs of a 45 µs echo. Both ends are asked for 1 MiB of buffer: with the default 64 KiB a
1 MiB frame costs 3.5 times as much, in context switches.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import trio

assert sys.platform != "win32" or not TYPE_CHECKING  # containment/windows_pipe.py has the pipes of Windows

import fcntl  # noqa: E402

PIPE_BYTES = 2**20
READ_BYTES = 2**18
_IOV_MAX = 16


def prepare(fd: int) -> None:
    """Make a pipe end of ours non-blocking and large; a refused size is harmless (the per-user cap)."""
    os.set_blocking(fd, False)
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, PIPE_BYTES)


class PipeReader:
    """Reads one pipe.

    Args:
        fd: owned from now on.
        over: whether the writer is known to be dead. A grandchild may hold the pipe open for ever; what the dead
            writer wrote is in the pipe already, so an empty pipe then counts as its end.
    """

    def __init__(self, fd: int, over: Callable[[], bool]) -> None:
        prepare(fd)
        self._fd, self._over = fd, over

    async def read(self, max_bytes: int = READ_BYTES) -> bytes:
        """Return what is there, waiting for at least one byte; b"" at the end.

        Cancellation: nothing is lost; bytes stay in the pipe.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        while self._fd >= 0:
            try:
                data = os.read(self._fd, max_bytes)
            except BlockingIOError:
                if self._over():
                    return b""
                with contextlib.suppress(trio.ClosedResourceError):  # woken: look again
                    await trio.lowlevel.wait_readable(self._fd)
            else:
                await trio.lowlevel.cancel_shielded_checkpoint()
                return data
        return b""

    def wake(self) -> None:
        """Make a waiting read look again, because `over` has changed."""
        if self._fd >= 0:
            trio.lowlevel.notify_closing(self._fd)

    def close(self) -> None:
        """Close the descriptor; a waiting read returns b""."""
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            trio.lowlevel.notify_closing(fd)
            os.close(fd)


class PipeWriter:
    """Writes one pipe; one caller at a time, in the order they came."""

    def __init__(self, fd: int) -> None:
        prepare(fd)
        self._fd = fd
        self._lock = trio.StrictFIFOLock()
        self._cut = False  # a frame was begun and is not finished

    async def write(self, *buffers: bytes | memoryview) -> None:
        """Write all buffers.

        Raises:
            BrokenPipeError: nobody reads any more.
            trio.ClosedResourceError: closed on our side, or a frame before it was cut short.

        Cancellation: a frame that was begun stays half written. Nothing follows it, because it would be read as the
        rest of that frame: the child may finish what it has, and has to be given up.
        """
        async with self._lock:
            if self._cut:
                raise trio.ClosedResourceError("the frame before this one was cut short")
            left = [memoryview(part).cast("B") for part in buffers if len(part)]
            while left:
                if self._fd < 0:
                    raise trio.ClosedResourceError("the pipe is closed")
                try:
                    written = os.writev(self._fd, left[:_IOV_MAX])
                except BlockingIOError:
                    await trio.lowlevel.wait_writable(self._fd)
                else:
                    left = _rest(left, written)
                    self._cut = bool(left)

    def close(self) -> None:
        """Close the descriptor; the child reads the end of its input."""
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            trio.lowlevel.notify_closing(fd)
            os.close(fd)


def _rest(buffers: Sequence[memoryview], written: int) -> list[memoryview]:
    for index, buffer in enumerate(buffers):
        if written < len(buffer):
            return [buffer[written:], *buffers[index + 1 :]]
        written -= len(buffer)
    return []
