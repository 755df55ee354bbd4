"""Words to the service manager: systemd's notification socket, where there is one."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Mapping


def sd_notify(state: str, environ: Mapping[str, str] = os.environ) -> None:
    """Send one state ("READY=1", "STOPPING=1"); does nothing outside a service that asks for it.

    One datagram to a local socket: it never waits for anybody, and a service manager that does not listen is
    no reason to stop.
    """
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
