"""`/v1/workers`: seen and ordered about by an admin, over real sockets."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import httpx
import msgspec
import pytest

from coordinator import workers_api
from coordinator.testing import Running
from coordinator.testing_link import CHAT, PATIENCE_S, RawWorker
from protocol import link_wire as wire

EXT = msgspec.msgpack.Ext(5, b"x")


@pytest.fixture
def admin(served: Running) -> Iterator[httpx.Client]:
    key = served.coordinator.keys.create("admin", name="boss")
    with httpx.Client(base_url=served.url, headers={"authorization": f"Bearer {key}"}, timeout=60) as client:
        yield client


@pytest.fixture
def worker(served: Running) -> Iterator[RawWorker]:
    port = int(served.url.rpartition(":")[2])
    with RawWorker(port, "raw-1", served.worker_token) as worker:
        worker.hello(CHAT)
        yield worker


def of(admin: httpx.Client, name: str) -> dict[str, object]:
    """What the list says of one worker."""
    return next(one for one in admin.get("/v1/workers").json()["data"] if one["id"] == name)


def test_workers_are_listed_with_their_gpus(admin: httpx.Client, worker: RawWorker) -> None:
    worker.send(wire.Heartbeat(n=1, gpus=(wire.GpuState(uuid="GPU-a", busy=0.25, free_bytes=7),)))
    worker.expect(wire.HeartbeatAck)
    seen = of(admin, "raw-1")
    assert seen["models"] == ["chat"]
    (gpu,) = seen["gpus"]  # type: ignore[misc]
    assert (gpu["uuid"], gpu["busy"], gpu["free_bytes"]) == ("GPU-a", 0.25, 7)


def test_verbs_reach_the_worker(admin: httpx.Client, worker: RawWorker) -> None:
    assert admin.post("/v1/workers/raw-1/pause", json={"reason": "lunch", "for_s": 60}).status_code == 202
    assert worker.expect(wire.Pause).body == wire.Pause(reason="lunch", for_ms=60_000)
    assert admin.post("/v1/workers/raw-1/resume").status_code == 202
    worker.expect(wire.Resume)
    assert admin.post("/v1/workers/raw-1/drain").status_code == 202
    worker.expect(wire.Drain)
    assert admin.post("/v1/workers/raw-1/shutdown", json={"reason": "moving"}).status_code == 202
    assert worker.expect(wire.ShutdownWorker).body == wire.ShutdownWorker(reason="moving")


@pytest.mark.parametrize(("ok", "status"), [(True, 200), (False, 409)])
def test_an_order_is_answered_by_the_worker(admin: httpx.Client, worker: RawWorker, ok: bool, status: int) -> None:
    answers: list[httpx.Response] = []
    order = {"verb": "log_level", "arguments": {"level": "debug"}}
    asking = threading.Thread(target=lambda: answers.append(admin.post("/v1/workers/raw-1/order", json=order)))
    asking.start()
    asked = worker.expect(wire.Order).body
    assert isinstance(asked, wire.Order)
    assert (asked.verb, asked.arguments) == ("log_level", {"level": "debug"})
    worker.send(wire.OrderDone(id="another", ok=True))  # nobody waits for it
    worker.send(wire.OrderDone(id=asked.id, ok=ok, message="Done."))
    asking.join(PATIENCE_S)
    assert answers[0].status_code == status
    assert answers[0].json()["message"] == "Done."


def test_an_answer_that_cannot_be_shown_is_none_and_keeps_nobody_waiting(
    admin: httpx.Client, worker: RawWorker
) -> None:
    answers: list[httpx.Response] = []
    asking = threading.Thread(
        target=lambda: answers.append(admin.post("/v1/workers/raw-1/order", json={"verb": "probe"}))
    )
    asking.start()
    asked = worker.expect(wire.Order).body
    assert isinstance(asked, wire.Order)
    worker.send(wire.OrderDone(id="another", ok=True, detail={"a": EXT}))  # nobody waits for it
    worker.send(wire.OrderDone(id=asked.id, ok=True, message="Done.", detail={"a": EXT}))
    asking.join(PATIENCE_S)
    assert answers[0].status_code == 409
    assert answers[0].json()["message"] == "The worker's answer cannot be shown: detail: It cannot be said in JSON."


def test_a_worker_that_does_not_answer(admin: httpx.Client, worker: RawWorker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers_api.give, "__defaults__", (0.1,))
    began = time.monotonic()
    answer = admin.post("/v1/workers/raw-1/order", json={"verb": "probe"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "no_worker")
    assert time.monotonic() - began < PATIENCE_S


def test_a_worker_of_an_older_revision_is_not_given_what_it_does_not_know(admin: httpx.Client, served: Running) -> None:
    with RawWorker(int(served.url.rpartition(":")[2]), "raw-old", served.worker_token) as old:
        old.send(wire.Hello(worker="raw-old", low=1, high=1, capabilities=wire.Capabilities(models=(CHAT,))))
        old.expect(wire.Welcome)
        answer = admin.post("/v1/workers/raw-old/order", json={"verb": "probe"})
        assert (answer.status_code, "update it" in answer.json()["error"]["message"]) == (400, True)
        assert admin.post("/v1/workers/raw-old/drain").status_code == 202
        old.expect(wire.Drain)


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/v1/workers/nobody/pause", {}, 404),
        ("/v1/workers/raw-1/pause", {"fro_s": 1}, 400),
        ("/v1/workers/raw-1/pause", {"for_s": -1}, 400),
        ("/v1/workers/raw-1/order", {}, 400),
    ],
)
def test_wrong_requests_are_named(
    admin: httpx.Client, worker: RawWorker, path: str, body: dict[str, object], status: int
) -> None:
    assert admin.post(path, json=body).status_code == status


def test_a_client_key_sees_and_orders_nothing(http: httpx.Client, worker: RawWorker) -> None:
    for answer in (http.get("/v1/workers"), http.post("/v1/workers/raw-1/drain")):
        assert answer.status_code == 403
        assert "--scope admin" in answer.json()["error"]["message"]
