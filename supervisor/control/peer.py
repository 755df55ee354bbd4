"""Who is at the other end of the connection that is being answered, for the log line of every order."""

from __future__ import annotations

import contextvars
import socket
import struct

import trio

# Set by whoever listens, in the task of the connection: "uid 1000, pid 4711", "the page".
PEER: contextvars.ContextVar[str] = contextvars.ContextVar("bulkhead_peer", default="somebody")

_LOCAL_PEERPID = 0x002  # macOS, sys/un.h


def peer_named(uid: int, peer: trio.socket.SocketType) -> str:
    """Who has connected, in words; the pid is left out where the kernel does not tell it.

    The pid is that of the moment of the connection. It helps a person who reads the log, and decides nothing.
    """
    try:
        if hasattr(socket, "SO_PEERCRED"):
            pid = int(struct.unpack("3i", peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0])
        else:
            pid = int(struct.unpack("i", peer.getsockopt(0, _LOCAL_PEERPID, 4))[0])
    except (OSError, struct.error):
        pid = 0
    return f"uid {uid}, pid {pid}" if pid > 0 else f"uid {uid}"
