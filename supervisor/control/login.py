"""Who may use the page: one-time codes from the owner's socket, and the sessions that a browser swaps them for.

Theory of operation. Whoever may speak on the owner's socket asks there for a code (`POST /v1/login-code`), and the
browser is opened at the page with the code behind the `#`, which browsers send to nobody. The page swaps it for a
token, once and within `CODE_S`, and shows the token with every request. Codes and tokens are 256 random bits, live in
memory only, and are compared in constant time, all of them each time. A program on a system without Unix sockets
takes its token from a file that only its owner may read (`token_file`).
"""

from __future__ import annotations

import contextlib
import hmac
import secrets
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from supervisor.control.exchange import Handler, Refused, Request, Response, body, reply
from supervisor.state import write_atomically

CODE_S = 60.0
MOST_CODES = 8  # handed out and not yet used; one more makes the oldest worthless
SESSION_IDLE_S = 12 * 3600.0
MOST_SESSIONS = 25  # one more ends the one that was idle longest
OFF = "The page is off; set enabled = true in [page] of worker.toml, and start the supervisor again."


def _always() -> float:
    """Seconds that go on while the machine sleeps, where the system has such a clock: a code must not outlive a nap."""
    clock = getattr(time, "CLOCK_BOOTTIME", None)
    return time.monotonic() if clock is None else time.clock_gettime(clock)


class Logins:
    """See the module.

    Args:
        clock: seconds; replaced by tests.

    Attributes:
        url: where the page is, "http://127.0.0.1:4711"; "" while it is not served.
        reason: why it is not served.
    """

    def __init__(self, clock: Callable[[], float] = _always) -> None:
        self.url, self.reason = "", OFF
        self._clock = clock
        self._codes: dict[bytes, float] = {}  # -> until when
        self._sessions: dict[bytes, float] = {}  # -> until when, unless it is used before
        self._programs: set[bytes] = set()  # never expire

    def new_code(self) -> str:
        """A code for one session, good for `CODE_S`."""
        self._forget()
        code = secrets.token_urlsafe(32)
        self._codes[code.encode()] = self._clock() + CODE_S
        _shorten(self._codes, MOST_CODES)
        return code

    def swap(self, code: str) -> str | None:
        """The token of a new session; None when the code is wrong, used or too old."""
        self._forget()
        found = _equal(self._codes, code)
        if found is None:
            return None
        del self._codes[found]
        token = secrets.token_urlsafe(32)
        self._sessions[token.encode()] = self._clock() + SESSION_IDLE_S
        _shorten(self._sessions, MOST_SESSIONS)
        return token

    def admits(self, token: str) -> bool:
        """Whether this is the token of a session or of a program; a session is idle from now on."""
        self._forget()
        if (found := _equal(self._sessions, token)) is not None:
            self._sessions[found] = self._clock() + SESSION_IDLE_S
        return found is not None or _equal(self._programs, token) is not None

    def end(self, token: str) -> None:
        """End a session."""
        if (found := _equal(self._sessions, token)) is not None:
            del self._sessions[found]

    @contextlib.contextmanager
    def token_file(self, path: Path) -> Iterator[None]:
        """Let programs in that can read `path` for as long as the block lasts: {"url", "token"}, mode 0600.

        For systems whose Python has no Unix sockets, where the page's port is the owner's only way in; the folder's
        own permissions are what keeps others out there.

        Raises:
            OSError: the file cannot be written.
        """
        token = secrets.token_urlsafe(32)
        write_atomically(path, msgspec.json.encode({"url": self.url, "token": token}) + b"\n")
        self._programs.add(token.encode())
        try:
            yield
        finally:
            self._programs.discard(token.encode())
            with contextlib.suppress(OSError):
                path.unlink()

    def _forget(self) -> None:
        now = self._clock()
        for kept in (self._codes, self._sessions):
            for secret in [secret for secret, until in kept.items() if until <= now]:
                del kept[secret]


def _equal(kept: dict[bytes, float] | set[bytes], given: str) -> bytes | None:
    """The one that is equal. Every one is compared, so that time tells nothing about which."""
    found, data = None, given.encode("utf-8", "replace")
    for secret in kept:
        if hmac.compare_digest(secret, data):
            found = secret
    return found


def _shorten(kept: dict[bytes, float], most: int) -> None:
    while len(kept) > most:
        del kept[min(kept, key=kept.__getitem__)]


# ---- the route of the owner's socket


class _Nothing(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    pass


def _login_code(request: Request, surface: Any) -> Response:
    """Where to open the page; loopback.py never passes this on, so that a session cannot breed others."""
    body(request, _Nothing)
    logins = surface.logins
    if logins is None or not logins.url:
        raise Refused(409, OFF if logins is None else logins.reason)
    return reply({"url": f"{logins.url}/#c={logins.new_code()}", "expires_s": CODE_S})


LOGIN: dict[str, dict[str, Handler]] = {"/v1/login-code": {"POST": _login_code}}
