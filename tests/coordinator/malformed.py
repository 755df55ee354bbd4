"""What no honest peer sends: tables of requests, of upgrades, and of frames after an upgrade, and how to send them."""

from __future__ import annotations

import base64
import contextlib
import socket
import struct
from typing import NamedTuple

PATIENCE_S = 60.0
CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG = 0, 1, 2, 8, 9, 10
HUNG_UP = 0  # as a status: the connection is ended without an answer


class Request(NamedTuple):
    """Bytes of one connection.

    Attributes:
        right: statuses that are right; empty when it is cut off, and nobody is left to be answered.
        reset: it ends with RST instead of FIN.
    """

    name: str
    data: bytes
    right: tuple[int, ...] = ()
    reset: bool = False


def head(line: str, *fields: bytes, key: str = "{KEY}") -> bytes:
    """A request's head; `{KEY}` is a client's key, filled in by `exchanged`."""
    return b"\r\n".join([line.encode(), b"Host: x", f"Authorization: Bearer {key}".encode(), *fields, b"", b""])


POST = "POST /v1/jobs HTTP/1.1"
GET = "GET /v1/models HTTP/1.1"
JSON = b"Content-Type: application/json"
CHUNKED = b"Transfer-Encoding: chunked"
FORM = b"Content-Type: multipart/form-data; boundary=b"
BAD_OR_GONE = (400, HUNG_UP)

UPGRADING = (
    b"Connection: Upgrade",
    b"Upgrade: websocket",
    b"Sec-WebSocket-Version: 13",
    b"Sec-WebSocket-Key: " + base64.b64encode(b"0123456789abcdef"),
)
UPGRADE = head("GET /v1/worker HTTP/1.1", *UPGRADING)

