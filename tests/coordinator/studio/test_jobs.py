"""What is believed of a studio worker's words about jobs: those that it does not hold, and that it runs nothing.

A lost frame must not keep a job for ever, nor a heartbeat end one that runs; only what is stored is acknowledged.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import pytest
from msgspec import structs
from starlette.requests import Request
from starlette.responses import Response

from coordinator import attempts
from coordinator.studio import routes
from coordinator.testing import Running, running
from coordinator.testing_studio import PATIENCE_S, StudioSocket
from tests.coordinator.studio.test_uploads import PICTURE, png
from tests.coordinator.studio_rig import ANSWER, FAST, House, until

LET_GO_S = 0.3


@pytest.fixture(scope="module")
def there(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A coordinator that soon believes a worker that it runs nothing."""
    with running(tmp_path_factory.mktemp("studio"), studio=structs.replace(FAST, let_go_s=LET_GO_S)) as it:
        yield it


def said_idle(it: StudioSocket) -> None:
    """Heartbeats without a job for longer than the coordinator believes in one."""
    it.beat()
    end = time.monotonic() + 2 * LET_GO_S  # after the answer to the first one
    while time.monotonic() < end:
        it.beat()
        time.sleep(LET_GO_S / 10)
    it.beat()


OF_JOBS: list[tuple[str, dict[str, Any]]] = [
    ("accept", {}),
    ("fail", {"error": "x", "retryable": True}),
    ("completeJson", {"result": ANSWER}),
]
ENDS: list[tuple[str, dict[str, Any]]] = [
    ("reject", {"reason": "unknown engine slug"}),
    ("fail", {"error": "no such kind", "retryable": False}),
    ("completeJson", {"result": ANSWER}),
]


@pytest.mark.parametrize(("frame", "fields"), OF_JOBS)
@pytest.mark.parametrize(("end", "said"), ENDS)
def test_rule_6_nothing_is_acknowledged_that_is_not_stored(
    house: House, end: str, said: dict[str, Any], frame: str, fields: dict[str, Any]
) -> None:
    """A worker forgets what was acknowledged: only the same end, said twice, is what was stored."""
    if frame == end:
        return
    with house.worker().session() as it:
        job = house.submit()
        it.claim(accept=end != "reject")
        it.send(end, jobId=job, **said)
        stored = house.ended(job)
        if end != "reject":
            it.receive()
        it.send(frame, jobId=job, **fields)
        assert it.ending() == ("protocol_violation", 4002)
    assert house.job(job) == stored


def test_rule_6_what_was_uploaded_is_neither_failed_nor_completed_after_it(house: House) -> None:
    for frame, fields in OF_JOBS:
        with house.worker().session() as it:
            job = house.submit("image", {"prompt": "p", "format": "png"})
            it.claim()
            assert it.worker.upload(job, png()).is_success
            it.send(frame, jobId=job, **fields)
            assert it.ending() == ("protocol_violation", 4002)
        assert house.job(job)["state"] == "succeeded"


# ---- it runs nothing, it says ------------------------------------------------------------------------------


def test_an_accepted_job_that_the_worker_does_not_run_goes_to_another(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attempts, "SHUNNED_S", PATIENCE_S)  # not to the same one again, however slow the machine is
    with house.worker().session() as it:
        job = house.submit(max_attempts=2)
        it.claim()
        with house.worker().session() as other:
            said_idle(it)
            assert other.claim()["jobId"] == job
            other.send("completeJson", jobId=job, result=ANSWER)
            other.expect("completeAck")
            assert house.job(job)["tries"] == 2
            waiting = [house.submit(), house.submit()]
            assert sorted([it.claim()["jobId"], other.claim()["jobId"]]) == sorted(waiting), "its slot is free"


def test_it_is_the_loss_of_the_worker_that_such_a_job_fails_by(house: House) -> None:
    with house.worker().session() as it:
        job = house.submit(max_attempts=1)
        it.claim()
        said_idle(it)
        assert house.ended(job)["fault"]["code"] == "worker_lost"


