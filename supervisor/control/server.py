"""The owner's socket: HTTP on a Unix socket that only its owner, and root, may speak with.

Theory of operation. Three walls, each enough by itself: the socket has mode 0600, the kernel tells who has connected
(a request of another user is refused whatever the mode became), and a request that carries Origin or Referer is
refused, because no browser has any business here. What comes through them is read and answered by conversation.py.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import socket
import stat
import struct
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import trio

from supervisor.control.conversation import Conversations
from supervisor.control.exchange import Refused, Request, Response, error
from supervisor.control.peer import PEER, peer_named
from supervisor.control.routes import answer
from supervisor.control.surface import Surface
from supervisor.errors import IdentityHeld, NoPermission

log = logging.getLogger(__name__)

# sockaddr_un holds 108 bytes (104 on macOS), the closing zero included.
MAX_PATH_BYTES = 103 if sys.platform == "darwin" else 107
_BACKLOG = 64
_FORBIDDEN = ("origin", "referer")


@contextlib.asynccontextmanager
async def open_control(path: Path, surface: Surface) -> AsyncIterator[None]:
    """Serve `surface` on a socket at `path` for as long as the block lasts; then the socket is removed.

    Raises:
        IdentityHeld: another process answers there.
        NoPermission: the socket cannot be made there.
    """
    listener = make_listener(path)
    made = path.lstat().st_ino  # noqa: ASYNC240 - a socket that was bound a moment ago
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(owners(surface).serve, [trio.SocketListener(listener)])
            yield
            nursery.cancel_scope.cancel()
    finally:
        listener.close()
        _remove(path, made)


# ---- the socket


def _remove(path: Path, made: int) -> None:
    """Remove our socket, and nobody else's."""
    with contextlib.suppress(OSError):
        if path.lstat().st_ino == made:
            path.unlink()


def make_listener(path: Path) -> trio.socket.SocketType:
    """Bind and listen; what a killed supervisor left at `path` is replaced. Raises as `open_control`."""
    _check_place(path)
    _remove_stale(path)
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        made.setblocking(False)
        made.bind(str(path))
        path.chmod(0o600)  # before `listen`: until then nobody can connect
        made.listen(_BACKLOG)
    except OSError as problem:
        made.close()
        raise NoPermission(f"The control socket {path} cannot be made: {problem.strerror}.") from None
    return trio.socket.from_stdlib_socket(made)


def _check_place(path: Path) -> None:
    size = len(os.fsencode(path))
    if size > MAX_PATH_BYTES:
        raise NoPermission(
            f"The path of the control socket has {size} bytes, and a socket's may have {MAX_PATH_BYTES}: {path}; "
            "choose a shorter one with [control] socket."
        )
    try:
        folder = path.parent.stat()
    except OSError as problem:
        raise NoPermission(f"The folder of the control socket {path} cannot be used: {problem.strerror}.") from None
    if folder.st_mode & 0o022 and not folder.st_mode & stat.S_ISVTX:
        raise NoPermission(
            f"Others may write to {path.parent}, and could replace the control socket there; "
            f"run: chmod go-w {path.parent}, or choose another place with [control] socket."
        )


def _remove_stale(path: Path) -> None:
    """Only connecting tells a socket that is served from one that a killed process left behind."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    except OSError as problem:
        raise NoPermission(f"The control socket {path} cannot be looked at: {problem.strerror}.") from None
    if not stat.S_ISSOCK(mode):
        raise NoPermission(f"{path} is in the way of the control socket and is not one; move it away.")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(str(path))
        except OSError as problem:
            if problem.errno != errno.ECONNREFUSED:
                raise NoPermission(f"The control socket {path} is in use: {problem.strerror}.") from None
        else:
            raise IdentityHeld(f"Another process answers at {path}; stop it, or choose another [control] socket.")
    path.unlink(missing_ok=True)


def peer_uid(peer: trio.socket.SocketType) -> int | None:
    """Who has connected, as the kernel knows it; None where it does not tell."""
    try:
        if hasattr(socket, "SO_PEERCRED"):  # Linux: struct ucred {pid, uid, gid}
            data = peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
            return int(struct.unpack("3i", data)[1])
        # macOS and the BSDs: struct xucred {u_int version; uid_t uid; short groups; gid_t groups[16]}
        data = peer.getsockopt(0, 1, 76)  # SOL_LOCAL, LOCAL_PEERCRED
        return int(struct.unpack_from("Ii", data)[1])
    except (OSError, struct.error):
        return None


# ---- who may speak


def owners(
    surface: Surface, uid_of: Callable[[trio.socket.SocketType], int | None] = peer_uid
) -> Conversations[trio.SocketStream]:
    """Conversations with the owner and with root, and nobody else.

    Args:
        uid_of: who a peer is; replaced by tests.
    """

    def stranger(stream: trio.SocketStream) -> Response | None:
        uid = uid_of(stream.socket)
        if uid is None or uid not in (os.geteuid(), 0):
            log.warning("the control socket refused uid %s", uid)
            return error(403, "This socket is for the owner of the supervisor and for root.")
        PEER.set(peer_named(uid, stream.socket))
        return None

    def check(request: Request) -> None:
        if present := [name for name in _FORBIDDEN if name in request.headers]:
            raise Refused(403, f"A request with {' and '.join(present)} comes from a browser, and none may speak here.")

    return Conversations(lambda request: answer(request, surface), stranger=stranger, check=check)
