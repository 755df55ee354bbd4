"""Attacks over the network: slow, silent, garbled and greedy peers. After each, /healthz must answer at once."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import psutil
import pytest

HEALTH_S = 10.0  # two cores shared with others; alone it is about a millisecond
LEFT_S = 30.0  # the promise is about a second; alone it is 0.1 s. The job itself would take 100 s
NOTHING = b""
CLOSE_OPCODE = 8
NO_HELLO = b"No hello within"


@pytest.fixture
def rig(shared_rig) -> Iterator[Any]:
    """The module's supervisor; both of its processes must be the same and well after the test."""
    before = (shared_rig.process.pid, shared_rig.coordinator().pid)
    yield shared_rig
    assert_healthy(shared_rig)
    assert (shared_rig.process.pid, shared_rig.coordinator().pid) == before
    assert "Traceback" not in shared_rig.words(), shared_rig.words()


def assert_healthy(rig: Any) -> None:
    began = time.monotonic()
    answer = httpx.get(f"http://127.0.0.1:{rig.port}/healthz", timeout=HEALTH_S, trust_env=False)
    assert answer.status_code == 200
    assert time.monotonic() - began < HEALTH_S


def talk(rig: Any, data: bytes, first_s: float = 3.0) -> bytes:
    """Send raw bytes and return what comes until the server closes, or is silent for `first_s`, then for 3 s."""
    with socket.create_connection(("127.0.0.1", rig.port), timeout=first_s) as peer:
        got = b""
        with contextlib.suppress(ConnectionError, TimeoutError):
            peer.sendall(data)
            while piece := peer.recv(65536):
                got += piece
                peer.settimeout(3.0)
        return got


def head(rig: Any, line: bytes, *fields: bytes) -> bytes:
    """A request head with our key; `Connection: close`, so that the answer has an end."""
    key = b"Authorization: Bearer " + rig.key().encode()
    return b"\r\n".join([line, b"Host: x", key, *fields, b"", b""])


CHAT = json.dumps({"model": "synthetic", "messages": [{"role": "user", "content": "x"}]}).encode()
POST = b"POST /v1/chat/completions HTTP/1.1"
CLOSE = b"Connection: close"
JSON = b"Content-Type: application/json"
CHUNKED = b"Transfer-Encoding: chunked"
UPGRADE = (
    b"Connection: Upgrade",
    b"Upgrade: websocket",
    b"Sec-WebSocket-Version: 13",
    b"Sec-WebSocket-Key: " + base64.b64encode(b"0123456789abcdef"),
)

