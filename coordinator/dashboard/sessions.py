"""Sessions of browsers: an admin key that was typed once becomes two halves of a secret that ends with the key.

Theory of operation. The key itself is never kept in a browser. A login makes two random halves: the cookie, which no
script can read, and the page's half, which the page keeps in its own origin's storage and sends as a header. Both are
needed, and each guards the other: browsers send the cookies of a host to every port of it, so another program on the
same machine may see the cookie, but never the page's half; and no other page can make a browser send that header. The
store keeps one hash of both beside the hash of the key, so every replica knows the session, and nobody learns one from
a copy of the database. Every use looks whether the key is alive.
"""

from __future__ import annotations

import re
import secrets
import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import Scope

from coordinator.keys import Key, digest
from coordinator.store.threads import StoreThreads
from protocol.faults import refuse

if TYPE_CHECKING:
    from coordinator.keys import Keys
    from coordinator.store import Store

PAGE_HEADER = "x-bulkhead-page"
SESSION_S = 12 * 3600
FAILED_MOST = 10  # wrong keys from one address within FAILED_S; a key has 256 random bits, so this spares the log
FAILED_S = 60.0
MOST_ADDRESSES = 10_000
# What a session opens: what the page asks for, and no more. A key opens the rest.
OPENS = re.compile(
    r"/dashboard/\w+|/v1/(?:admin|deployments|keys|registrations|usage|workers)(?:/.*)?|/v1/jobs/[^/]+/(?:cancel|retry)"
)
_HALF = re.compile(r"[A-Za-z0-9_-]{43}", re.ASCII)


class Opened(NamedTuple):
    """A new session: its two halves, and whose it is."""

    cookie: str
    page: str
    key: Key


class Sessions:
    """See the module."""

    def __init__(self, store: Store, keys: Keys) -> None:
        self._store, self._keys = store, keys
        self._threads = StoreThreads(readers=2)

    async def open(self, secret: str) -> Opened:
        """Swap an admin key for a session. Raises FaultError(unauthorized, forbidden, overloaded), StoreError."""
        key = await self._keys.look_up(secret)
        if key is None:
            raise refuse(
                "unauthorized", "The key is unknown or was revoked; `coordinator keys list` shows those that are good."
            )
        if key.scope != "admin":
            cure = "make one with: coordinator keys create --scope admin"
            raise refuse("forbidden", f"A key of scope {key.scope} does not open the dashboard; {cure}.")
        cookie, page = secrets.token_urlsafe(32), secrets.token_urlsafe(32)
        await self._threads.write(self._store.add_session, _hash(cookie, page), digest(secret), SESSION_S * 1000)
        return Opened(cookie, page, key)

    async def admit(self, scope: Scope) -> Key | None:
        """The key behind a request of the dashboard's page; None when it names no session, or goes elsewhere.

        Raises:
            FaultError: unauthorized: the session is over; forbidden: another page asks.
        """
        headers = Headers(scope=scope)
        cookie, page = cookie_of(headers, is_secure(scope)), headers.get(PAGE_HEADER, "")
        if not cookie or not page or OPENS.fullmatch(scope["path"]) is None:
            return None
        check_same_origin(headers, scope["method"])
        key = await self.find(cookie, page)
        if key is None:
            raise refuse("unauthorized", "The session is over; open the dashboard again with an admin key.")
        scope.setdefault("state", {})["session"] = True
        return key

    async def find(self, cookie: str, page: str) -> Key | None:
        """The admin key of the session of these halves, while its time has not passed and the key lives."""
        if not (_HALF.fullmatch(cookie) and _HALF.fullmatch(page)):
            return None
        key_hash = await self._threads.read(self._store.session, _hash(cookie, page))
        key = None if key_hash is None else self._keys.by_hash(key_hash)
        return key if key is not None and key.scope == "admin" else None

    async def end(self, cookie: str, page: str) -> None:
        """Forget a session."""
        await self._threads.write(self._store.end_session, _hash(cookie, page))


def _hash(cookie: str, page: str) -> bytes:
    return digest(f"{cookie}.{page}")


# ---- what a browser sends -----------------------------------------------------------------------------------


def is_secure(scope: Scope) -> bool:
    """Whether the browser's connection has TLS, here or at a trusted proxy."""
    return scope.get("scheme") == "https"


def cookie_name(headers: Headers, secure: bool) -> str:
    """The cookie's name: one for every port of a host, since browsers keep cookies by host alone."""
    port = headers.get("host", "").rpartition(":")[2]
    name = f"bulkhead-{port if port.isascii() and port.isdigit() else 'session'}"
    return f"__Host-{name}" if secure else name


def set_cookie(name: str, value: str, secure: bool) -> str:
    """The value of a `set-cookie` header; without a value the cookie ends."""
    kept = f"Max-Age={SESSION_S if value else 0}"
    return f"{name}={value}; Path=/; HttpOnly; SameSite=Strict; {kept}{'; Secure' if secure else ''}"


def cookie_of(headers: Headers, secure: bool) -> str:
    """Our cookie's value; "" without one."""
    name = cookie_name(headers, secure)
    for part in headers.get("cookie", "")[:8192].split(";"):
        key, _, value = part.strip().partition("=")
        if key == name:
            return value
    return ""


def check_same_origin(headers: Headers, method: str) -> None:
    """Whether this comes from our own page. Raises FaultError(forbidden).

    Browsers tell the site of the asking page only where the connection is safe (TLS, or this machine); elsewhere, and
    behind a proxy, what has to agree is the `Origin` with the `Host` that the page was opened by.
    """
    reads = method in ("GET", "HEAD")
    site = headers.get("sec-fetch-site")
    if site == "same-origin" or (site == "none" and reads):
        return
    if site is not None:
        raise refuse("forbidden", "No page of another site may ask here; open the dashboard by its own address.")
    origin = headers.get("origin")
    if origin is None and reads:
        return
    if origin is None or _place(origin) != headers.get("host", "").lower():
        raise refuse(
            "forbidden",
            f"No page of {str(origin)[:100]!r} may ask here; a proxy in between must pass on the header Host as it is.",
        )


def _place(origin: str) -> str:
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return "?"


class FailedLogins:
    """How often an address has tried a wrong key lately, in this process.

    Args:
        clock: seconds; replaced by tests.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._failed: dict[str, deque[float]] = {}

    def check(self, address: str) -> None:
        """Whether the address may try. Raises FaultError(rate_limited)."""
        times = self._failed.get(address)
        while times and times[0] <= self._clock() - FAILED_S:
            times.popleft()
        if times and len(times) >= FAILED_MOST:
            wait = max(1, round(times[0] + FAILED_S - self._clock()))
            raise refuse("rate_limited", f"Too many wrong keys from here; try again in {wait} s.", retry_after_s=wait)

    def note(self, address: str) -> None:
        """The address has tried a wrong key."""
        if address not in self._failed and len(self._failed) >= MOST_ADDRESSES:
            del self._failed[next(iter(self._failed))]
        self._failed.setdefault(address, deque(maxlen=FAILED_MOST)).append(self._clock())
