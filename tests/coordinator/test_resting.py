"""A worker on which job after job fails does not swallow the queue: real server, scripted workers."""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from coordinator import attempts, quarantine
from coordinator.testing import FakeWorker, OfferedJob, Running
from protocol import link_wire as wire
from protocol.faults import Fault

PATIENCE_S = 60.0
LONG_S = 3600.0
TRIES = 12
FEW = quarantine.FAILURES
MESSAGES = [{"role": "user", "content": "x"}]
_numbers = itertools.count(1)


@pytest.fixture
def model() -> str:
    """A name that no other test has."""
    return f"resting{next(_numbers)}"


@pytest.fixture
def boss(served: Running) -> Iterator[httpx.Client]:
    key = served.coordinator.keys.create("admin", name="boss")
    headers = {"authorization": f"Bearer {key}"}
    with httpx.Client(base_url=served.url, headers=headers, timeout=2 * PATIENCE_S) as one:
        yield one


def offers(model: str, slots: int = 2) -> tuple[wire.ModelOffer, ...]:
    return (wire.ModelOffer(name=model, kinds=("llm",), engine="fake", slots=slots),)


def breaks(code: str, **detail: Any) -> Callable[[OfferedJob], None]:
    return lambda job: job.fail(Fault(code, "The box is broken.", detail=detail))


def answers(job: OfferedJob) -> None:
    job.started()
    job.complete({"content": "ok"})


def chat(http: httpx.Client, model: str) -> httpx.Response:
    return http.post("/v1/chat/completions", json={"model": model, "messages": MESSAGES})


def submit(http: httpx.Client, model: str, **more: Any) -> str:
    answer = http.post("/v1/jobs", json={"kind": "llm", "model": model, "params": {"messages": MESSAGES}, **more})
    assert answer.status_code < 300, answer.text
    job: str = answer.json()["id"]
    return job


def until(condition: Callable[[], object]) -> None:
    """Wait for what has no event of its own."""
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end, "it did not come true"
        time.sleep(0.01)


def ended(http: httpx.Client, job: str) -> dict[str, Any]:
    """The job when it has ended."""
    until(lambda: http.get(f"/v1/jobs/{job}").json()["finished_ms"])
    row: dict[str, Any] = http.get(f"/v1/jobs/{job}").json()
    return row


def _serving(boss: httpx.Client, model: str) -> list[str]:
    """Workers that are connected and have it."""
    return [one["id"] for one in boss.get("/v1/workers").json()["data"] if model in str(one)]


def resting(boss: httpx.Client, name: str) -> list[dict[str, Any]]:
    """What the list of workers says of one's rests."""
    found = next(one for one in boss.get("/v1/workers").json()["data"] if one["id"] == name)
    rests: list[dict[str, Any]] = found["resting"]
    return rests


def test_a_broken_box_beside_a_sound_one_fails_three_jobs_and_no_more(
    served: Running, http: httpx.Client, boss: httpx.Client, model: str, caplog: pytest.LogCaptureFixture, rests: None
) -> None:
    """Jobs that are not tried again: the broken one, which is idle first, would have failed each of them."""
    bad, good = f"bad-{model}", f"good-{model}"
    caplog.set_level(logging.INFO)
    with FakeWorker(served, offers(model), breaks("engine_failed"), bad) as broken:
        with FakeWorker(served, offers(model), answers, good):
            statuses = [chat(http, model).status_code for _ in range(TRIES)]
            assert statuses == [500] * FEW + [200] * (TRIES - FEW)
            assert len(broken.jobs) == FEW
            (why,) = resting(boss, bad)
            assert (why["model"], why["failed"], why["code"]) == (model, FEW, "engine_failed")
            assert why["for_s"] > 0
            assert resting(boss, good) == []
            assert 'events_total{event="quarantines"}' in boss.get("/metrics").text
    assert len([line for line in caplog.messages if f"gets nothing of the model '{model}'" in line]) == 1


@pytest.fixture
def rests(monkeypatch: pytest.MonkeyPatch) -> None:
    """No rest ends by itself, however slow the machine is, and no job gives up waiting for another worker."""
    monkeypatch.setattr(quarantine, "FIRST_PAUSE_S", LONG_S)
    monkeypatch.setattr(quarantine, "LONGEST_PAUSE_S", LONG_S)
    monkeypatch.setattr(attempts, "SHUNNED_S", LONG_S)


@pytest.mark.parametrize("detail", [{}, {"alone": True}])
def test_what_may_be_tried_again_waits_for_a_sound_worker_that_is_busy(
    served: Running, http: httpx.Client, model: str, detail: dict[str, Any], rests: None
) -> None:
    """Not again on the idle one that breaks: there it would fail for good, or be blamed for the crashes."""
    go = threading.Event()

    def waits(job: OfferedJob) -> None:
        go.wait(PATIENCE_S)
        answers(job)

    with FakeWorker(served, offers(model, 1), waits, f"good-{model}") as sound:
        first = submit(http, model)
        until(lambda: sound.jobs)
        with FakeWorker(served, offers(model, 1), breaks("engine_crashed", **detail), f"bad-{model}") as broken:
            asked = submit(http, model)
            until(lambda: len(broken.jobs) == 1 and http.get(f"/v1/jobs/{asked}").json()["state"] == "queued")
            go.set()
            assert [ended(http, job)["state"] for job in (first, asked)] == ["succeeded"] * 2
            assert len(broken.jobs) == 1