# name, request line, header fields, body, beginnings of answers that are right (NOTHING: hung up without one)
RAW: list[tuple[str, bytes, tuple[bytes, ...], bytes, tuple[bytes, ...]]] = [
    ("garbage", b"\x00\xff\xfe\x16\x03\x01 not http", (), b"", (b"HTTP/1.1 400",)),
    ("tls hello", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(32), (), b"", (b"HTTP/1.1 400",)),
    ("http/0.9", b"GET /healthz", (), b"", (b"HTTP/1.1 400", b"HTTP/1.1 200")),
    ("unknown version", b"GET /healthz HTTP/9.9", (CLOSE,), b"", (b"HTTP/1.1 400", b"HTTP/1.1 505")),
    ("unknown method", b"BREW /healthz HTTP/1.1", (CLOSE,), b"", (b"HTTP/1.1 400", b"HTTP/1.1 405")),
    ("h2 preface", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(9), (), b"", (b"HTTP/1.1 400",)),
    (
        "h2c upgrade",
        b"GET /healthz HTTP/1.1",
        (b"Connection: Upgrade, HTTP2-Settings, close", b"Upgrade: h2c", b"HTTP2-Settings: AAMAAABkAAQAAP__"),
        b"",
        (b"HTTP/1.1 200", b"HTTP/1.1 400"),
    ),
    ("chunk size", POST, (CLOSE, JSON, CHUNKED), b"zz\r\nhello\r\n", (b"HTTP/1.1 400", NOTHING)),
    ("chunk too long", POST, (CLOSE, JSON, CHUNKED), b"ffffffffffffffffff\r\nx", (b"HTTP/1.1 400", NOTHING)),
    ("negative chunk", POST, (CLOSE, JSON, CHUNKED), b"-5\r\nhello\r\n0\r\n\r\n", (b"HTTP/1.1 400", NOTHING)),
    ("chunk without end", POST, (CLOSE, JSON, CHUNKED), b"3\r\nabcdef\r\n", (b"HTTP/1.1 400", NOTHING)),
    (
        "length and chunked",
        POST,
        (CLOSE, JSON, CHUNKED, b"Content-Length: 5"),
        b"0\r\n\r\nGET /v1/models HTTP/1.1\r\n\r\n",
        (b"HTTP/1.1 400",),
    ),
    ("two lengths", POST, (CLOSE, JSON, b"Content-Length: 5", b"Content-Length: 6"), b"hello!", (b"HTTP/1.1 400",)),
    ("negative length", POST, (CLOSE, JSON, b"Content-Length: -1"), b"", (b"HTTP/1.1 400",)),
    ("length in words", POST, (CLOSE, JSON, b"Content-Length: five"), b"hello", (b"HTTP/1.1 400",)),
    ("length of an exabyte", POST, (CLOSE, JSON, b"Content-Length: 1152921504606846976"), b"{", (b"HTTP/1.1 413",)),
    ("huge header", b"GET /healthz HTTP/1.1", (CLOSE, b"X-Huge: " + b"h" * 2**20), b"", (b"HTTP/1.1 400", NOTHING)),
    (
        "a hundred thousand headers",
        b"GET /healthz HTTP/1.1",
        (CLOSE, *[b"X-%d: x" % n for n in range(100_000)]),
        b"",
        (b"HTTP/1.1 400", NOTHING),
    ),
    ("huge path", b"GET /" + b"p" * 2**20 + b" HTTP/1.1", (CLOSE,), b"", (b"HTTP/1.1 400", b"HTTP/1.1 404", NOTHING)),
    ("header without colon", b"GET /healthz HTTP/1.1", (CLOSE, b"no colon here"), b"", (b"HTTP/1.1 400",)),
    ("nul in a header", b"GET /healthz HTTP/1.1", (CLOSE, b"X-Nul: a\0b"), b"", (b"HTTP/1.1 400",)),
    ("bare line feeds", b"GET /healthz HTTP/1.1\nHost: x\n\n", (), b"", (b"HTTP/1.1 200", b"HTTP/1.1 400")),
    ("path with nul", b"GET /v1/jobs/%00%ff%fe HTTP/1.1", (CLOSE,), b"", (b"HTTP/1.1 404", b"HTTP/1.1 400")),
    (
        "dots in the path",
        b"GET /v1/blobs/../../../etc/passwd HTTP/1.1",
        (CLOSE,),
        b"",
        (b"HTTP/1.1 403", b"HTTP/1.1 404"),
    ),
    (
        "connect",
        b"CONNECT example.org:443 HTTP/1.1",
        (CLOSE,),
        b"",
        (b"HTTP/1.1 400", b"HTTP/1.1 404", b"HTTP/1.1 405"),
    ),
    ("expect what nobody knows", POST, (CLOSE, JSON, b"Expect: 200-maybe"), b"", (b"HTTP/1.1 4",)),
    ("invalid utf-8 body", POST, (CLOSE, JSON, b"Content-Length: 4"), b"\xff\xfe\xfd\xfc", (b"HTTP/1.1 400",)),
    ("upgrade, no token of a worker", b"GET /v1/worker HTTP/1.1", UPGRADE, b"", (b"HTTP/1.1 401", b"HTTP/1.1 403")),
    ("upgrade of a plain route", b"GET /v1/models HTTP/1.1", UPGRADE, b"", (b"HTTP/1.1 4",)),
    ("upgrade without a key", b"GET /v1/worker HTTP/1.1", (*UPGRADE[:3], CLOSE), b"", (b"HTTP/1.1 4",)),
    ("bytes after the upgrade", b"GET /v1/worker HTTP/1.1", UPGRADE, b"\xff" * 4096, (b"HTTP/1.1 4",)),
]


@pytest.mark.parametrize("case", RAW, ids=[case[0] for case in RAW])
def test_malformed_http_is_answered_or_hung_up_on_and_the_next_request_is_served(rig, case):
    _, line, fields, body, right = case
    data = head(rig, line, *fields) + body if line.endswith((b"HTTP/1.1", b"HTTP/9.9")) else line + b"\r\n\r\n"
    answer = talk(rig, data, 3.0 if NOTHING in right else 30.0)
    assert any(answer.startswith(words) if words else not answer for words in right), answer[:300]
    assert_healthy(rig)


