"""The application as a whole: health, its end, malformed requests, and jobs that outlive it."""

from __future__ import annotations

import socket
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from coordinator.app import Coordinator
from coordinator.server import FAILED, Serving, listen, run
from coordinator.store import StoreBusy
from coordinator.testing import FakeWorker, running
from protocol.link_wire import ModelOffer
from protocol.work import FreeResult

WAIT_S = 60.0


def test_a_job_queued_before_a_restart_is_done_after_it(tmp_path: Path) -> None:
    with running(tmp_path) as first:
        body = {"kind": "x-later", "model": "m", "params": {"n": 1}, "wait_for_worker": True}
        job = httpx.post(first.url + "/v1/jobs", json=body, headers=first.headers).json()["id"]

    def script(offered: Any) -> None:
        offered.started()
        offered.complete(FreeResult(output=offered.params))

    with running(tmp_path) as second:
        offer = ModelOffer(name="m", kinds=("x-later",), engine="fake")
        with FakeWorker(second, (offer,), script), httpx.Client(base_url=second.url, headers=first.headers) as http:
            end = time.monotonic() + WAIT_S
            while http.get(f"/v1/jobs/{job}").json()["state"] != "succeeded":
                assert time.monotonic() < end
                time.sleep(0.02)
            assert http.get(f"/v1/jobs/{job}/result").json() == {"output": {"n": 1}}


async def _broken(_self: object) -> None:
    raise ZeroDivisionError


def test_a_dead_dispatcher_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coordinator.dispatch.Dispatcher.run", _broken)
    with running(tmp_path) as it:
        answer = httpx.get(it.url + "/healthz")
        assert (answer.status_code, answer.json()) == (503, {"status": "failed"})


def test_a_dead_dispatcher_ends_the_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coordinator.dispatch.Dispatcher.run", _broken)
    assert run(Coordinator(tmp_path), listen("127.0.0.1:0"), Serving()) == FAILED


def test_a_part_that_fails_ends_the_server_and_nothing_is_left_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise it would listen on, and do nothing: its dispatcher ends with the others."""
    monkeypatch.setattr("coordinator.progress.ProgressBoard.run", _broken)
    coordinator = Coordinator(tmp_path)
    assert run(coordinator, listen("127.0.0.1:0"), Serving()) == FAILED
    Coordinator(tmp_path).close()


def test_the_store_is_closed_though_the_register_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A store that is left open rings at a database that may have long gone."""
    coordinator = Coordinator(tmp_path)
    close = coordinator._known.register.close

    def fails() -> None:
        close()
        raise OSError("no")

    monkeypatch.setattr(coordinator._known.register, "close", fails)
    with pytest.raises(OSError, match="no"):
        coordinator.close()
    Coordinator(tmp_path).close()


def test_two_coordinators_never_share_a_state_folder(tmp_path: Path) -> None:
    first = Coordinator(tmp_path)
    with pytest.raises(StoreBusy):
        Coordinator(tmp_path)
    first.close()
    Coordinator(tmp_path).close()


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"\0\0\0\0\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET " + b"/" * 100_000 + b" HTTP/1.1\r\n\r\n",
        b"POST /v1/jobs HTTP/1.1\r\ncontent-length: -1\r\n\r\n",
        b"POST /v1/jobs HTTP/1.1\r\ncontent-length: 5\r\ncontent-length: 6\r\n\r\nhello",
        b"POST /v1/jobs HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\nZZZ\r\n",
        b"GET /v1/worker HTTP/1.1\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\ntrailing",
        b"GET /v1/worker HTTP/1.1\r\nconnection: upgrade\r\nupgrade: h2c\r\nhttp2-settings: %%%\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET /%00%ff%2e%2e/ HTTP/1.1\r\nhost: x\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(64),
        b"GET /healthz HTTP/1.1\r\nauthorization: Bearer \xff\xfe\r\nhost: \xff\r\n\r\n",
    ],
)
def test_malformed_requests_leave_it_serving(served: Any, request_bytes: bytes) -> None:
    url = httpx.URL(served.url)
    with socket.create_connection((url.host, url.port or 80), timeout=60) as connection:
        connection.sendall(request_bytes)
        connection.shutdown(socket.SHUT_WR)
        connection.recv(65536)
    assert httpx.get(served.url + "/healthz").status_code == 200


def test_an_odd_key_is_refused_and_not_a_crash(served: Any) -> None:
    for value in (b"Bearer \xff\xfe", b"Bearer " + b"x" * 20_000, b"Bearer bhc_" + b"\xc3\xa9" * 43):
        answer = httpx.get(served.url + "/v1/models", headers=[(b"authorization", value)])
        assert answer.status_code == 401