REQUESTS = [
    Request("garbage", b"\x00\xff\xfe\x16 not http\r\n\r\n", BAD_OR_GONE),
    Request("tls hello", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(64), BAD_OR_GONE),
    Request("http/0.9", b"GET /healthz\r\n\r\n", (400, 200, HUNG_UP)),
    Request("unknown version", b"GET /healthz HTTP/9.9\r\n\r\n", (400, 505)),
    Request("unknown method", head("BREW /v1/models HTTP/1.1"), (400, 405)),
    Request("h2 preface", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(9), BAD_OR_GONE),
    Request(
        "h2c", head(GET, b"Connection: Upgrade, HTTP2-Settings", b"Upgrade: h2c", b"HTTP2-Settings: AAMA"), (200, 400)
    ),
    Request(
        "h2c, bad settings", head(GET, b"Connection: Upgrade", b"Upgrade: h2c", b"HTTP2-Settings: %%%"), (200, 400)
    ),
    Request("unknown upgrade", head(GET, b"Connection: Upgrade", b"Upgrade: tor/9"), (200, 400)),
    Request("chunk size", head(POST, JSON, CHUNKED) + b"zz\r\nhello\r\n", BAD_OR_GONE),
    Request("chunk size overflow", head(POST, JSON, CHUNKED) + b"f" * 20 + b"\r\nx", BAD_OR_GONE),
    Request("negative chunk", head(POST, JSON, CHUNKED) + b"-5\r\nhello\r\n0\r\n\r\n", BAD_OR_GONE),
    Request("chunk without end", head(POST, JSON, CHUNKED) + b"3\r\nabcdef\r\n", BAD_OR_GONE),
    Request("chunked, no chunk", head(POST, JSON, CHUNKED) + b"0\r\n\r\n", (400,)),
    Request("chunked twice", head(POST, JSON, CHUNKED, CHUNKED) + b"0\r\n\r\n", (400, 501, HUNG_UP)),
    Request("unknown transfer coding", head(POST, JSON, b"Transfer-Encoding: brotli") + b"x", (400, 501, HUNG_UP)),
    Request(
        "length and chunked",
        head(POST, JSON, CHUNKED, b"Content-Length: 5") + b"0\r\n\r\nGET / HTTP/1.1\r\n\r\n",
        (400,),
    ),
    Request("two lengths", head(POST, JSON, b"Content-Length: 5", b"Content-Length: 6") + b"hello!", (400,)),
    Request("negative length", head(POST, JSON, b"Content-Length: -1"), (400,)),
    Request("length in words", head(POST, JSON, b"Content-Length: five"), (400,)),
    Request("length of an exabyte", head(POST, JSON, b"Content-Length: 1152921504606846976"), (413,)),
    Request("length beyond 64 bits", head(POST, JSON, b"Content-Length: 99999999999999999999"), (400, 413)),
    Request("huge header", head(GET, b"X-Huge: " + b"h" * 2**20), BAD_OR_GONE),
    Request("fifty thousand headers", head(GET, *[b"X-%d: x" % n for n in range(50_000)]), BAD_OR_GONE),
    Request("huge path", b"GET /" + b"p" * 2**20 + b" HTTP/1.1\r\n\r\n", BAD_OR_GONE),
    Request("header without colon", head(GET, b"no colon here"), BAD_OR_GONE),
    Request("space before the colon", head(GET, b"X-Odd : x"), (400, 200, HUNG_UP)),
    Request("nul in a header", head(GET, b"X-Nul: a\0b"), BAD_OR_GONE),
    Request("bare carriage return", head(GET, b"X-Odd: a\rb"), (400, 200, HUNG_UP)),
    Request("folded header", head(GET, b"X-Odd: a\r\n b"), (400, 200, HUNG_UP)),
    Request("key of no text", head(GET, key="\xff\xfe"), (401,)),
    Request("path with nul", head("GET /v1/jobs/%00%ff%fe HTTP/1.1"), (404, 400)),
    Request("dots in the path", head("GET /v1/blobs/../../../etc/passwd HTTP/1.1"), (403, 404)),
    Request("path of no text", b"GET /\xff\xfe HTTP/1.1\r\nHost: x\r\n\r\n", (400, 401, 404)),
    Request("half an escape", head("GET /v1/jobs/%e2%82%zz% HTTP/1.1"), (404, 400)),
    Request("absolute address", head("GET http://elsewhere.test/v1/models HTTP/1.1"), (200, 400, 404)),
    Request("connect", head("CONNECT elsewhere.test:443 HTTP/1.1"), (400, 401, 404, 405, HUNG_UP)),
    Request("body of no text", head(POST, JSON, b"Content-Length: 4") + b"\xff\xfe\xfd\xfc", (400,)),
    Request("deep body", head(POST, JSON, b"Content-Length: 100000") + b"[" * 100_000, (400,)),
    Request("number without end", head(POST, JSON, b"Content-Length: 9007") + b'{"wait":' + b"9" * 8998 + b"}", (400,)),
    Request(
        "compressed body",
        head(POST, JSON, b"Content-Encoding: gzip", b"Content-Length: 3") + b"\x1f\x8b\x08",
        (400, 415),
    ),
    Request(
        "form without a boundary",
        head(POST, b"Content-Type: multipart/form-data", b"Content-Length: 2") + b"--",
        (400,),
    ),
    Request("form that never begins", head(POST, FORM, b"Content-Length: 4") + b"abcd", (400,)),
    Request(
        "form that never ends",
        head(POST, FORM, b"Content-Length: 60") + b"--b\r\n" + b"Content-Disposition: x\r\n" * 2 + b"abcdefg",
        (400,),
    ),
    Request("cut in the head", b"GET /healthz HT"),
    Request("cut in the head, reset", b"GET /healthz HT", reset=True),
    Request("cut in the body", head(POST, JSON, b"Content-Length: 50") + b'{"kind":'),
    Request("cut in the body, reset", head(POST, JSON, b"Content-Length: 50") + b'{"kind":', reset=True),
    Request("cut in a chunk, reset", head(POST, JSON, CHUNKED) + b'20\r\n{"kind":', reset=True),
    Request("cut in a form, reset", head(POST, FORM, CHUNKED) + b"10\r\n--b\r\nContent-D", reset=True),
    Request("cut before the answer, reset", head(GET), reset=True),
    Request("upgrade behind a request", head(GET) + UPGRADE, (200,)),
    Request("upgrade behind a request, reset", head(POST, JSON, b"Content-Length: 2") + b"{}" + UPGRADE, reset=True),
    Request("upgrade behind half a body", head(POST, JSON, b"Content-Length: 50") + UPGRADE),
    Request("a thousand at once, reset", head(GET) * 1000, reset=True),
]


class Upgrade(NamedTuple):
    """How an upgrade is asked for: header fields, and what comes behind them at once.

    Attributes:
        right: statuses that are right; empty when nobody is left to be answered.
        known: whether it comes with what admits it.
    """

    name: str
    fields: tuple[bytes, ...]
    after: bytes
    right: tuple[int, ...] = ()
    known: bool = True
    reset: bool = False


