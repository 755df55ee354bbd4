"""One question to a running supervisor, with the standard library only: a command must not wait for trio or httpx."""

from __future__ import annotations

import errno
import http.client
import json
import os
import socket
import struct
import sys
from pathlib import Path
from typing import Any

from supervisor.errors import ExitCode, NoPermission, SupervisorError

PATIENCE_S = 10.0


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
        self.sock.connect(str(self._path))
        _check_server(self.sock, self._path)


def _check_server(sock: socket.socket, path: Path) -> None:
    """Refuse to speak with an impostor: another user may have bound a socket in a folder that many may write."""
    if not hasattr(socket, "SO_PEERCRED"):
        return
    uid = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[1]
    if uid not in (os.geteuid(), 0) and os.geteuid() != 0:
        raise NoPermission(f"The control socket {path} is served by another user (uid {uid}).")


def ask(path: Path, method: str, route: str, body: object = None, *, patience_s: float = PATIENCE_S) -> Any:
    """Ask, and return the decoded answer.

    Raises:
        NotRunning: nobody answers there.
        NoPermission: the socket is not for this user.
        RequestFailed: it refused, or did not answer within `patience_s`.
    """
    data = None if body is None else json.dumps(body).encode()
    connection = _Connection(path, patience_s)
    try:
        connection.request(method, route, data, {"Content-Type": "application/json"} if data else {})
        response = connection.getresponse()
        status, answer = response.status, json.loads(response.read())
    except OSError as problem:
        raise _unreachable(path, problem, patience_s) from None
    except (http.client.HTTPException, ValueError) as problem:
        raise RequestFailed(f"What answers at {path} is no supervisor: {problem}.") from None
    finally:
        connection.close()
    if status == 200:
        return answer
    sentence = str(answer.get("error", {}).get("message", status)) if isinstance(answer, dict) else str(status)
    if status == 403:
        raise NoPermission(sentence)
    raise RequestFailed(sentence)


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
