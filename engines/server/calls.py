"""HTTP to the server: one connection per call, so that closing it cancels the call and nothing else.

A running request is cancelled by shutting its socket down from another thread; the server sees its client go
away, which every server of the examples takes as "stop".
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import json
import re
import socket
import ssl
import threading
from collections.abc import Iterable, Iterator
from typing import Any
from urllib.parse import unquote_to_bytes, urlsplit

import httpx
import msgspec

from engines.runtime.contract import CancelledRun, FaultError, refuse
from protocol.faults import Fault

MAX_ANSWER_BYTES = 512 * 2**20
MAX_EVENT_BYTES = 16 * 2**20
CONNECT_S = 10.0
_CONNECTED = ("connect_tcp.complete", "connect_unix_socket.complete", "start_tls.complete")


class Origin(msgspec.Struct, frozen=True, kw_only=True):
    """Where the server is: a base URL, and a Unix socket when it listens on one."""

    url: str
    socket_path: str | None = None
    key: str = ""
    tls: Any = None

    @classmethod
    def at(cls, url: str, *, socket_path: str | None = None, key: str = "") -> Origin:
        """Build one; TLS settings are made once, since reading the trust store takes milliseconds."""
        tls = ssl.create_default_context() if url.startswith("https:") else ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        return cls(url=url.rstrip("/"), socket_path=socket_path, key=key, tls=tls)


class Event(msgspec.Struct, frozen=True):
    """One server-sent event."""

    name: str
    data: str


class Call:
    """One request at a time on a connection of its own; `abort` may come from any thread, also before the request."""

    def __init__(self, origin: Origin) -> None:
        self._origin = origin
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None
        self.aborted = False

    def abort(self) -> None:
        """Shut the connection down; the call raises CancelledRun. Does not block."""
        with self._lock:
            self.aborted = True
            self._shut()

    def _shut(self) -> None:
        if self._socket is not None:
            with contextlib.suppress(OSError):  # SSLSocket.shutdown would also touch the TLS state of the reader
                socket.socket.shutdown(self._socket, socket.SHUT_RDWR)

    def _trace(self, event: str, info: dict[str, Any]) -> None:
        if event.endswith(_CONNECTED):
            with self._lock:
                self._socket = info["return_value"].get_extra_info("socket")
                if self.aborted:
                    self._shut()

    @contextlib.contextmanager
    def open(
        self, method: str, path: str, body: Any = None, *, timeout_s: float | None = None
    ) -> Iterator[httpx.Response]:
        """Send a request; the response's body is still to be read.

        Args:
            body: sent as JSON when given.
            timeout_s: between two pieces of the answer; None waits, since the host watches over runs.

        Raises:
            CancelledRun: `abort` was called.
            FaultError: `engine_failed` when the server cannot be reached or hangs up.
        """
        headers = {"Authorization": f"Bearer {self._origin.key}"} if self._origin.key else {}
        transport = httpx.HTTPTransport(uds=self._origin.socket_path, verify=self._origin.tls)
        content = None if body is None else msgspec.json.encode(body)
        if content is not None:
            headers["Content-Type"] = "application/json"
        timeout = httpx.Timeout(timeout_s, connect=CONNECT_S)
        url = self._origin.url + path
        try:
            with httpx.Client(transport=transport, timeout=timeout, trust_env=False) as client:
                request = client.build_request(
                    method, url, content=content, headers=headers, extensions={"trace": self._trace}
                )
                response = client.send(request, stream=True)
                try:
                    yield response
                finally:
                    response.close()
        except (httpx.HTTPError, httpx.StreamError, httpx.InvalidURL, ssl.SSLError) as error:
            if self.aborted:
                raise CancelledRun from None
            raise lost(error) from None
        finally:
            with self._lock:
                self._socket = None

    def json(self, method: str, path: str, body: Any = None, *, timeout_s: float | None = None) -> Any:
        """Send a request and decode the JSON answer. Raises as `open` and `checked` do."""
        with self.open(method, path, body, timeout_s=timeout_s) as response:
            checked(response)
            data = read(response)
        try:
            return json.loads(data)
        except ValueError:
            raise refuse("engine_failed", f"The server answered {path} with something that is not JSON.") from None

    def is_ours(self, url: str) -> bool:
        """Whether a URL of an answer is inline or leads back to the same server."""
        if url.startswith("data:"):
            return True
        if not re.match(r"[A-Za-z][A-Za-z0-9+.-]*:|//", url):
            return True
        base, found = urlsplit(self._origin.url), urlsplit(url)
        return (base.scheme, base.netloc) == (found.scheme, found.netloc)

    def fetch(self, url: str) -> bytes:
        """The bytes behind a URL of the server's answer: inline, or on the server itself; nobody else is asked.

        Raises:
            FaultError: the URL leads elsewhere, or nothing is there.
        """
        if url.startswith("data:"):
            return _inline(url)
        if not self.is_ours(url):
            raise refuse("engine_failed", "The server's answer points to another server; its files are not fetched.")
        found, base = urlsplit(url), urlsplit(self._origin.url)
        path = found.path if found.path.startswith("/") else f"{base.path}/{found.path}"
        if base.path and path.startswith(base.path + "/"):
            path = path.removeprefix(base.path)
        with self.open("GET", path + (f"?{found.query}" if found.query else "")) as response:
            checked(response)
            return read(response)


def _inline(url: str) -> bytes:
    head, _, text = url.partition(",")
    try:
        return base64.b64decode(text, validate=True) if head.endswith(";base64") else unquote_to_bytes(text)
    except binascii.Error:
        raise refuse("engine_failed", "The server's data URL is not base64.") from None


def read(response: httpx.Response) -> bytes:
    """Read a whole body, bounded by `MAX_ANSWER_BYTES`."""
    out = bytearray()
    for piece in response.iter_bytes():
        out += piece
        if len(out) > MAX_ANSWER_BYTES:
            raise refuse("engine_failed", f"The server's answer exceeds {MAX_ANSWER_BYTES} bytes.")
    return bytes(out)


_LINE_END = re.compile(rb"\r\n|\n|\r(?!\Z)")


def events(pieces: Iterable[bytes]) -> Iterator[Event]:
    """Take server-sent events out of a byte stream, however it is split.

    Lines end at CR, LF or CRLF only: str.splitlines, which httpx uses, also splits at U+2028, which JSON may hold.
    """
    rest, name, data = b"", "", list[str]()
    for piece in pieces:
        rest += piece
        if len(rest) > MAX_EVENT_BYTES:
            raise refuse("engine_failed", f"The server sent an event of more than {MAX_EVENT_BYTES} bytes.")
        *lines, rest = _LINE_END.split(rest)  # a CR at the very end may be half of a CRLF
        for line in lines:
            if not line:
                if data:
                    yield Event(name, "\n".join(data))
                name, data = "", []
                continue
            field, _, value = line.decode(errors="replace").partition(":")
            value = value.removeprefix(" ")
            if field == "data":
                data.append(value)
            elif field == "event":
                name = value
    # An event that the stream cut off is not an event; the caller sees that its last one is missing.


def checked(response: httpx.Response) -> None:
    """Raise the fault that a status other than 2xx means."""
    if response.is_success:
        return
    body = bytearray()
    for piece in response.iter_bytes():
        body += piece
        if len(body) > 65_536:
            break
    raise FaultError(fault_of_error(response.status_code, bytes(body)))


_CONTEXT_CODES = ("exceed_context_size_error", "context_length_exceeded")


def fault_of_error(status: int, body: bytes) -> Fault:
    """Translate an HTTP error of the server into our fault; its own sentence is kept."""
    try:
        decoded = json.loads(body)
    except ValueError:
        decoded = None
    error = decoded.get("error", decoded) if isinstance(decoded, dict) else decoded
    fields: dict[str, Any] = error if isinstance(error, dict) else {}
    text = str(fields.get("message") or fields.get("detail") or (error if isinstance(error, str) else "")).strip()
    said = (text or body[:300].decode(errors="replace").strip() or "no reason given")[:1000]
    param = fields.get("param") if isinstance(fields.get("param"), str) else None
    detail = {"status": status}
    if any(word in _CONTEXT_CODES for word in (fields.get("type"), fields.get("code"))) or "context length" in said:
        return Fault("context_length_exceeded", said, field=param, detail=detail)
    if status in (400, 422):
        return Fault("invalid_request", said, field=param, detail=detail)
    if status == 413:
        return Fault("payload_too_large", said, detail=detail)
    if status in (429, 503):
        return Fault("engine_failed", f"The server is busy: {said}", retryable=True, detail=detail)
    if status in (401, 403):
        return Fault("engine_failed", f"The server refused our key ({status}); check options.key_env.", detail=detail)
    if status in (404, 405, 501):
        return Fault("engine_failed", f"The server does not offer this ({status}): {said}", detail=detail)
    return Fault("engine_failed", f"The server answered {status}: {said}", detail=detail)


def lost(error: Exception) -> FaultError:
    """The fault of a connection that could not be made or broke."""
    what = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return FaultError(Fault("engine_failed", f"The connection to the server was lost ({what}).", retryable=True))
