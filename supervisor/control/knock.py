"""A round trip to our own control socket: whoever can be spoken with is alive."""

from __future__ import annotations

import contextlib
from pathlib import Path

import trio

_REQUEST = b"GET /v1/health HTTP/1.1\r\nHost: bulkhead\r\nConnection: close\r\n\r\n"


async def knock(path: Path) -> None:
    """Ask for health and read the answer to its end. Hangs when nobody answers.

    A socket that somebody removed is no sign of death: then there is nothing to ask, and it returns.
    """
    with contextlib.suppress(OSError, trio.BrokenResourceError):
        async with await trio.open_unix_socket(str(path)) as stream:
            await stream.send_all(_REQUEST)
            while await stream.receive_some():
                pass
