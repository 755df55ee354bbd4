"""`/v1/deployments` over real sockets: asked for by an admin, carried out by a worker, used by a client."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from coordinator.testing import Running, running
from coordinator.testing_link import CHAT, RawWorker
from protocol import link_wire as wire

PATIENCE_S = 60.0
SOURCE = {"source": "https://models.test/chat.gguf", "sha256": "a" * 64}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A coordinator that knows the workers of these tests only."""
    with running(tmp_path_factory.mktemp("deploy")) as it:
        yield it


@pytest.fixture
def admin(served: Running) -> Iterator[httpx.Client]:
    key = served.coordinator.keys.create("admin", name="boss")
    with httpx.Client(base_url=served.url, headers={"authorization": f"Bearer {key}"}, timeout=PATIENCE_S) as client:
        yield client
        client.delete("/v1/deployments/big")


@pytest.fixture
def worker(served: Running) -> Iterator[RawWorker]:
    port = int(served.url.rpartition(":")[2])
    with RawWorker(port, "raw-1", served.worker_token) as worker:
        worker.hello(CHAT, deploys=True)
        yield worker


def offered(model: str) -> wire.ModelOffer:
    return wire.ModelOffer(name=model, kinds=CHAT.kinds, engine=CHAT.engine, slots=1)


def until(admin: httpx.Client, wanted: dict[str, Any]) -> dict[str, Any]:
    """The deployment once it says all of this; each question is answered by the store, so no pause is needed."""
    end = time.monotonic() + PATIENCE_S
    while True:
        shown: dict[str, Any] = admin.get("/v1/deployments/big").json()
        if wanted.items() <= shown.items():
            return shown
        assert time.monotonic() < end, f"{shown} never said {wanted}"


def test_a_model_is_deployed_used_renewed_and_given_up(
    admin: httpx.Client, http: httpx.Client, worker: RawWorker
) -> None:
    made = admin.put("/v1/deployments/big", json={**SOURCE, "replicas": 1, "engine": "llm"})
    assert made.status_code == 201, made.text
    asked = worker.expect(wire.Order).body
    assert isinstance(asked, wire.Order)
    first = asked.arguments["name"]
    assert (asked.verb, asked.arguments["source"], asked.arguments["sha256"]) == (
        "serve",
        SOURCE["source"],
        SOURCE["sha256"],
    )
    early = http.post("/v1/chat/completions", json={"model": "big", "messages": [{"role": "user", "content": "hi"}]})
    assert early.status_code == 503
    assert "being deployed" in early.json()["error"]["message"]
    assert "retry-after" in early.headers
    worker.send(wire.Announce(capabilities=wire.Capabilities(models=(CHAT, offered(first)), deploys=True)))
    worker.send(wire.OrderDone(id=asked.id, ok=True))
    shown = until(admin, {"ready": 1, "wanted": 1, "serving": made.json()["revision"]})
    assert shown["workers"] == [{"worker": "raw-1", "revision": made.json()["revision"], "state": "ready", "why": ""}]
    listed = [model["id"] for model in http.get("/v1/models").json()["data"]]
    assert "big" in listed
    assert first not in listed
    job = http.post("/v1/jobs", json={"kind": "llm", "model": "big", "params": {"prompt": "hi"}})
    assert job.status_code in (200, 201, 202), job.text
    offer = worker.take()
    assert isinstance(offer.body, wire.Offer)
    assert offer.body.model == first
    worker.complete(offer)
    assert admin.delete("/v1/deployments/big").status_code == 202
    goes = worker.expect(wire.Order).body
    assert isinstance(goes, wire.Order)
    assert (goes.verb, goes.arguments) == ("unserve", {"name": first})
    worker.send(wire.Announce(capabilities=wire.Capabilities(models=(CHAT,), deploys=True)))
    worker.send(wire.OrderDone(id=goes.id, ok=True))
    end = time.monotonic() + PATIENCE_S
    while admin.get("/v1/deployments/big").status_code != 404:
        assert time.monotonic() < end, "it never went"


def test_who_was_not_chosen_is_told_why(admin: httpx.Client, worker: RawWorker) -> None:
    answer = admin.put("/v1/deployments/big", json={**SOURCE, "on": {"gpu": "L40S"}})
    assert answer.status_code == 201
    shown = until(admin, {"ready": 0, "not_chosen_total": 1})
    assert shown["not_chosen"] == [{"worker": "raw-1", "why": "it has no GPU, and gpu=L40S is wanted"}]


def test_what_is_left_out_stays(admin: httpx.Client) -> None:
    admin.put("/v1/deployments/big", json={**SOURCE, "replicas": 2, "on": {"room": "cellar"}})
    changed = admin.put("/v1/deployments/big", json={"replicas": 5})
    assert changed.status_code == 200
    assert (changed.json()["wanted"], changed.json()["on"], changed.json()["sha256"]) == (
        5,
        {"room": "cellar"},
        SOURCE["sha256"],
    )


@pytest.mark.parametrize(
    ("body", "word"),
    [
        ({}, "source"),
        ({"source": "owner/repo"}, "sha256"),
        ({**SOURCE, "sha256": "abc"}, "sha256"),
        ({**SOURCE, "replicas": -1}, "replicas"),
        ({**SOURCE, "replica": 1}, "replica"),
        ({**SOURCE, "source": "/models/x.gguf"}, "source"),
        ({**SOURCE, "name": "other"}, "name"),
        ([], "object"),
    ],
)
def test_wrong_requests_name_the_field(admin: httpx.Client, body: object, word: str) -> None:
    answer = admin.put("/v1/deployments/big", json=body)
    assert answer.status_code == 400
    assert word in answer.json()["error"]["message"]


def test_names_are_bounded_and_unknown_ones_not_found(admin: httpx.Client) -> None:
    assert admin.put("/v1/deployments/a@b", json=SOURCE).status_code == 400
    assert admin.get("/v1/deployments/none").status_code == 404
    assert admin.delete("/v1/deployments/none").status_code == 404


def test_only_admins_deploy(http: httpx.Client) -> None:
    for answer in (http.get("/v1/deployments"), http.put("/v1/deployments/big", json=SOURCE)):
        assert answer.status_code == 403