def test_random_bytes_are_survived(rig):
    for _ in range(30):
        talk(rig, os.urandom(2000) + b"\r\n\r\n", 0.2)
    assert_healthy(rig)


def test_a_body_that_comes_byte_by_byte_is_answered_and_holds_nobody_up(rig, rigs):
    request = head(rig, POST, CLOSE, JSON, b"Content-Length: %d" % len(CHAT))
    with socket.create_connection(("127.0.0.1", rig.port), timeout=30) as peer:
        peer.sendall(request)
        for n, byte in enumerate(CHAT):
            peer.sendall(bytes([byte]))
            if n < 3:
                assert_healthy(rig)
                time.sleep(1)  # the attack itself
        answer = b""
        while piece := peer.recv(65536):
            answer += piece
    assert answer.startswith(b"HTTP/1.1 200"), answer[:300]


def test_clients_that_never_read_their_stream_are_not_noticed_by_their_neighbours(rig, rigs):
    """Their jobs run far ahead of them; what is kept for them is bounded, and when they leave it ends."""
    client, coordinator = rig.client(), rig.coordinator()
    before, admin = coordinator.memory_info().rss, made_key(rig, "admin")
    already = chunks_of(client, admin)
    body = json.dumps(rigs.chat("word " * 50, "synthetic-flood", stream=True)).encode()
    with contextlib.ExitStack() as peers:
        for _ in range(2):
            peer = peers.enter_context(socket.socket())
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            peer.connect(("127.0.0.1", rig.port))
            peer.sendall(head(rig, POST, CLOSE, JSON, b"Content-Length: %d" % len(body)) + body)
        rigs.until(lambda: chunks_of(client, admin) > already + 2000, "the engine runs ahead")
        assert_healthy(rig)
        assert client.post("/v1/chat/completions", json=rigs.chat("beside it")).status_code == 200
        assert coordinator.memory_info().rss - before < 100 * 2**20
    rigs.until(lambda: not newest(client, "synthetic-flood", "running"), "their jobs are ended")


def chunks_of(client: httpx.Client, admin: str) -> float:
    """How many chunks the coordinator has passed on since its start."""
    text = client.get("/metrics", headers={"Authorization": f"Bearer {admin}"}).raise_for_status().text
    return sum(float(line.split()[-1]) for line in text.splitlines() if 'event="chunks"' in line)


def test_a_hundred_idle_connections_cost_nothing_but_descriptors(rig, rigs):
    coordinator = rig.coordinator()
    before = coordinator.num_fds()
    idle = [socket.create_connection(("127.0.0.1", rig.port)) for _ in range(100)]
    half = [socket.create_connection(("127.0.0.1", rig.port)) for _ in range(20)]
    for peer in half:
        peer.sendall(b"GET /healthz HT")
    try:
        assert_healthy(rig)
        assert rig.client().post("/v1/chat/completions", json=rigs.chat("x")).status_code == 200
    finally:
        for peer in [*idle, *half]:
            peer.close()
    rigs.until(lambda: coordinator.num_fds() <= before + 3, "the descriptors are given back")


def test_a_client_that_leaves_ends_its_job_within_about_a_second(rig, rigs):
    client = rig.client()
    for stream in (False, True):
        body = json.dumps(rigs.chat(f"leaving {stream}", "synthetic-slow", stream=stream)).encode()
        with socket.create_connection(("127.0.0.1", rig.port)) as peer:
            peer.sendall(head(rig, POST, JSON, b"Content-Length: %d" % len(body)) + body)
            running = rigs.until(lambda: newest(client, "synthetic-slow", "running"), "the job runs")
        began = time.monotonic()
        found = rigs.ended(client, running["id"])
        assert found["state"] == "cancelled"
        assert time.monotonic() - began < LEFT_S
        line = re.compile(rf"llm job cancelled after \S+ s job={running['id']}")
        rigs.until(lambda line=line: line.search(rig.words()), "the worker ended it too")


def newest(client: httpx.Client, model: str, state: str) -> dict[str, Any] | None:
    jobs = client.get("/v1/jobs", params={"limit": 100, "state": state}).json()["data"]
    return next((job for job in jobs if job["model"] == model), None)


# ---- sockets of workers


def made_key(rig: Any, scope: str) -> str:
    """A new key, made by the real command beside the running coordinator."""
    argv = [sys.executable, "-m", "coordinator", "keys", "create", "--scope", scope]
    argv += ["--state", str(rig.state / "coordinator")]
    done = subprocess.run(argv, capture_output=True, text=True, check=True, timeout=60)
    return next(word for word in done.stdout.split() if word.startswith(("bhw_", "bha_")))


