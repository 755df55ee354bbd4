"""Words to the service manager: systemd's notification protocol, where there is one that listens.

Every message is one datagram to the socket named by $NOTIFY_SOCKET; it never waits for anybody, and a service
manager that does not listen is no reason to stop. Outside a service all of it does nothing.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence

import trio

# A drain asks for this much more time, this often: long enough that one late tick costs nothing, short enough
# that a supervisor which hangs after its drain is not left alone for long.
EXTENSION_S = 30.0
EXTEND_EVERY_S = 10.0
# What people read in one line of `systemctl status`.
MAX_STATUS_CHARS = 300


def sd_notify(state: str, environ: Mapping[str, str] = os.environ) -> None:
    """Send one state ("READY=1", "STOPPING=1"); does nothing outside a service that asks for it."""
    address = environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    with (
        contextlib.suppress(OSError),
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK) as out,
    ):
        out.sendto(state.encode(), address)


def watchdog_s(environ: Mapping[str, str] = os.environ) -> float | None:
    """After how many seconds without a sign of life the service manager aborts us; None when it does not watch.

    WATCHDOG_PID names the process that is meant: a child inherits the variables, and must not answer for us.
    """
    pid = environ.get("WATCHDOG_PID", "")
    if pid and pid != str(os.getpid()):
        return None
    with contextlib.suppress(ValueError):
        seconds = int(environ.get("WATCHDOG_USEC", "")) / 1e6
        return seconds if seconds > 0 else None
    return None


class Service:
    """What the supervisor tells its service manager.

    Args:
        environ: where $NOTIFY_SOCKET is looked up.
        notify: sends one state; for tests.
    """

    def __init__(self, environ: Mapping[str, str] = os.environ, *, notify: Callable[[str], None] | None = None) -> None:
        self._send = notify if notify is not None else lambda state: sd_notify(state, environ)
        self.watchdog_s = watchdog_s(environ)
        self._status = ""

    def ready(self) -> None:
        """We serve; also the end of a `reloading`."""
        self._send("READY=1")

    def reloading(self) -> None:
        """We read our configuration again; `ready` says when that is over."""
        self._send(f"RELOADING=1\nMONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}")

    def stopping(self) -> None:
        """We are about to end."""
        self._send("STOPPING=1")

    def alive(self) -> None:
        """Feed the watchdog. Only `Liveness` may say this: it knows."""
        self._send("WATCHDOG=1")

    def status(self, sentence: str) -> None:
        """Show one sentence in `systemctl status`; the same one again is not sent."""
        # A line break would begin a message of its own, and names in the sentence are not ours.
        plain = "".join(char if char.isprintable() else " " for char in sentence)[:MAX_STATUS_CHARS]
        if plain != self._status:
            self._status = plain
            self._send(f"STATUS={plain}")

    def extend(self, seconds: float) -> None:
        """Ask for that much time from now on, whatever TimeoutStartSec or TimeoutStopSec say."""
        self._send(f"EXTEND_TIMEOUT_USEC={int(seconds * 1e6)}")

    async def keep_extending(self) -> None:
        """Ask for more time until cancelled: run beside a drain, which is bounded by `limits.drain_s`.

        TimeoutStopSec was derived from `limits.drain_s` when the unit was written; this keeps a longer drain of
        today's worker.toml from being cut off.
        """
        while True:
            self.extend(EXTENSION_S)
            await trio.sleep(EXTEND_EVERY_S)


def status_sentence(*, models: int, ready: int, jobs: int, holds: Sequence[str] = (), stopping: str = "") -> str:
    """What a supervisor does, as one sentence for `systemctl status`.

    Args:
        models: how many are configured.
        ready: how many of them can be offered.
        jobs: how many run.
        holds: why no work is taken, one phrase each.
        stopping: why it drains; "" when it does not.
    """
    words = f"{ready} of {models} {'model' if models == 1 else 'models'} ready, "
    words += "no job runs" if jobs == 0 else "1 job runs" if jobs == 1 else f"{jobs} jobs run"
    if stopping:
        return f"Draining ({stopping}): {words}"
    return f"{words}; on hold: {', '.join(holds)}" if holds else words
