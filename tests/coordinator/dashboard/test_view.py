"""Rows of the dashboard: what is in them, what is cut, and what never gets in."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from coordinator.dashboard import view
from coordinator.fleet import Fleet, HeldAttempt, Worker
from coordinator.records import AttemptRecord, JobRecord, WorkerView
from coordinator.registrations import Registration
from coordinator.store.vitals import StoreVitals
from coordinator.store.watch import QueueLoad
from coordinator.vitals import Sample
from protocol.faults import Fault
from protocol.link_wire import Body, Capabilities, Gpu, GpuState, ModelOffer

LONG = "x" * 10_000


class NoPort:
    def send(self, body: Body, job: str = "", attempt: int = 0) -> None:
        raise AssertionError

    def close(self, code: str, message: str) -> None:
        raise AssertionError


def worker(name: str = "w", *models: ModelOffer, **told: Any) -> Worker:
    return Worker(name, NoPort(), Capabilities(models=models, **told))


def chat(**more: Any) -> ModelOffer:
    return ModelOffer(name="chat", kinds=("llm",), engine="fake", slots=2, **more)


def test_states_of_a_worker() -> None:
    one = worker("w", chat())
    assert view.worker_row(one, 0.0)["state"] == "idle"
    one.attempts["j", 1] = HeldAttempt("j", 1, "llm", "chat", "running")
    row = view.worker_row(one, 0.0)
    assert (row["state"], row["running"], row["slots"], row["jobs"]) == ("busy", 1, 2, ["j"])
    one.capabilities = Capabilities(accepting=False, reason="a game")
    assert (view.worker_row(one, 0.0)["state"], view.worker_row(one, 0.0)["reason"]) == ("paused", "a game")
    one.draining = True
    row = view.worker_row(one, 0.0)
    assert (row["state"], "finishes what it has" in row["reason"]) == ("draining", True)


def test_what_a_worker_declines_for_a_while_is_shown_until_then() -> None:
    one = worker("w", chat())
    one.block("chat", 10.0)
    one.block("", 5.0)
    assert view.worker_row(one, 1.0)["declined"] == ["all", "chat"]
    assert view.worker_row(one, 6.0)["declined"] == ["chat"]
    assert view.worker_row(one, 11.0)["declined"] == []


def test_why_a_worker_rests_is_said_of_it_and_of_the_queue() -> None:
    fleet, one, other = Fleet(), worker("w", chat()), worker("other", chat())
    fleet.add(one)
    fleet.add(other)  # the only one that could have a job would not rest
    rows = view.WorkerRows()
    assert rows([one], 1.0)["w"]["resting"] == []
    for n in range(3):
        held = HeldAttempt(f"j{n}", 1, "llm", "chat", "running")
        fleet.failed(one, held, Fault("engine_failed", "It broke."), 1.0)
    (why,) = rows([one], 1.0)["w"]["resting"]
    assert why.startswith("chat: 3 tries in a row failed, the last with engine_failed")
    loads = [QueueLoad(kind="llm", model="chat", waiting=3)]
    assert view.queues(loads, fleet, 1.0)["llm/chat"]["why"] == ""
    fleet.remove(other)
    assert "rests" in view.queues(loads, fleet, 1.0)["llm/chat"]["why"]
    assert view.queues(loads, fleet, 100.0)["llm/chat"]["why"] == ""
    one.view = fleet.views(1.0)[0]  # as another replica shows it
    assert rows([one], 1.0)["w"]["resting"] == [why]


def test_gpus_are_what_was_announced_with_the_last_heartbeat() -> None:
    one = worker("w", gpus=(Gpu("a", "Card", 24 * 2**30, 2**30), Gpu("b", "Card", 8 * 2**30)))
    one.gpus = (GpuState("a", 2**30 + 5, 0.256, 61.4, 180.2), GpuState("c", None, None, None, None))
    first, second, third = view.gpus(one)
    assert first == {
        "uuid": "a",
        "name": "Card",
        "total_bytes": 24 * 2**30,
        "free_bytes": 2**30,
        "busy": 0.26,
        "temperature_c": 61,
        "power_w": 180,
    }
    assert (second["free_bytes"], second["temperature_c"]) == (None, None)
    assert (third["uuid"], third["total_bytes"]) == ("c", 0)


def test_a_worker_of_another_replica_is_shown_as_that_one_told() -> None:
    one = worker("w", chat(), gpus=(Gpu("a", "Card", 2**30),))
    seen = (GpuState("a", busy=1.0),)
    one.view = WorkerView(id="w", accepting=True, reason="", running=2, slots=2, models=("chat",), gpus=seen)
    row = view.worker_row(one, 0.0)
    assert (row["state"], row["running"], row["gpus"][0]["busy"]) == ("busy", 2, 1.0)


def test_whatever_others_choose_is_bounded() -> None:
    models = tuple(chat(sandbox={LONG: LONG}, device=LONG) for _ in range(1000))
    gpus = tuple(Gpu(str(n), LONG, 1) for n in range(1000))
    one = worker("w", *models, gpus=gpus, labels={str(n): LONG for n in range(1000)}, reason=LONG, machine=LONG)
    one.gpus = tuple(GpuState(str(n + 500)) for n in range(1000))
    assert len(msgspec.json.encode(view.worker_row(one, 0.0))) < 100_000
    many = [worker(f"w{n:05}") for n in range(view.MOST_WORKERS + 5)]
    many[-1].draining = True
    rows = view.WorkerRows()(many, 0.0)
    assert len(rows) == view.MOST_WORKERS
    assert many[-1].id in rows  # what needs a look is not what is left out


def test_a_row_is_made_anew_only_when_something_changed() -> None:
    rows, one = view.WorkerRows(), worker("w", chat())
    first = rows([one], 0.0)["w"]
    assert rows([one], 1.0)["w"] is first

    def changed() -> dict[str, Any]:
        nonlocal first
        before, first = first, rows([one], 1.0)["w"]
        assert first == view.worker_row(one, 1.0) != before
        assert rows([one], 1.0)["w"] is first
        return first

    one.gpus = (GpuState("a", busy=1.0),)
    assert changed()["gpus"]
    one.attempts["j", 1] = HeldAttempt("j", 1, "llm", "chat", "running")
    assert changed()["jobs"] == ["j"]
    one.block("chat", 2.0)
    assert changed()["declined"] == ["chat"]
    assert rows([one], 3.0)["w"]["declined"] == []
    first = rows([one], 1.0)["w"]
    one.capabilities = Capabilities(accepting=False)
    assert changed()["state"] == "paused"
    one.draining = True
    assert changed()["state"] == "draining"
    assert rows([], 1.0) == {}


def test_the_queue_has_what_waits_and_what_is_served() -> None:
    fleet = Fleet()
    fleet.add(worker("w1", chat()))
    fleet.add(worker("w2", chat()))
    loads = [
        QueueLoad(kind="llm", model="chat", waiting=3, running=1, oldest_ms=7),
        QueueLoad(kind="image", model="draw", waiting=1, oldest_ms=9),
    ]
    rows = view.queues(loads, fleet)
    served, unserved = rows["llm/chat"], rows["image/draw"]
    assert (served["waiting"], served["running"], served["workers"], served["slots"], served["why"]) == (3, 1, 2, 4, "")
    assert (unserved["workers"], "not served here" in unserved["why"]) == (0, True)
    for one in fleet.workers.values():
        one.draining = True
    assert "paused or draining" in view.queues(loads, fleet)["llm/chat"]["why"]
    idle = view.queues([], fleet)["llm/chat"]
    assert (idle["waiting"], idle["workers"], idle["oldest_ms"]) == (0, 2, 0)


def test_queues_are_bounded_and_the_fullest_stay() -> None:
    loads = [QueueLoad(kind="llm", model=f"m{n}", waiting=n) for n in range(view.MOST_QUEUES + 10)]
    rows = view.queues(loads, Fleet())
    assert len(rows) == view.MOST_QUEUES
    assert f"llm/m{view.MOST_QUEUES + 9}" in rows


def test_a_job_is_shown_without_what_it_was_asked_and_answered() -> None:
    record = JobRecord(
        id="job_1",
        kind="llm",
        model="chat",
        state="failed",
        tenant="t",
        attempt=2,
        created_ms=1,
        params=b"a prompt",
        result=b"an answer",
        idempotency_key="an order number",
        labels={"team": "x"},
        usage={"completion_tokens": 5.0},
        fault=Fault("engine_failed", LONG),
    )
    row = view.job_row(record)
    text = msgspec.json.encode(row)
    for secret in (b"a prompt", b"an answer", b"an order number"):
        assert secret not in text
    assert (row["fault"]["owner"], len(row["fault"]["message"]), row["labels"]) == ("engine", 300, {"team": "x"})
    attempt = AttemptRecord(n=1, worker="w", began_ms=1, ended_ms=2, outcome="failed", fault=record.fault)
    assert view.attempt_row(attempt)["fault"]["code"] == "engine_failed"


def told_to_serve(name: str, *workers: dict[str, str], **more: Any) -> dict[str, Any]:
    """As the API tells it."""
    told = {"name": name, "source": LONG, "engine": "llama", "on": {"gpu": LONG}, "revision": "0a1b", "serving": ""}
    told |= {"wanted": 3, "ready": 1, "leaving": False, "workers": workers, "not_chosen": [], "not_chosen_total": 0}
    return told | more


def test_a_deployment_says_who_is_not_ready_first_and_why() -> None:
    ready = {"worker": "a", "revision": "0a1b", "state": "ready", "why": ""}
    failed = {"worker": "b", "revision": "0a1b", "state": "failed", "why": LONG}
    others = [{"worker": f"w{n}", "why": LONG} for n in range(500)]
    told = told_to_serve("chat", ready, failed, not_chosen=others, not_chosen_total=700)
    row = view.deployments([told])["chat"]
    assert [one["worker"] for one in row["workers"]] == ["b", "a"]
    assert (row["wanted"], row["ready"], row["workers_total"], row["not_chosen_total"]) == (3, 1, 2, 700)
    assert len(msgspec.json.encode(row)) < 30_000
    assert len(view.deployments(told_to_serve(f"m{n}") for n in range(500))) == view.MOST_DEPLOYMENTS


def test_who_asks_to_be_let_in_is_bounded() -> None:
    def asks(n: int) -> Registration:
        return Registration(
            id=f"r{n}",
            state="pending",
            install=LONG,
            address="10.0.0.7",
            machine=LONG,
            user=LONG,
            agent=LONG,
            secret_begins="0a",
            created_ms=n,
            seen_ms=n,
            models=[LONG] * 1000,
        )

    rows = view.pending(map(asks, range(200)))
    assert len(rows) == view.MOST_PENDING
    assert len(msgspec.json.encode(rows["r0"])) < 20_000
    assert "seen_ms" not in rows["r0"]


# ---- trouble


@pytest.mark.parametrize(
    ("gauges", "words"),
    [
        ({}, None),
        ({"oldest_transaction_seconds": 59.0, "idle_in_transaction_seconds": 59.0}, None),
        ({"oldest_transaction_seconds": 130.0, "idle_in_transaction_seconds": 0.0}, "for 2 min: the queue"),
        ({"oldest_transaction_seconds": 61.0, "idle_in_transaction_seconds": 60.5}, "for 1 min, and one of them does"),
    ],
)
def test_a_long_transaction_is_told(gauges: dict[str, float], words: str | None) -> None:
    store = StoreVitals(waiting=(), batches={}, usage_pending=0, gauges=gauges)
    told = view.trouble(Sample(store=store))
    assert (words in told["transaction"]["message"]) if words else told == {}
    assert view.trouble(Sample()) == {}, "of a store that does not answer the feed says so"
