"""A studio worker has its session at one replica, and its uploads come to another one."""

from __future__ import annotations

import base64
import contextlib
import secrets
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from coordinator.replicas import frames
from coordinator.replicas.opening import ReplicaTable, open_doorway
from coordinator.testing import running
from coordinator.testing_studio import Admitted, capabilities, poll, register
from tests.certificates import self_signed
from tests.coordinator.replicas.rig import LONG_MS, PATIENCE_S, SECRET, until
from tests.coordinator.replicas.uploads_rig import FORM, Slow, content, form, held, replicas, session
from tests.coordinator.studio.test_uploads import MP4, PICTURE, png
from tests.coordinator.studio_rig import FAST, House, opened

# ---- the road -----------------------------------------------------------------------------------------------


def test_a_studio_worker_may_ask_any_replica_for_anything(here: House, there: House, passed_on: list[str]) -> None:
    """Registration, approval, polls, the socket, inputs and uploads: each at another replica than what came before."""
    secret, said = secrets.token_hex(32), capabilities(here.tag)
    install = f"install-{secrets.token_hex(8)}"
    asked = register(here.url, install, secret, said).json()
    assert register(there.url, install, secret, said).json() == asked
    assert poll(there.url, asked["requestId"], secret).json() == {"status": "pending"}
    there.admin.post(f"/v1/registrations/{asked['requestId']}/approve").raise_for_status()
    worker = here.worker()
    polled = poll(here.url, asked["requestId"], secret).json()
    worker.id, worker.token = polled["workerId"], polled["authToken"]
    with session(here, there.url, worker) as (_, it):
        start = "data:image/png;base64," + base64.b64encode(png(32, 32)).decode()
        body = {"kind": "image", "model": f"{here.tag}-image", "params": PICTURE, "inputs": {"image": start}}
        made = here.client.post("/v1/jobs", json={**body, "wait_for_worker": True})
        assert made.is_success, made.text
        claim = it.claim()
        assert claim["jobId"] == (job := made.json()["id"])
        url = claim["task"]["initImageUrl"]
        assert url.startswith(there.url)
        for house in (here, there):
            assert httpx.get(url.replace(there.url, house.url), timeout=PATIENCE_S).content == png(32, 32)
        assert worker.upload(job, png()).json() == {"ok": True}
    assert passed_on == [job]


def test_an_upload_goes_to_the_replica_of_the_session(here: House, there: House, passed_on: list[str]) -> None:
    first, second = (here.submit("image", PICTURE) for _ in range(2))
    with session(here, there.url) as (worker, it):
        assert it.claim()["jobId"] == first
        answer = worker.upload(first, png(64, 32))
        assert (answer.status_code, answer.json()) == (200, {"ok": True})
        assert passed_on == [first]
        assert it.claim()["jobId"] == second  # its slot is free
        assert worker.upload(first, png(16, 16)).status_code == 409  # it is done, and stays what it is
        worker.url = there.url
        assert worker.upload(second, png(8, 8)).is_success
    assert second not in passed_on
    for house in (here, there):
        assert content(house, first) == [png(64, 32)]
        assert content(house, second) == [png(8, 8)]
    assert here.job(first)["tries"] == 1


def test_uploads_may_come_at_once(here: House, there: House) -> None:
    """Of several workers, and one file twice."""
    jobs = [here.submit("image", PICTURE) for _ in range(3)]
    with contextlib.ExitStack() as stack, ThreadPoolExecutor(6) as pool:
        given = []
        for _ in jobs:
            worker, it = stack.enter_context(session(here, there.url))
            given.append((worker, it.claim()["jobId"]))
        assert sorted(job for _, job in given) == sorted(jobs)
        files = {job: png(8, 8 + n) for n, (_, job) in enumerate(given)}
        sent = [(job, pool.submit(worker.upload, job, files[job])) for worker, job in given for _ in range(2)]
        statuses: dict[str, set[int]] = {job: set() for job in jobs}
        for job, answer in sent:
            statuses[job].add(answer.result(PATIENCE_S).status_code)
        assert all(200 in found <= {200, 409} for found in statuses.values()), statuses
    for job in jobs:
        assert content(there, job) == [files[job]]