@pytest.fixture(scope="module")
def worker_token(shared_rig) -> str:
    """The token of a second worker."""
    return made_key(shared_rig, "worker")


def upgraded(rig: Any, token: str) -> socket.socket:
    peer = socket.create_connection(("127.0.0.1", rig.port), timeout=20)
    fields = [b"Authorization: Bearer " + token.encode(), b"Sec-WebSocket-Protocol: bulkhead.v1", *UPGRADE]
    peer.sendall(b"\r\n".join([b"GET /v1/worker HTTP/1.1", b"Host: x", *fields, b"", b""]))
    answer = b""
    while b"\r\n\r\n" not in answer:
        byte = peer.recv(1)
        assert byte, answer
        answer += byte
    assert answer.startswith(b"HTTP/1.1 101"), answer
    return peer


def frame(opcode: int, payload: bytes, fin: bool = True) -> bytes:
    """A masked frame of a client; the mask is zero."""
    size = len(payload)
    head = bytes([(0x80 if fin else 0) | opcode])
    if size < 126:
        head += bytes([0x80 | size])
    elif size < 65536:
        head += bytes([0x80 | 126]) + size.to_bytes(2, "big")
    else:
        head += bytes([0x80 | 127]) + size.to_bytes(8, "big")
    return head + bytes(4) + payload


def farewell(peer: socket.socket) -> bytes:
    """All that the server says until it says goodbye, by a close frame or by closing. TimeoutError when it does not.

    After its close frame it gives the peer ten seconds to do the same; here is nobody who would.
    """
    peer.settimeout(60)
    got = b""
    with contextlib.suppress(ConnectionError):
        while piece := peer.recv(65536):
            got += piece
            if CLOSE_OPCODE in opcodes(got):
                break
    return got


def opcodes(data: bytes) -> list[int]:
    """Opcodes of a server's short frames."""
    found = []
    while len(data) >= 2 and data[1] < 126:
        found.append(data[0] & 15)
        data = data[2 + data[1] :]
    return found


WORKER_ATTACKS = {
    "text": frame(1, b"hello"),
    "garbage": frame(2, b"\xff\xfe\xfd"),
    "not a map": frame(2, b"\x93\x01\x02\x03"),
    "heartbeat first": frame(2, b"\x82\xa1t\xa9heartbeat\xa1n\x01"),
    "five megabytes": frame(2, b"\x00" * (5 * 2**20)),
    "fragments without end": frame(2, b"\x00" * 2**20, fin=False) + frame(0, b"\x00" * (4 * 2**20), fin=False),
    "unmasked": b"\x82\x03abc",
    "reserved opcode": frame(11, b"x"),
    "reserved bits": b"\xf2\x80\0\0\0\0",
    "long ping": frame(9, b"p" * 200),
    "length of 2^63": b"\x82\xff" + b"\xff" * 8 + bytes(4),
    "deep msgpack": frame(2, b"\x91" * 100_000 + b"\x01"),
    "huge map announced": frame(2, b"\xdf\xff\xff\xff\xff"),
}


@pytest.mark.parametrize("name", WORKER_ATTACKS)
def test_a_worker_that_talks_nonsense_is_hung_up_on(rig, worker_token, name: str):
    with upgraded(rig, worker_token) as peer:
        with contextlib.suppress(ConnectionError):
            peer.sendall(WORKER_ATTACKS[name])
        assert NO_HELLO not in farewell(peer), "it was not for what it said"
    assert_healthy(rig)


def test_workers_that_never_say_hello_are_hung_up_on_even_when_they_ping(rig, worker_token):
    silent, pinging = upgraded(rig, worker_token), upgraded(rig, worker_token)
    over = threading.Event()

    def ping() -> None:
        with contextlib.suppress(OSError):
            while not over.wait(0.5):
                pinging.sendall(frame(9, b""))

    thread = threading.Thread(target=ping)
    thread.start()
    try:
        assert NO_HELLO in farewell(silent)
        assert NO_HELLO in farewell(pinging)
    finally:
        over.set()
        thread.join()
        silent.close()
        pinging.close()


def test_memory_of_the_coordinator_is_bounded_after_all_this(rig):
    assert psutil.Process(rig.coordinator().pid).memory_info().rss < 400 * 2**20
