"""The workers of two replicas are one fleet: who declines at one leaves the job to the other, and loaded come first."""

from __future__ import annotations

import asyncio
import itertools
import threading
from typing import Any

import httpx
import msgspec
import pytest
from anyio import current_time

from coordinator import fleet, quarantine, refusals
from coordinator.replicas import frames
from coordinator.testing import FakeWorker, OfferedJob, Running
from protocol import link_wire as wire
from protocol.faults import Fault
from tests.coordinator.replicas.rig import PATIENCE_S, until

_numbers = itertools.count(1)
Two = tuple[Running, Running]
MESSAGES = [{"role": "user", "content": "x"}]
LONG_S = 3600.0


@pytest.fixture
def model() -> str:
    """A name that no other test has."""
    return f"placed{next(_numbers)}"


def offers(model: str, slots: int = 4, *, resident: bool = False) -> tuple[wire.ModelOffer, ...]:
    return (wire.ModelOffer(name=model, kinds=("llm",), engine="fake", slots=slots, resident=resident),)


def answers(job: OfferedJob) -> None:
    job.started()
    job.complete({"content": "ok"})


class Decliner(FakeWorker):
    """Takes no offer."""

    said = wire.Decline(code="too_large", reason="The prompt exceeds this worker's context.")

    def _work(self, job: OfferedJob) -> None:
        self.send(self.said, job.id, job.attempt)


class Busy(Decliner):
    """Takes none for now."""

    said = wire.Decline(code="busy", reason="Something else runs.", retry_after_ms=60_000)


def known(at: Running, *workers: str) -> None:
    """Wait until a replica knows of these workers of the other one."""
    found = at.coordinator.parts.dispatcher.attempts.fleet
    until(lambda: {one.id for one in list(found.elsewhere())} >= set(workers))


def submit(at: Running, model: str) -> str:
    body = {"kind": "llm", "model": model, "params": {"messages": MESSAGES}}
    answer = httpx.post(f"{at.url}/v1/jobs", json=body, headers=at.headers, timeout=PATIENCE_S)
    assert answer.status_code < 300, answer.text
    job: str = answer.json()["id"]
    return job


def row(at: Running, job: str) -> dict[str, Any]:
    found: dict[str, Any] = httpx.get(f"{at.url}/v1/jobs/{job}", headers=at.headers, timeout=PATIENCE_S).json()
    return found


def ended(at: Running, job: str) -> dict[str, Any]:
    """The job when it has ended."""
    until(lambda: row(at, job)["finished_ms"])
    return row(at, job)


def test_what_is_too_large_for_all_workers_here_is_done_by_one_of_another_replica(two: Two, model: str) -> None:
    here, there = two
    with Decliner(here, offers(model), answers, f"small-{model}"):
        with FakeWorker(there, offers(model), answers, f"large-{model}"):
            known(here, f"large-{model}")
            known(there, f"small-{model}")
            rows = [ended(here, submit(here, model)) for _ in range(4)]
    assert [(one["state"], one["worker"]) for one in rows] == [("succeeded", f"large-{model}")] * 4


def test_a_job_that_all_workers_of_all_replicas_refuse_ends_with_the_reason(two: Two, model: str) -> None:
    here, there = two
    with Decliner(here, offers(model), answers, f"a-{model}") as one:
        with Decliner(there, offers(model), answers, f"b-{model}") as other:
            known(here, f"b-{model}")
            known(there, f"a-{model}")
            rows = [ended(here, submit(here, model)) for _ in range(3)]
            assert one.jobs
            assert other.jobs
    for end in rows:
        assert (end["state"], end["fault"]["code"]) == ("failed", "unsupported")
        assert "exceeds this worker's context" in end["fault"]["message"]