REFUSED = (400, 401, 403, 404, 405, 426, 500, HUNG_UP)
UPGRADES = [
    Upgrade("unknown peer", UPGRADING, b"", (401, 403), known=False),
    Upgrade("unknown peer, bytes behind", UPGRADING, b"\xff" * 4096, (401, 403), known=False),
    Upgrade("unknown peer, bytes behind, reset", UPGRADING, b"\xff" * 4096, known=False, reset=True),
    Upgrade("no key", UPGRADING[:3], b"", (400,)),
    Upgrade("key of no length", (*UPGRADING[:3], b"Sec-WebSocket-Key: eA=="), b"", (400,)),
    Upgrade("two keys", (*UPGRADING, UPGRADING[3]), b"", (400,)),
    Upgrade("version 99", (*UPGRADING[:2], b"Sec-WebSocket-Version: 99", UPGRADING[3]), b"", (400, 426)),
    Upgrade("no version", (*UPGRADING[:2], UPGRADING[3]), b"", (400, 426)),
    Upgrade("no connection field", UPGRADING[1:], b"", REFUSED),
    Upgrade("body with the upgrade", (*UPGRADING, b"Content-Length: 5"), b"hello", (400,)),
    Upgrade("chunks with the upgrade", (*UPGRADING, CHUNKED), b"5\r\nhello\r\n0\r\n\r\n", (400,)),
    Upgrade("bytes behind the upgrade", UPGRADING, b"\xff" * 4096, (101, 400, HUNG_UP)),
    Upgrade("bytes behind the upgrade, reset", UPGRADING, b"\xff" * 4096, reset=True),
    Upgrade("frames before 101", UPGRADING, b"\x82\x83\0\0\0\0\x93\x01\x02", (101, 400, HUNG_UP)),
    Upgrade("close before 101", UPGRADING, b"\x88\x80\0\0\0\0", (101, 400, HUNG_UP)),
    Upgrade(
        "a request behind the upgrade", UPGRADING, b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n", (101, 400, HUNG_UP)
    ),
    Upgrade("gone before 101", UPGRADING, b""),
    Upgrade("gone before 101, reset", UPGRADING, b"", reset=True),
    Upgrade(
        "compression that cannot be",
        (*UPGRADING, b"Sec-WebSocket-Extensions: permessage-deflate; x=" + b"9" * 500),
        b"",
        (101, 400),
    ),
]


def frame(opcode: int, payload: bytes = b"", *, fin: bool = True, masked: bool = True, bits: int = 0) -> bytes:
    """A client's frame; the mask is zero."""
    first, mask = (0x80 if fin else 0) | bits | opcode, 0x80 if masked else 0
    size = len(payload)
    if size < 126:
        length = bytes([mask | size])
    elif size < 65536:
        length = bytes([mask | 126]) + size.to_bytes(2, "big")
    else:
        length = bytes([mask | 127]) + size.to_bytes(8, "big")
    return bytes([first]) + length + (bytes(4) if masked else b"") + payload


def close(code: int, reason: bytes = b"") -> bytes:
    """A close frame."""
    return frame(CLOSE, code.to_bytes(2, "big") + reason)


class Frames(NamedTuple):
    """Bytes behind an upgrade that was granted; the server must end the connection, unless the peer does.

    Attributes:
        gone: the peer leaves at once.
    """

    name: str
    data: bytes
    gone: bool = False
    reset: bool = False