def test_a_second_crash_on_the_same_worker_is_not_the_jobs_while_others_could_have_had_it(
    served: Running, http: httpx.Client, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attempts, "SHUNNED_S", 0.0)  # so that it goes to the same one again
    go = threading.Event()

    def waits(job: OfferedJob) -> None:
        go.wait(PATIENCE_S)
        answers(job)

    with FakeWorker(served, offers(model, 1), waits, f"busy-{model}") as busy:
        other = submit(http, model)
        until(lambda: busy.jobs)
        with FakeWorker(served, offers(model, 1), breaks("engine_crashed", alone=True), f"bad-{model}"):
            end = ended(http, submit(http, model))
        assert (end["fault"]["code"], end["tries"]) == ("engine_crashed", 3)
        go.set()
        assert ended(http, other)["state"] == "succeeded"


def test_a_single_box_still_finds_the_job_that_kills_it(served: Running, http: httpx.Client, model: str) -> None:
    with FakeWorker(served, offers(model, 1), breaks("engine_crashed", alone=True), f"only-{model}"):
        end = ended(http, submit(http, model))
    assert (end["fault"]["code"], end["tries"]) == ("job_poisoned", 2)


def test_a_caller_who_is_wrong_again_and_again_keeps_no_worker_from_others(
    served: Running, http: httpx.Client, boss: httpx.Client, model: str
) -> None:
    with FakeWorker(served, offers(model), breaks("invalid_parameter"), f"only-{model}") as worker:
        assert [chat(http, model).status_code for _ in range(TRIES)] == [400] * TRIES
        assert (len(worker.jobs), resting(boss, worker._hello.worker)) == (TRIES, [])


def test_who_rests_while_the_other_one_leaves_does_so_with_a_word_and_an_admin_ends_it(
    served: Running, http: httpx.Client, boss: httpx.Client, model: str, rests: None
) -> None:
    name = f"bad-{model}"
    with FakeWorker(served, offers(model), breaks("engine_failed"), name) as worker:
        with FakeWorker(served, offers(model), answers, f"good-{model}"):
            assert [chat(http, model).status_code for _ in range(FEW)] == [500] * FEW
        until(lambda: len(_serving(boss, model)) == 1)
        refused = chat(http, model)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "quarantined")
        assert 0 < int(refused.headers["retry-after"]) <= LONG_S
        job = submit(http, model, wait_for_worker=True)
        worker.script = answers
        assert boss.post(f"/v1/workers/{name}/resume").status_code == 202
        assert ended(http, job)["state"] == "succeeded"
        assert resting(boss, name) == []


def test_a_batch_that_fails_on_the_only_worker_keeps_no_request_from_it(
    served: Running, http: httpx.Client, boss: httpx.Client, model: str, rests: None, caplog: pytest.LogCaptureFixture
) -> None:
    """What lines of it leave behind is one job at a time, and the first request that works ends that."""
    name = f"only-{model}"
    with FakeWorker(served, offers(model), breaks("engine_failed"), name) as worker:
        for line in [submit(http, model, wait_for_worker=True) for _ in range(TRIES)]:
            assert ended(http, line)["fault"]["code"] == "engine_failed"
        (why,) = resting(boss, name)
        assert why["for_s"] == 0
        assert why["failed"] >= FEW
        worker.script = answers
        assert [chat(http, model).status_code for _ in range(3)] == [200] * 3
        assert resting(boss, name) == []
    assert len([line for line in caplog.messages if f"gets one job of the model '{model}' at a time" in line]) == 1


def test_a_new_session_is_tried_with_one_job_at_a_time(
    served: Running, http: httpx.Client, boss: httpx.Client, model: str, rests: None
) -> None:
    """Its owner may have mended it meanwhile."""
    name = f"bad-{model}"
    with FakeWorker(served, offers(model), breaks("engine_failed"), name):
        with FakeWorker(served, offers(model), answers, f"good-{model}"):
            assert [chat(http, model).status_code for _ in range(FEW)] == [500] * FEW
            assert resting(boss, name)[0]["for_s"] > 0
    with FakeWorker(served, offers(model), breaks("engine_failed"), name) as again:
        with FakeWorker(served, offers(model), answers, f"good-{model}"):
            assert [chat(http, model).status_code for _ in range(4)] == [500] + [200] * 3
            assert len(again.jobs) == 1
    with FakeWorker(served, offers(model), answers, name):
        assert [chat(http, model).status_code for _ in range(3)] == [200] * 3
        assert resting(boss, name) == []
