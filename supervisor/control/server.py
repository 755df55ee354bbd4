"""The owner's socket: HTTP on a Unix socket that only its owner, and root, may speak with.

Theory of operation. Three walls, each enough by itself: the socket has mode 0600, the kernel tells who has connected
(a request of another user is refused whatever the mode became), and a request that carries Origin or Referer is
refused, because no browser has any business here. Beyond them every client is hostile by accident at most, and still
bounded: one request a connection, of a bounded size, within `PATIENCE_S`, at most `MOST` at once. A client that fails
any of it loses its own connection and nothing else.

One handler answers at a time, without waiting for anything: the snapshot is memory that is there already.
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

import h11
import trio

from supervisor.control.routes import API, Refused, Request, Response, Surface, answer, error
from supervisor.errors import IdentityHeld, NoPermission
from supervisor.version import version

log = logging.getLogger(__name__)

# sockaddr_un holds 108 bytes (104 on macOS), the closing zero included.
MAX_PATH_BYTES = 103 if sys.platform == "darwin" else 107
MOST = 32  # connections at once
PATIENCE_S = 5.0  # for a whole request, and for the client to take the answer
HEARD_S = 0.2  # for one who is refused to get its request off its chest: else it sees a broken pipe, not the reason
MAX_HEAD_BYTES = 16 * 1024
MAX_BODY_BYTES = 64 * 1024
_BACKLOG = 64
_FORBIDDEN = (b"origin", b"referer")


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
            nursery.start_soon(_Server(surface).serve, trio.SocketListener(listener))
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


# ---- the server


class _Server:
    """Answers requests.

    Args:
        uid_of: who a peer is; replaced by tests.
    """

    def __init__(self, surface: Surface, uid_of: Callable[[trio.socket.SocketType], int | None] = peer_uid) -> None:
        self._surface = surface
        self._uid_of = uid_of
        self._open = 0

    async def serve(self, listener: trio.SocketListener) -> None:
        """Accept until cancelled. A process without descriptors left pauses instead of ending."""
        await trio.serve_listeners(self._connected, [listener])

    async def _connected(self, stream: trio.SocketStream) -> None:
        """One connection; whatever happens on it stays there."""
        self._open += 1
        try:
            with trio.move_on_after(2 * PATIENCE_S):
                await self._converse(stream)
        except (trio.BrokenResourceError, trio.ClosedResourceError, h11.LocalProtocolError):
            pass  # it has left
        except Exception:
            log.exception("a request on the control socket failed")
        finally:
            self._open -= 1
            with trio.CancelScope() as now:
                now.cancel()  # close at once: nobody is waited for
                await stream.aclose()

    async def _converse(self, stream: trio.SocketStream) -> None:
        wire = h11.Connection(h11.SERVER, max_incomplete_event_size=MAX_HEAD_BYTES)
        response = self._stranger(stream)
        if response is not None:
            with trio.move_on_after(HEARD_S):
                await stream.receive_some(MAX_HEAD_BYTES)
        else:
            response = error(408, f"The request did not come within {PATIENCE_S:g} s.")
            with trio.move_on_after(PATIENCE_S):
                response = await self._one(stream, wire)
        if response is not None:
            await _send(stream, wire, response)

    def _stranger(self, stream: trio.SocketStream) -> Response | None:
        """A refusal for who has no business here, or comes when too many are here."""
        uid = self._uid_of(stream.socket)
        if uid is None or uid not in (os.geteuid(), 0):
            log.warning("the control socket refused uid %s", uid)
            return error(403, "This socket is for the owner of the supervisor and for root.")
        if self._open > MOST:
            return error(503, f"{MOST} connections are open already.")
        return None

    async def _one(self, stream: trio.SocketStream, wire: h11.Connection) -> Response | None:
        """Read one request and answer it; None when the client left without one."""
        try:
            request = await _read(stream, wire)
        except Refused as refusal:
            return error(refusal.status, str(refusal))
        except h11.RemoteProtocolError as problem:
            return error(problem.error_status_hint, f"This is no HTTP request: {problem}.")
        if request is None:
            return None
        try:
            return answer(request, self._surface)
        except Exception:
            log.exception("%s %s failed", request.method, request.target)
            return error(500, "A mistake of ours; the supervisor's log has it.")


async def _read(stream: trio.SocketStream, wire: h11.Connection) -> Request | None:
    head: h11.Request | None = None
    body = bytearray()
    while True:
        event = wire.next_event()
        if event is h11.NEED_DATA:
            wire.receive_data(await stream.receive_some(16 * 1024))
        elif isinstance(event, h11.Request):
            head = event
            _check(head)
        elif isinstance(event, h11.Data):
            body += event.data
            if len(body) > MAX_BODY_BYTES:
                raise Refused(413, f"The body exceeds {MAX_BODY_BYTES} bytes.")
        elif isinstance(event, h11.EndOfMessage) and head is not None:
            kind = dict(head.headers).get(b"content-type", b"").partition(b";")[0].strip().lower()
            return Request(head.method.decode(), head.target.decode(), bytes(body), kind.decode("latin-1"))
        else:
            return None  # it closed the connection


def _check(head: h11.Request) -> None:
    names = {name for name, _value in head.headers}
    if present := [name.decode() for name in _FORBIDDEN if name in names]:
        raise Refused(403, f"A request with {' and '.join(present)} comes from a browser, and none may speak here.")


async def _send(stream: trio.SocketStream, wire: h11.Connection, response: Response) -> None:
    """Send the answer; a client that does not take it is dropped after `PATIENCE_S`."""
    headers = [
        ("content-type", response.kind),
        ("content-length", str(len(response.body))),
        ("cache-control", "no-store"),
        ("x-content-type-options", "nosniff"),
        ("x-bulkhead-version", version()),
        ("x-bulkhead-api", str(API)),
        ("connection", "close"),
    ]
    with trio.move_on_after(PATIENCE_S):
        if wire.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            data = wire.send(h11.Response(status_code=response.status, headers=headers)) or b""
            data += wire.send(h11.Data(data=response.body)) or b""
            data += wire.send(h11.EndOfMessage()) or b""
        else:  # the request was no HTTP, and h11 has given this connection up
            head = [f"HTTP/1.1 {response.status} Refused", *(f"{name}: {value}" for name, value in headers)]
            data = "\r\n".join([*head, "", ""]).encode() + response.body
        await stream.send_all(data)
        await stream.send_eof()
