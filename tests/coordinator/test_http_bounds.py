"""Heads without an end."""

from __future__ import annotations

import socket
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest

from coordinator import http_bounds, server
from coordinator.testing import FakeWorker, running
from protocol.link_wire import ModelOffer
from protocol.work import Delta, FreeResult, LlmChunk


def connect(served: Any) -> socket.socket:
    url = httpx.URL(served.url)
    return socket.create_connection((url.host, url.port or 80), timeout=60)


@pytest.mark.parametrize("piece", [b"x" * 4096, b"x-%d: y\r\n" * 400])
def test_a_head_without_an_end_is_refused(served: Any, piece: bytes) -> None:
    with connect(served) as connection:
        connection.sendall(b"GET /healthz HTTP/1.1\r\nx: ")
        answer = b""
        try:
            for _ in range(4096):
                connection.sendall(piece)
        except (BrokenPipeError, ConnectionResetError):
            answer = b"closed"
        else:
            answer = connection.recv(100)
        assert answer == b"closed" or answer.startswith(b"HTTP/1.1 400")
    assert httpx.get(served.url + "/healthz").status_code == 200


def test_a_head_that_never_ends_is_hung_up_on(served: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_bounds, "HEAD_S", 0.2)
    with connect(served) as connection:
        connection.sendall(b"GET /healthz HTTP/1.1\r\nx: y\r\n")
        assert connection.recv(100) == b""


def test_a_later_head_that_never_ends_is_hung_up_on(served: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with connect(served) as connection:
        connection.sendall(b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n")
        answer = b""
        while not answer.endswith(b"}"):
            answer += connection.recv(1000)
        monkeypatch.setattr(http_bounds, "HEAD_S", 0.2)
        connection.sendall(b"GET /healthz HTTP/1.1\r\nx: y\r\n")
        assert connection.recv(100) == b""


def test_large_bodies_and_many_requests_are_not_counted(served: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with httpx.Client(base_url=served.url, headers=served.headers) as client:
        for _ in range(3):
            body = {"model": "m", "input": "x" * 500_000}
            assert client.post("/v1/embeddings", json=body).status_code in (404, 503)
            assert client.get("/healthz", headers={"x": "y" * 40_000}).status_code == 200


def test_a_workers_connection_outlives_the_clock_of_its_head(
    served: Any, serve: Any, http: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_bounds, "HEAD_S", 2.0)  # a busy machine gets its time for the heads of this test

    def script(job: Any) -> None:
        job.started()
        job.complete(FreeResult())

    serve(script, "lasting", "x-lasting")
    # A job that nobody takes is the bounded wait: its answer comes after the clock would have struck.
    idle = {"kind": "x-nobody", "model": "nobody", "wait_for_worker": True, "wait": 2.5}
    assert http.post("/v1/jobs", json=idle).json()["state"] == "queued"
    body = {"kind": "x-lasting", "model": "lasting", "wait": 30}
    assert http.post("/v1/jobs", json=body).json()["state"] == "succeeded"


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="only Linux cuts off peers that read nothing")
def test_a_client_that_reads_nothing_is_cut_off_and_its_job_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "DEAD_PEER_S", 1.0)
    cancelled = threading.Event()

    def script(job: Any) -> None:
        job.started()
        while not job.cancelled.wait(0.002):
            job.chunk(LlmChunk(delta=Delta(content="x" * 50_000)))
        cancelled.set()

    body = b'{"model": "flood", "stream": true, "messages": [{"role": "user", "content": "x"}]}'
    with running(tmp_path) as served, socket.socket() as peer:
        offer = ModelOffer(name="flood", kinds=("llm",), engine="fake", slots=1)
        with FakeWorker(served, (offer,), script, "flooder"):
            url = httpx.URL(served.url)
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            peer.connect((url.host, url.port or 80))
            fields = [f"{name}: {value}".encode() for name, value in served.headers.items()]
            length = b"Content-Length: %d" % len(body)
            peer.sendall(b"\r\n".join([b"POST /v1/chat/completions HTTP/1.1", b"Host: x", length, *fields, b"", body]))
            assert cancelled.wait(60)