def test_who_has_refused_waits_for_one_elsewhere_that_is_busy(
    two: Two, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not ended as refused by all, and not asked again for as long as the other one is busy."""
    here, there = two
    for one in two:  # an offer that a slow machine leaves unanswered would be made again
        dispatcher = one.coordinator.parts.dispatcher
        patient = msgspec.structs.replace(dispatcher.settings, offer_s=10 * PATIENCE_S)
        monkeypatch.setattr(dispatcher, "settings", patient)
    go = threading.Event()

    def waits(job: OfferedJob) -> None:
        go.wait(PATIENCE_S)
        answers(job)

    with FakeWorker(there, offers(model, 1), waits, f"large-{model}") as large:
        first = submit(there, model)
        until(lambda: large.jobs)
        with Decliner(here, offers(model), answers, f"small-{model}") as small:
            known(here, f"large-{model}")
            job = submit(here, model)
            behind = [submit(here, model) for _ in range(3)]
            until(lambda: {one.id for one in small.jobs} == {job, *behind})
            assert row(here, job)["state"] == "queued"
            go.set()
            assert [ended(here, each)["worker"] for each in (first, job, *behind)] == [f"large-{model}"] * 5
            assert len(small.jobs) == 4


def test_what_a_replica_was_told_too_late_ends_all_the_same(two: Two, model: str) -> None:
    """All have refused it, and each replica believed that the other one's worker may have it."""
    here, there = two
    with Decliner(here, offers(model), answers, f"a-{model}"), Decliner(there, offers(model), answers, f"b-{model}"):
        known(here, f"b-{model}")
        known(there, f"a-{model}")
        with pytest.MonkeyPatch.context() as patch:
            for one in two:
                patch.setattr(one.coordinator.parts.dispatcher.attempts.fleet, "tell", lambda worker: None)
            end = ended(here, submit(here, model))
    assert (end["state"], end["fault"]["code"]) == ("failed", "unsupported")


def test_of_many_refusals_the_others_hear_in_a_few_words(two: Two, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each word has all that the worker refuses: one for each refusal would be thousands a second, to every replica."""
    here, there = two
    name, told = f"a-{model}", list[tuple[str, ...]]()
    with FakeWorker(here, offers(model), answers, name):
        known(there, name)
        mine = here.coordinator.parts.dispatcher.attempts.fleet
        others = here.coordinator.replicas
        assert others is not None
        (peer,) = others.peers
        until(lambda: peer.connected)
        push = peer.push

        def noting(frame: frames.Frame, *, urgent: bool = False) -> bool:
            if isinstance(frame, frames.FleetFrame) and not frame.first:
                told.extend(one.refuses for one in frame.workers)
            return push(frame, urgent=urgent)

        async def refuse_many() -> int:
            for n in range(refusals.MOST_TOLD):
                mine.refusals.refuse(f"{model}-{n}", name)
                mine.tell(mine.workers[name])
            return len(told)

        monkeypatch.setattr(peer, "push", noting)
        assert asyncio.run_coroutine_threadsafe(refuse_many(), here.loop).result(PATIENCE_S) <= 1
        until(lambda: told and len(told[-1]) == refusals.MOST_TOLD)


def test_who_is_busy_here_holds_no_job_back_from_who_is_idle_elsewhere(
    two: Two, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pause is this worker's: in the row it would be that of all replicas, and outlast what a test waits for."""
    here, there = two
    monkeypatch.setattr(refusals, "LONGEST_ASKED_S", LONG_S)
    monkeypatch.setattr(Busy, "said", wire.Decline(code="busy", reason="", retry_after_ms=int(LONG_S * 1000)))
    with Busy(here, offers(model), answers, f"busy-{model}") as busy:
        with FakeWorker(there, offers(model), answers, f"idle-{model}"):
            known(here, f"idle-{model}")
            job = submit(here, model)
            end = ended(here, job)
            assert (end["state"], end["worker"]) == ("succeeded", f"idle-{model}")
            assert len(busy.jobs) <= 1


def test_a_worker_that_rests_is_known_to_rest_at_the_other_replica(two: Two, model: str) -> None:
    here, there = two
    name = f"bad-{model}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quarantine, "FIRST_PAUSE_S", LONG_S)
        with FakeWorker(there, offers(model), fails, name):
            known(here, name)
            seen = here.coordinator.parts.dispatcher.attempts.fleet
            with FakeWorker(there, offers(model), answers, f"good-{model}"):  # the only one would not rest
                known(here, f"good-{model}")
                rests = there.coordinator.parts.dispatcher.attempts.fleet.workers[name].failing
                until(lambda: ended(there, submit(there, model)) and model in rests and rests[model].rests)
            until(lambda: [bool(one.view and one.view.resting) for one in list(seen.elsewhere())] == [True])
            body = {"model": model, "messages": MESSAGES}
            asked = httpx.post(f"{here.url}/v1/chat/completions", json=body, headers=here.headers, timeout=PATIENCE_S)
            assert (asked.status_code, asked.json()["error"]["code"]) == (503, "quarantined")
            boss = here.coordinator.keys.create("admin", name="boss")
            resumed = httpx.post(
                f"{here.url}/v1/workers/{name}/resume",
                headers={"authorization": f"Bearer {boss}"},
                timeout=PATIENCE_S,
            )
            assert resumed.status_code == 202
            away = there.coordinator.parts.dispatcher.attempts.fleet
            until(lambda: not away.workers[name].failing)


def fails(job: OfferedJob) -> None:
    job.fail(Fault("engine_failed", "It broke."))


def test_a_loaded_idle_worker_of_another_replica_comes_before_a_cold_one_here(
    two: Two, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a bound that a slow machine does not reach; how long a job waits for nobody is the next test's."""
    monkeypatch.setattr(fleet, "COLD_WAITS_MS", int(LONG_S * 1000))
    here, there = two
    with FakeWorker(here, offers(model), answers, f"cold-{model}") as cold:
        with FakeWorker(there, offers(model, resident=True), answers, f"warm-{model}"):
            known(here, f"warm-{model}")
            until(lambda: _held(here, model))
            rows = [ended(here, submit(here, model)) for _ in range(6)]
            assert cold.jobs == []
    assert [one["worker"] for one in rows] == [f"warm-{model}"] * 6


def test_a_cold_worker_takes_what_a_loaded_one_elsewhere_does_not(
    two: Two, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is known of it is old, or wrong: here its replica has it and does not claim for it."""
    here, there = two
    away = there.coordinator.parts.dispatcher.attempts.fleet
    with FakeWorker(there, offers(model, resident=True), answers, f"warm-{model}") as warm:
        until(lambda: f"warm-{model}" in away.workers)
        away.workers[f"warm-{model}"].block("", LONG_S * 1e6)
        with FakeWorker(here, offers(model), answers, f"cold-{model}"):
            known(here, f"warm-{model}")
            until(lambda: _held(here, model))
            rows = [ended(here, submit(here, model)) for _ in range(2)]
            assert warm.jobs == []
    assert [(one["state"], one["worker"]) for one in rows] == [("succeeded", f"cold-{model}")] * 2


def _held(at: Running, model: str) -> bool:
    """Whether cold slots of the model wait."""

    async def wants() -> list[int]:
        return [want.waited_ms for want in at.coordinator.parts.dispatcher.attempts.fleet.wants(current_time(), model)]

    return any(at.call(wants))
