"""Malformed upgrades and frames at the door between replicas. After each, both replicas answer, are connected, and a
job that one of them was asked for is done by a worker of the other."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest

from coordinator.replicas import frames
from coordinator.testing import FakeWorker, OfferedJob, Running
from protocol.link_wire import ModelOffer
from tests.coordinator.malformed import (
    FRAMES,
    PATIENCE_S,
    UPGRADES,
    UPGRADING,
    Frames,
    Upgrade,
    ended,
    exchanged,
    head,
    leave,
    upgraded,
)
from tests.coordinator.replicas.rig import SECRET, until

MODEL = ModelOffer(name="x-door", kinds=("x-door",), engine="fake", slots=1)
Two = tuple[Running, Running]


@pytest.fixture(scope="module")
def worker(two: Two) -> Iterator[None]:
    def script(job: OfferedJob) -> None:
        job.started()
        job.complete({"done": True})

    with FakeWorker(two[1], (MODEL,), script, "w-door"):
        yield


@pytest.fixture(autouse=True)
def unharmed(two: Two, worker: None) -> Iterator[None]:
    yield
    for one in two:
        assert httpx.get(f"{one.url}/healthz", trust_env=False).status_code == 200
        replicas = one.coordinator.replicas
        assert replicas is not None
        until(lambda replicas=replicas: any(peer.connected for peer in replicas.peers))
    asked = {"kind": "x-door", "model": "x-door", "wait": PATIENCE_S - 10, "wait_for_worker": True}
    done = httpx.post(f"{two[0].url}/v1/jobs", json=asked, headers=two[0].headers, timeout=PATIENCE_S, trust_env=False)
    assert done.json().get("state") == "succeeded", done.text


def knock(one: Running, known: bool, fields: tuple[bytes, ...]) -> tuple[int, bytes]:
    """The door's port, and a request for an upgrade."""
    replicas = one.coordinator.replicas
    assert replicas is not None
    names = (f"{frames.FROM}: gw_malformed".encode(), f"{frames.TO}: {replicas.name}".encode())
    port = int(replicas._doorway.url.rpartition(":")[2])
    return port, head(f"GET {frames.PATH} HTTP/1.1", *names, *fields, key=SECRET if known else "nobody")


@pytest.mark.parametrize("case", UPGRADES, ids=[case.name for case in UPGRADES])
def test_a_malformed_upgrade_is_refused_or_ended(two: Two, case: Upgrade) -> None:
    port, asked = knock(two[0], case.known, case.fields)
    status = exchanged(port, asked + case.after, answered=bool(case.right), reset=case.reset)
    assert not case.right or status in case.right


@pytest.mark.parametrize("case", FRAMES, ids=[case.name for case in FRAMES])
def test_malformed_frames_end_their_own_connection(two: Two, case: Frames) -> None:
    port, asked = knock(two[0], True, UPGRADING)
    with upgraded(port, asked) as peer:
        peer.sendall(case.data)
        if case.gone:
            leave(peer, reset=case.reset)
        else:
            assert ended(peer), "the connection goes on"
