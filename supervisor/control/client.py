"""Questions to a running supervisor, with the standard library only: a command must not wait for trio or httpx.

`ask` is one question and its answer in JSON, `fetch` one whose answer is a file, `follow` one whose answer goes on.
"""

from __future__ import annotations

import errno
import http.client
import json
import os
import socket
import struct
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

from supervisor.errors import ExitCode, NoPermission, SupervisorError

PATIENCE_S = 10.0
QUIET_S = 50.0  # a stream says that it lives every 15 s (`KEEP_ALIVE_S` in exchange.py): thrice that is death
API = 1  # what `x-bulkhead-api` has to say; a larger number is a supervisor that we would misunderstand
_AT_ONCE = 64 * 1024
AGAIN_S = 0.05  # between two tries to be heard by a supervisor that many talk to
CROWDED_S = 6.0  # connections that say nothing are closed after 5 s: then there is room again


class NotRunning(SupervisorError):
    """Nobody answers at the control socket."""

    exit_code = ExitCode.NOT_RUNNING


class RequestFailed(SupervisorError):
    """The supervisor answered that it will not, or with something that is no answer."""

    exit_code = ExitCode.FAILED


class _Connection(http.client.HTTPConnection):
    """HTTP over the control socket. `host` is a mere word for the Host header."""

    def __init__(self, path: Path, patience_s: float) -> None:
        super().__init__("supervisor", timeout=patience_s)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        end = time.monotonic() + (self.timeout or 0.0)
        while True:
            try:
                self.sock.connect(str(self._path))
                break
            except BlockingIOError:  # as many wait to be heard as the kernel lets wait
                if time.monotonic() > end:
                    raise
                time.sleep(AGAIN_S)
        _check_server(self.sock, self._path)


def _check_server(sock: socket.socket, path: Path) -> None:
    """Refuse to speak with an impostor: another user may have bound a socket in a folder that many may write."""
    if not hasattr(socket, "SO_PEERCRED"):
        return
    uid = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[1]
    if uid not in (os.geteuid(), 0) and os.geteuid() != 0:
        raise NoPermission(f"The control socket {path} is served by another user (uid {uid}).")


class Event(NamedTuple):
    """One event of a stream.

    Attributes:
        id: what to ask for as `since` to go on after it; "" when it has none.
        data: decoded.
    """

    name: str
    id: str
    data: Any


def ask(path: Path, method: str, route: str, body: object = None, *, patience_s: float = PATIENCE_S) -> Any:
    """Ask, and return the decoded answer.

    Raises:
        NotRunning: nobody answers there.
        NoPermission: the socket is not for this user.
        RequestFailed: it refused, or did not answer within `patience_s`.
    """
    connection = _Connection(path, patience_s)
    try:
        response = _send(connection, method, route, body)
        return json.loads(response.read())
    except OSError as problem:
        raise _unreachable(path, problem, patience_s) from None
    except (http.client.HTTPException, ValueError) as problem:
        raise _no_supervisor(path, problem) from None
    finally:
        connection.close()


def fetch(path: Path, route: str, out: IO[bytes], *, patience_s: float) -> int:
    """Write the answer to `out`; returns its length in bytes. Raises as `ask`, and OSError when `out` takes no more."""
    connection = _Connection(path, patience_s)
    count = 0
    try:
        try:
            response = _send(connection, "GET", route, None)
        except OSError as problem:
            raise _unreachable(path, problem, patience_s) from None
        while True:
            try:
                data = response.read(_AT_ONCE)
            except OSError as problem:
                raise _unreachable(path, problem, patience_s) from None
            if not data:
                break
            out.write(data)
            count += len(data)
        if response.length:  # what `read` makes of an end that came too soon
            raise http.client.IncompleteRead(b"", response.length)
    except http.client.IncompleteRead:
        raise RequestFailed(f"The supervisor at {path} stopped in the middle of its answer; ask again.") from None
    except (http.client.HTTPException, ValueError) as problem:
        raise _no_supervisor(path, problem) from None
    finally:
        connection.close()
    return count