HUGE = 70 * 2**20  # more than any door takes
FRAMES = [
    Frames("unmasked", frame(BINARY, b"abc", masked=False)),
    Frames("reserved opcode", frame(3, b"x")),
    Frames("reserved control opcode", frame(11, b"x")),
    Frames("first reserved bit", frame(BINARY, b"x", bits=0x40)),
    Frames("all reserved bits", frame(TEXT, b"x", bits=0x70)),
    Frames("long ping", frame(PING, b"p" * 200)),
    Frames("ping in fragments", frame(PING, b"p", fin=False)),
    Frames("continuation of nothing", frame(CONTINUATION, b"x")),
    Frames("message within a message", frame(BINARY, b"a", fin=False) + frame(BINARY, b"b")),
    Frames("text of no text", frame(TEXT, b"\xff\xfe")),
    Frames("text cut in a character", frame(TEXT, b"\xe2\x82")),
    Frames("fragments of no text", frame(TEXT, b"\xe2", fin=False) + frame(CONTINUATION, b"\xff")),
    Frames("empty text", frame(TEXT)),
    Frames("empty bytes", frame(BINARY)),
    Frames("text", frame(TEXT, b"hello")),
    Frames("bytes", frame(BINARY, b"\xc1\xff\xfe")),
    Frames("deep msgpack", frame(BINARY, b"\x91" * 100_000 + b"\x01")),
    Frames("deep json", frame(TEXT, b"[" * 100_000)),
    Frames("huge map announced", frame(BINARY, b"\xdf\xff\xff\xff\xff")),
    Frames("length of 2^63", b"\x82\xff" + b"\xff" * 8 + bytes(4)),
    Frames("length beyond the bound", b"\x82\xff" + HUGE.to_bytes(8, "big") + bytes(4)),
    Frames("length longer than needed", b"\x82\xff" + (3).to_bytes(8, "big") + bytes(4) + b"abc"),
    Frames("close", frame(CLOSE)),
    Frames("close with half a code", frame(CLOSE, b"\x03")),
    Frames("close 0", close(0)),
    Frames("close 999", close(999)),
    Frames("close 1005", close(1005)),
    Frames("close 1015", close(1015)),
    Frames("close 65535", close(65535)),
    Frames("close for a reason of no text", close(1000, b"\xff\xfe")),
    Frames("close with a long reason", close(1000, b"r" * 200)),
    Frames("message behind the close", close(1000) + frame(BINARY, b"abc")),
    Frames("close twice", close(1000) * 2),
    Frames("http in the session", b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"),
    Frames("cut in a frame", b"\x82\xfe\x10\x00" + bytes(4) + b"abc", gone=True),
    Frames("cut in a frame, reset", b"\x82\xfe\x10\x00" + bytes(4) + b"abc", gone=True, reset=True),
    Frames("cut in a length", b"\x82\xff\0\0", gone=True),
    Frames("cut between fragments, reset", frame(BINARY, b"a", fin=False), gone=True, reset=True),
    Frames("gone without a word", b"", gone=True),
    Frames("reset without a word", b"", gone=True, reset=True),
    Frames("thousand pings, reset", frame(PING, b"p") * 1000, gone=True, reset=True),
]


def connected(port: int) -> socket.socket:
    """A connection on which no wait is without end."""
    return socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S)


def leave(peer: socket.socket, *, reset: bool) -> None:
    """Close, with RST when wanted."""
    if reset:
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    peer.close()


def exchanged(port: int, data: bytes, *, answered: bool, reset: bool = False) -> int:
    """Send, and return the status that is answered, or `HUNG_UP`; without `answered`, leave at once."""
    with connected(port) as peer:
        with contextlib.suppress(ConnectionError):
            peer.sendall(data)
        if not answered:
            leave(peer, reset=reset)
            return HUNG_UP
        got = b""
        with contextlib.suppress(ConnectionError):
            while len(got) < 12 and (piece := peer.recv(65536)):
                got += piece
    return int(got[9:12]) if got.startswith(b"HTTP/1.") else HUNG_UP


def upgraded(port: int, asked: bytes) -> socket.socket:
    """A connection whose upgrade was granted."""
    peer = connected(port)
    peer.sendall(asked)
    answer = b""
    while b"\r\n\r\n" not in answer:
        piece = peer.recv(1)
        assert piece, answer
        answer += piece
    assert answer.startswith(b"HTTP/1.1 101"), answer
    return peer


def ended(peer: socket.socket) -> bool:
    """Whether the server says goodbye, by a close frame or by closing, within `PATIENCE_S`."""
    got = b""
    try:
        while piece := peer.recv(65536):
            got += piece
            if CLOSE in _opcodes(got):
                return True
    except TimeoutError:
        return False
    except ConnectionError:
        pass
    return True


def _opcodes(data: bytes) -> list[int]:
    found = []
    while len(data) >= 2:
        size, skip = data[1], 2
        if size >= 126:
            skip = 4 if size == 126 else 10
            size = int.from_bytes(data[2:skip], "big")
        found.append(data[0] & 15)
        data = data[skip + size :]
    return found
