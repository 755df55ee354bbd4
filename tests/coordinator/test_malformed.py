"""Malformed HTTP and malformed WebSockets at every door of a running coordinator.

After each case /healthz answers, a job is done, and nothing was logged that somebody would have to look at.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator

import httpx
import pytest

from coordinator.studio.wire import SUBPROTOCOL
from coordinator.testing import FakeWorker, OfferedJob, Running, running
from coordinator.testing_studio import BASE, Admitted
from protocol.link_wire import ModelOffer
from protocol.revision import LINK_SUBPROTOCOL
from tests.coordinator.malformed import (
    FRAMES,
    PATIENCE_S,
    REQUESTS,
    UPGRADES,
    UPGRADING,
    Frames,
    Request,
    Upgrade,
    ended,
    exchanged,
    head,
    leave,
    upgraded,
)

MODEL = ModelOffer(name="x-any", kinds=("x-any",), engine="fake", slots=1)


class Attacked:
    """A coordinator, one worker that does its jobs, and how its doors are knocked at."""

    def __init__(self, there: Running) -> None:
        self.there, self.port = there, int(there.url.rpartition(":")[2])
        self.studio = Admitted(there.url, there.coordinator.keys.create("admin", name="boss"))
        self.client = httpx.Client(base_url=there.url, headers=there.headers, timeout=PATIENCE_S, trust_env=False)

    def asked(self, door: str, known: bool, fields: tuple[bytes, ...]) -> bytes:
        """A request for an upgrade at a door."""
        if door == "worker":
            path, key, protocol = "/v1/worker", self.there.worker_token, LINK_SUBPROTOCOL
        else:
            path, key, protocol = f"{BASE}/workers/{self.studio.id}/connect", self.studio.token, SUBPROTOCOL
        subprotocol = f"Sec-WebSocket-Protocol: {protocol}".encode()
        return head(f"GET {path} HTTP/1.1", subprotocol, *fields, key=key if known else "nobody")


@pytest.fixture(scope="module")
def attacked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Attacked]:
    def script(job: OfferedJob) -> None:
        job.started()
        job.complete({"done": True})

    with running(tmp_path_factory.mktemp("attacked")) as there, FakeWorker(there, (MODEL,), script):
        it = Attacked(there)
        with it.client:
            yield it


@pytest.fixture(autouse=True)
def unharmed(attacked: Attacked, caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """What must hold after each case."""
    with caplog.at_level(logging.WARNING):
        yield
        assert attacked.client.get("/healthz").status_code == 200
        done = attacked.client.post("/v1/jobs", json={"kind": "x-any", "model": "x-any", "wait": 30})
        assert done.json().get("state") == "succeeded", done.text
    wrong = [record.getMessage() for record in caplog.records if record.exc_info or record.levelno >= logging.ERROR]
    assert not wrong, wrong


@pytest.mark.parametrize("case", REQUESTS, ids=[case.name for case in REQUESTS])
def test_a_malformed_request_is_refused_or_hung_up_on(attacked: Attacked, case: Request) -> None:
    data = case.data.replace(b"{KEY}", attacked.there.key.encode())
    status = exchanged(attacked.port, data, answered=bool(case.right), reset=case.reset)
    assert not case.right or status in case.right


@pytest.mark.parametrize("door", ["worker", "studio"])
@pytest.mark.parametrize("case", UPGRADES, ids=[case.name for case in UPGRADES])
def test_a_malformed_upgrade_is_refused_or_ended(attacked: Attacked, door: str, case: Upgrade) -> None:
    data = attacked.asked(door, case.known, case.fields) + case.after
    status = exchanged(attacked.port, data, answered=bool(case.right), reset=case.reset)
    assert not case.right or status in case.right


@pytest.mark.parametrize("door", ["worker", "studio"])
@pytest.mark.parametrize("case", FRAMES, ids=[case.name for case in FRAMES])
def test_malformed_frames_end_their_own_connection(attacked: Attacked, door: str, case: Frames) -> None:
    with upgraded(attacked.port, attacked.asked(door, True, UPGRADING)) as peer:
        peer.sendall(case.data)
        if case.gone:
            leave(peer, reset=case.reset)
        else:
            assert ended(peer), "the session goes on"