def follow(
    path: Path, route: str, method: str = "GET", body: object = None, *, quiet_s: float = QUIET_S
) -> Iterator[Event]:
    """The events of a stream, until the supervisor ends it or dies.

    Raises:
        SupervisorError: as `ask`, when the stream does not begin. Its end is no error: whoever wants to go on asks
            again for what came after the last id.
    """
    connection = _Connection(path, quiet_s)
    try:
        try:
            response = _send(connection, method, route, body)
        except OSError as problem:
            raise _unreachable(path, problem, quiet_s) from None
        except (http.client.HTTPException, ValueError) as problem:
            raise _no_supervisor(path, problem) from None
        yield from _events(response)
    finally:
        connection.close()


def _events(response: http.client.HTTPResponse) -> Iterator[Event]:
    name, id_, data = "", "", ""
    while True:
        try:
            line = response.readline().decode()
        except (OSError, http.client.HTTPException, ValueError):
            return
        if not line.endswith("\n"):
            return  # the end, or half a line before it
        field, _, value = line.rstrip("\r\n").partition(":")
        value = value.removeprefix(" ")
        if field == "event":
            name = value
        elif field == "id":
            id_ = value
        elif field == "data":
            data += value
        elif not line.strip() and data:
            yield Event(name, id_, json.loads(data))
            name, id_, data = "", "", ""


def _send(connection: _Connection, method: str, route: str, body: object) -> http.client.HTTPResponse:
    """Ask; returns a response that is a success. Raises OSError, HTTPException and ValueError untranslated."""
    data = None if body is None else json.dumps(body).encode()
    end = time.monotonic() + CROWDED_S
    while True:
        connection.request(method, route, data, {"Content-Type": "application/json"} if data else {})
        response = connection.getresponse()
        if response.status != 503 or "retry-after" not in response.headers or time.monotonic() > end:
            break
        connection.close()  # it has too many connections, and read nothing of this question
        time.sleep(AGAIN_S)
    spoken = response.headers.get("x-bulkhead-api", str(API))
    if spoken.isdecimal() and int(spoken) > API:
        theirs = response.headers.get("x-bulkhead-version", "?")
        raise RequestFailed(f"The supervisor is of version {theirs}, newer than this command; use the command of that.")
    if not 200 <= response.status < 300:
        raise _refusal(response.status, json.loads(response.read()))
    return response


def _refusal(status: int, answer: Any) -> SupervisorError:
    said = answer.get("error") if isinstance(answer, dict) else None
    sentence = str(said.get("message", status)) if isinstance(said, dict) else f"The supervisor answered {status}."
    return NoPermission(sentence) if status == 403 else RequestFailed(sentence)


def _no_supervisor(path: Path, problem: Exception) -> RequestFailed:
    return RequestFailed(f"What answers at {path} is no supervisor: {problem}.")


def _unreachable(path: Path, problem: OSError, patience_s: float) -> SupervisorError:
    if problem.errno in (errno.ENOENT, errno.ECONNREFUSED, errno.ENOTDIR, errno.ENOTSOCK):
        return NotRunning(
            f"No supervisor is running with the control socket {path}; start it with `supervisor run`, "
            "or name its configuration with --config."
        )
    if problem.errno in (errno.EACCES, errno.EPERM):
        return NoPermission(f"The control socket {path} is not for this user; use the supervisor's own, or root.")
    if isinstance(problem, TimeoutError):
        return RequestFailed(f"The supervisor at {path} did not answer within {patience_s:g} s.")
    if sys.platform != "win32" and "too long" in str(problem):
        return RequestFailed(f"The path of the control socket is too long: {path}.")
    return RequestFailed(f"The supervisor at {path} cannot be asked: {problem.strerror or problem}.")
