"""The page: HTTP on 127.0.0.1 and [::1] for a browser of this machine, with the same routes as the owner's socket.

Theory of operation. Anybody's web page may make a browser speak to this port, and so may every program of every user
here, so each request passes these checks, in this order: the exact Host (a name that was rebound to 127.0.0.1 is
another), Origin absent or our own, Sec-Fetch-Site "same-origin" or "none" where the browser tells it, the token of a
session (login.py), and JSON as the type of whatever is no GET. There are no cookies, because those of 127.0.0.1 are
sent to every port of it; and no CORS at all. What loads the page and what opens a session need no token, nor does
`/v1/health`. A request that passes is one of the owner's.
"""

from __future__ import annotations

import contextlib
import errno
import logging
from collections.abc import AsyncIterator, Mapping
from pathlib import Path

import msgspec
import trio

from supervisor.control.conversation import Conversations
from supervisor.control.exchange import JSON, Answer, Refused, Request, Response, body, error, reply
from supervisor.control.login import CODE_S, SESSION_IDLE_S, Logins
from supervisor.control.peer import PEER
from supervisor.control.routes import answer
from supervisor.control.surface import Surface
from supervisor.errors import NoPermission
from supervisor.settings import PageTable

log = logging.getLogger(__name__)

HOME = "/"
SESSION = "/v1/session"
OPEN = ("/v1/health",)
_HERE = ("127.0.0.1", "[::1]", "localhost")  # browsers never ask a name server for the last
_TRIES = 20  # for a free port that is free for both addresses
_KINDS = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
}
HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-frame-options": "DENY",
}


@contextlib.asynccontextmanager
async def open_page(table: PageTable, surface: Surface, token_file: Path | None = None) -> AsyncIterator[None]:
    """Serve the page for as long as the block lasts, when `table` says so. `surface.logins` tells where, or why not.

    A port that is taken costs the page, never the worker: the log and `supervisor ui` say so.

    Args:
        token_file: made for programs on systems without Unix sockets; None makes none.

    Raises:
        NoPermission: `token_file` cannot be written.
    """
    logins = surface.logins
    listeners = await _listeners(table, logins) if table.enabled and logins is not None else []
    if not listeners or logins is None:
        yield
        return
    port: int = listeners[0].socket.getsockname()[1]
    logins.url = f"http://127.0.0.1:{port}"
    log.info("the page answers at %s; `supervisor ui` opens it", logins.url)
    try:
        with contextlib.ExitStack() as stack:
            if token_file is not None:
                _let_programs_in(logins, token_file, stack)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(guests(surface, logins, port).serve, listeners)
                yield
                nursery.cancel_scope.cancel()
    finally:
        logins.url, logins.reason = "", "The supervisor is ending."
        for listener in listeners:
            listener.socket.close()


async def _listeners(table: PageTable, logins: Logins) -> list[trio.SocketListener]:
    """For 127.0.0.1 and [::1], one port for both; empty when it cannot be had."""
    try:
        return await _listen(table.port)
    except OSError as problem:
        cure = "choose another port in [page] of worker.toml, or 0 for a free one"
        where = f"port {table.port}" if table.port else "a free port"
        logins.reason = f"The page is not served: {where} of 127.0.0.1 and [::1] cannot be had ({problem}); {cure}."
        log.warning("%s", logins.reason)
        return []


async def _listen(port: int) -> list[trio.SocketListener]:
    for left in reversed(range(1 if port else _TRIES)):
        four = await trio.open_tcp_listeners(port, host="127.0.0.1")
        try:
            return four + await trio.open_tcp_listeners(four[0].socket.getsockname()[1], host="::1")
        except OSError as problem:
            if problem.errno != errno.EADDRINUSE:
                return four  # no IPv6 on this machine
            four[0].socket.close()  # somebody else would answer at http://localhost
            if not left:
                raise
    raise AssertionError("a range is never empty")


def _let_programs_in(logins: Logins, path: Path, stack: contextlib.ExitStack) -> None:
    try:
        stack.enter_context(logins.token_file(path))
    except OSError as problem:
        raise NoPermission(f"The token file {path} cannot be written: {problem.strerror}.") from None


# ---- who may speak


def guests(surface: Surface, logins: Logins, port: int) -> Conversations[trio.SocketStream]:
    """Conversations with browsers, and programs, that hold a token."""
    files = page_files()

    def check(request: Request) -> None:
        try:
            check_origin(request, port)
            check_token(request, logins, free=frozenset({*files, *OPEN, SESSION}))
        except Refused as refusal:
            log.warning("the page refused %s %r: %s", request.method, request.path[:100], refusal)
            raise

    async def answered(request: Request) -> Answer:
        PEER.set("the page")  # in the log of orders; the task is this connection's alone
        try:
            if (file := files.get(request.path)) is not None:
                if request.method != "GET":
                    raise Refused(405, f"{request.path} takes GET.")
                return file
            if request.path == SESSION:
                return _session(request, logins)
            if request.path == "/v1/login-code":
                raise Refused(403, "A code is given out over the owner's socket alone: run `supervisor ui`.")
        except Refused as refusal:
            return error(refusal.status, str(refusal), **refusal.more)
        return await answer(request, surface)

    return Conversations(answered, check=check, headers=HEADERS)


def check_origin(request: Request, port: int) -> None:
    """Whether this comes from our own page, or from no page.

    Raises:
        Refused: from another page, or by another name.
    """
    host = request.headers.get("host", "")
    if host not in {f"{name}:{port}" for name in _HERE}:
        raise Refused(403, f"This is not {host[:100]!r}; open http://127.0.0.1:{port}.")
    origin = request.headers.get("origin")
    if origin is not None and origin != f"http://{host}":
        raise Refused(403, f"No page of {origin[:100]!r} may speak here.")
    if request.headers.get("sec-fetch-site", "none") not in ("same-origin", "none"):
        raise Refused(403, "No page of another site may speak here.")


def check_token(request: Request, logins: Logins, free: frozenset[str]) -> None:
    """Whether this is the owner, and whether it says what it sends.

    Args:
        free: paths that need no token.

    Raises:
        Refused: no token, one that is wrong or too old, or a request that changes something and is not JSON.
    """
    if request.path not in free and not logins.admits(bearer(request)):
        raise Refused(401, "This needs the token of a session; run `supervisor ui` to open one.")
    if request.method != "GET" and request.kind != JSON:
        raise Refused(415, f"{request.method} needs the content type {JSON}.")


def bearer(request: Request) -> str:
    """The token that a request shows; "" when it shows none."""
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else ""


# ---- what is only here


class _Swap(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    code: str


def _session(request: Request, logins: Logins) -> Response:
    """POST swaps a code for a token, DELETE ends the session."""
    if request.method == "DELETE":
        logins.end(bearer(request))
        return reply({})
    if request.method != "POST":
        raise Refused(405, f"{SESSION} takes POST, DELETE.")
    order: _Swap = body(request, _Swap)
    token = logins.swap(order.code)
    if token is None:
        raise Refused(401, f"This code was used, is older than {CODE_S:g} s, or is wrong; run `supervisor ui` again.")
    return reply({"token": token, "idle_s": SESSION_IDLE_S})


def page_files() -> Mapping[str, Response]:
    """What the page is made of, by path."""
    folder = Path(__file__).with_name("ui")
    files = {
        f"/{path.name}": Response(200, path.read_bytes(), _KINDS[path.suffix])
        for path in sorted(folder.iterdir())
        if path.suffix in _KINDS
    }
    return {**files, HOME: files["/index.html"]}