def test_what_was_said_before_the_accept_does_not_count(house: House) -> None:
    """A heartbeat and an accept pass each other inside a worker: so one after the accept says nothing, either."""
    with house.worker().session() as it:
        said_idle(it)
        job = house.submit(max_attempts=1)
        it.claim()
        it.beat()
        it.send("completeJson", jobId=job, result=ANSWER)
        assert it.expect("completeAck")["jobId"] == job
    assert house.job(job)["state"] == "succeeded"


def test_what_was_said_before_the_offer_does_not_count_either(house: House) -> None:
    """The heartbeat passes the offer on its way; the accept of a worker that knows of no cancel is no violation."""
    with house.worker().session() as it:
        said_idle(it)
        job = house.submit()
        it.claim(accept=False)
        house.client.post(f"/v1/jobs/{job}/cancel").raise_for_status()
        it.beat()
        it.send("accept", jobId=job)
        it.send("completeJson", jobId=job, result=ANSWER)
        assert it.expect("completeAck")["jobId"] == job
        it.beat()


def test_one_word_that_it_runs_the_job_counts_more_than_those_before(house: House) -> None:
    with house.worker().session() as it:
        job = house.submit(max_attempts=1)
        it.claim()
        end = time.monotonic() + 3 * LET_GO_S
        while time.monotonic() < end:
            it.beat()
            it.beat(currentJobId=job)
            time.sleep(LET_GO_S / 10)
        it.beat()
        it.send("completeJson", jobId=job, result=ANSWER)
        assert it.expect("completeAck")["jobId"] == job
    assert house.job(job)["state"] == "succeeded"


def test_what_it_was_let_go_of_is_not_acknowledged(house: House) -> None:
    """The job runs elsewhere: the answer would be dropped, and its worker would believe it kept."""
    with house.worker().session() as it:
        job = house.submit(max_attempts=1)
        it.claim()
        said_idle(it)
        house.ended(job)
        it.send("completeJson", jobId=job, result=ANSWER)
        assert it.ending() == ("protocol_violation", 4002)


def test_an_upload_that_is_under_way_is_worth_more_than_its_word(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some workers count a job as over when they begin to deliver it."""
    began, real = threading.Event(), routes.receive

    async def receive(request: Request, *rest: Any) -> Response:
        began.set()
        return await real(request, *rest)

    monkeypatch.setattr(routes, "receive", receive)
    job = house.submit("image", PICTURE, max_attempts=1)
    with house.worker().session() as it:
        it.claim()
        address = urlsplit(house.url)
        part = b'--x\r\ncontent-disposition: form-data; name="image"\r\n\r\n' + png() + b"\r\n--x--\r\n"
        head = (
            f"POST /graphics/api/workers/{it.worker.id}/jobs/{job}/complete HTTP/1.1\r\nhost: x\r\n"
            f"authorization: Bearer {it.worker.token}\r\ncontent-type: multipart/form-data; boundary=x\r\n"
            f"content-length: {len(part)}\r\n\r\n"
        )
        with socket.create_connection((address.hostname, address.port), timeout=PATIENCE_S) as slow:
            slow.sendall(head.encode() + part[:60])
            assert began.wait(PATIENCE_S)
            said_idle(it)
            slow.sendall(part[60:])
            assert slow.recv(100).startswith(b"HTTP/1.1 200")
    assert house.job(job)["state"] == "succeeded"


def test_after_an_upload_that_failed_its_word_counts_anew(house: House) -> None:
    job = house.submit("image", PICTURE, max_attempts=1)
    with house.worker().session() as it:
        it.claim()
        it.beat()
        time.sleep(2 * LET_GO_S)
        assert it.worker.post(job, data={"prompt": "p"}).status_code == 415
        it.beat()
        assert it.worker.upload(job, png()).is_success
    assert house.job(job)["state"] == "succeeded"


def test_a_cancelled_job_that_the_worker_has_forgotten_frees_its_slot(house: House) -> None:
    with house.worker().session() as it:
        job = house.submit()
        it.claim()
        until(lambda: house.job(job)["state"] == "running")
        house.client.post(f"/v1/jobs/{job}/cancel").raise_for_status()
        said_idle(it)
        other = house.submit()
        assert it.claim()["jobId"] == other