def test_the_bytes_go_on_as_they_come(here: House, there: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other replica has them before the last one was sent; a body of no known length goes on like any other."""
    blobs, came = there.there.coordinator.parts.blobs, [0]
    real = blobs.put_output

    async def put_output(job: str, attempt: int, name: str, data: Any) -> Any:
        async def counted() -> Any:
            async for piece in data:
                came[0] += len(piece)
                yield piece

        async with contextlib.aclosing(counted()) as pieces:
            return await real(job, attempt, name, pieces)

    monkeypatch.setattr(blobs, "put_output", put_output)
    film = MP4 + bytes(3 * 2**20)
    first, second = (here.submit("video", {"prompt": "p", "format": "mp4", "seconds": 1}) for _ in range(2))
    with session(here, there.url) as (worker, it):
        assert it.claim()["jobId"] == first
        with Slow(worker, first, film) as slow:
            slow.send(0, 2**20)
            until(lambda: came[0] > 2**19)
            slow.send(2**20)
            assert slow.status()[0] == 200
        assert it.claim()["jobId"] == second
        body = form(film)
        pieces = (body[at : at + 2**16] for at in range(0, len(body), 2**16))
        assert worker.post(second, content=pieces, headers=worker.headers | FORM).is_success
    assert content(here, first) == content(here, second) == [film]


def test_uploads_are_passed_on_over_tls(apart: str, tmp_path: Path) -> None:
    from coordinator.store.postgres import PostgresStore

    pem, key = self_signed(tmp_path)
    (tmp_path / "secret").write_text(SECRET)
    files = {"secret_file": str(tmp_path / "secret"), "tls_cert": str(pem), "tls_key": str(key), "tls_ca": str(pem)}
    table = ReplicaTable(listen="127.0.0.1:0", **files)
    with contextlib.ExitStack() as stack:
        pair = [
            stack.enter_context(
                running(
                    tmp_path / "state",
                    studio=FAST,
                    open_store=lambda: PostgresStore(apart, silent_ms=LONG_MS),
                    doorway=open_doorway(table),
                )
            )
            for _ in range(2)
        ]
        name = replicas(pair[1]).name
        until(lambda: name in [peer.name for peer in replicas(pair[0]).peers if peer.connected])
        house = stack.enter_context(opened(pair[0]))
        job = house.submit("image", PICTURE)
        with session(house, pair[1].url) as (worker, it):
            it.claim()
            assert worker.upload(job, png()).is_success
        assert content(house, job) == [png()]


# ---- refused ------------------------------------------------------------------------------------------------


def test_a_wrong_token_is_refused_before_anything_is_passed_on(here: House, there: House, passed_on: list[str]) -> None:
    job = here.submit("image", PICTURE)
    with session(here, there.url) as (worker, it):
        assert it.claim()["jobId"] == job
        until(lambda: here.job(job)["state"] == "running")
        with session(here, there.url) as (other, _):
            for headers in ({"authorization": "Bearer wrong"}, {"x-nothing": "1"}, other.headers):
                assert worker.upload(job, png(), headers=headers).status_code == 401
            assert other.upload("job-nobody-knows", png()).status_code == 409
            assert other.upload(job, png()).status_code == 409  # the row names another worker: nobody need be asked
        assert passed_on == []
        assert worker.upload(job, png()).is_success
    assert passed_on == [job]


def test_what_the_session_refuses_is_refused_through_another_replica(here: House, there: House) -> None:
    job = here.submit("image", PICTURE)
    requests: list[tuple[dict[str, Any], int]] = [
        ({"data": {"prompt": "p", "ext": "png"}, "files": {"other": ("x", b"")}}, 400),
        ({"data": {"prompt": "p" * 2**21}, "files": {"image": ("a.png", png())}}, 413),
        ({"content": b"{}", "headers": {"content-type": "application/json"}}, 415),
        ({"content": b"", "headers": {"content-type": "multipart/form-data"}}, 400),
    ]
    with session(here, there.url) as (worker, it):
        it.claim()
        direct = Admitted.__new__(Admitted)
        direct.__dict__.update(worker.__dict__, url=there.url)
        for request, status in requests:
            request = {**request, "headers": {**worker.headers, **request.get("headers", {})}}
            answers = [one.post(job, **request) for one in (worker, direct)]
            assert [one.status_code for one in answers] == [status, status], answers[0].text
            assert answers[0].json() == answers[1].json()
            assert answers[0].headers["content-type"] == answers[1].headers["content-type"]
        assert worker.upload(job, png()).is_success


def test_a_body_that_is_too_large_is_not_passed_on_beyond_the_bound(
    here: House, there: House, passed_on: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    job = here.submit("image", PICTURE)
    with session(here, there.url) as (worker, it):
        it.claim()
        with Slow(worker, job, b"", length=2**40) as told:
            told.send(0, 10)
            assert told.status()[0] == 413
        endless = iter([form(png(), b""), *[bytes(2**16)] * 64])
        with monkeypatch.context() as patched:
            patched.setattr(here.there.coordinator.parts.blobs, "max_output_bytes", 1000)
            answer = worker.post(job, content=endless, headers=worker.headers | FORM)
        assert answer.status_code == 413
        assert passed_on == [job, job]
        assert worker.upload(job, png()).is_success


def test_what_comes_after_a_cancel_is_taken_and_dropped_through_another_replica(here: House, there: House) -> None:
    job = here.submit("image", PICTURE)
    with session(here, there.url) as (worker, it):
        it.claim()
        until(lambda: here.job(job)["state"] == "running")
        here.client.post(f"/v1/jobs/{job}/cancel").raise_for_status()
        until(lambda: held(there, job) == "abandoned")
        assert worker.upload(job, png()).is_success
        it.beat()
    seen = here.job(job)
    assert (seen["state"], seen["files"], seen["usage"]) == ("cancelled", [], {"images": 1.0})


# ---- the door -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "status"),
    [
        ({"authorization": "Bearer another-secret-of-all"}, 401),
        ({frames.FROM: ""}, 400),
        ({frames.TO: "gw_gone"}, 421),
        ({}, 409),
    ],
)
def test_what_comes_in_at_the_door_is_of_a_replica_and_goes_no_further(
    here: House, there: House, passed_on: list[str], changed: dict[str, str], status: int
) -> None:
    """Though the row says that another replica holds the job."""
    job = here.submit("image", PICTURE)
    with session(here, there.url) as (worker, it):
        it.claim()
        until(lambda: here.job(job)["state"] == "running")
        mine = replicas(here)
        headers = {"authorization": f"Bearer {SECRET}", frames.FROM: "gw_test", frames.TO: mine.name, **changed}
        url = mine._doorway.url.replace("ws", "http", 1) + frames.UPLOADS.format(worker=worker.id, job=job)
        answer = httpx.post(url, files={"image": ("a.png", png())}, headers=headers, timeout=PATIENCE_S)
        assert answer.status_code == status
        assert answer.headers.get(frames.FROM) == (None if changed else mine.name)
        assert passed_on == []
        assert worker.upload(job, png()).is_success
