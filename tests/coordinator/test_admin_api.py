"""What an admin may see and do beyond one tenant, over real sockets."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from websockets.exceptions import InvalidStatus

from coordinator.testing import OfferedJob, Running
from coordinator.testing_link import CHAT, RawWorker
from protocol import link_wire as wire
from protocol.faults import Fault, FaultError


@pytest.fixture
def admin(served: Running) -> Iterator[httpx.Client]:
    key = served.coordinator.keys.create("admin", name="boss")
    with httpx.Client(base_url=served.url, headers={"authorization": f"Bearer {key}"}, timeout=60) as client:
        yield client


def submit(served: Running, tenant: str, model: str, **more: Any) -> str:
    key = served.coordinator.keys.create("client", tenant=tenant)
    body = {"kind": "llm", "model": model, "params": {"prompt": "a secret"}, "wait_for_worker": True, **more}
    headers = {"authorization": f"Bearer {key}"}
    answer = httpx.post(served.url + "/v1/jobs", json=body, headers=headers, timeout=60)
    return str(answer.json()["id"])


def test_jobs_of_every_tenant_are_listed_in_pages_without_what_they_say(served: Running, admin: httpx.Client) -> None:
    made = [submit(served, f"tenant-{n}", "listed") for n in range(3)]
    first = admin.get("/v1/admin/jobs", params={"model": "listed", "limit": 2}).json()
    assert [one["id"] for one in first["data"]] == made[:0:-1]
    assert first["more"] is True
    rest = admin.get("/v1/admin/jobs", params={"model": "listed", "limit": 2, "before": made[1]}).json()
    assert ([one["id"] for one in rest["data"]], rest["more"]) == ([made[0]], False)
    (one,) = admin.get("/v1/admin/jobs", params={"tenant": "tenant-2", "state": "queued"}).json()["data"]
    assert (one["id"], one["tenant"]) == (made[2], "tenant-2")
    assert "secret" not in str(first)


@pytest.mark.parametrize("query", ["limit=0", "limit=9999", "limit=x", "state=gone", "sate=queued"])
def test_wrong_questions_are_named(admin: httpx.Client, query: str) -> None:
    answer = admin.get(f"/v1/admin/jobs?{query}")
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_parameter")


def test_a_job_is_shown_with_its_attempts(served: Running, admin: httpx.Client, serve: Any) -> None:
    def fails(job: OfferedJob) -> None:
        raise FaultError(Fault("engine_failed", "Out of ideas."))

    worker = serve(fails, "attempted", "llm")
    job = submit(served, "somebody", "attempted", wait=True)
    seen = admin.get(f"/v1/admin/jobs/{job}").json()
    (attempt,) = seen["attempts"]
    assert (seen["state"], attempt["outcome"], attempt["fault"]["message"]) == ("failed", "failed", "Out of ideas.")
    assert worker.jobs[0].id == job
    answer = admin.get("/v1/admin/jobs/job_nobody")
    assert (answer.status_code, "GET /v1/admin/jobs" in answer.json()["error"]["message"]) == (404, True)


def test_what_workers_told_of_a_job_is_shown(served: Running, admin: httpx.Client, serve: Any) -> None:
    def talks(job: OfferedJob) -> None:
        told = wire.LogLine(ts="2026-11-21T10:00:00Z", level="warning", message="it is\x1b slow", job=job.id)
        worker.send(wire.LogBatch(lines=(told, wire.LogLine("later", "info", "of nobody")), dropped=3))
        worker.send(wire.LogBatch(lines=(wire.LogLine("later", "info", "done", job.id),)))
        job.complete({"content": "x"})

    worker = serve(talks, "talks", "llm")
    job = submit(served, "somebody", "talks", wait=True)
    seen = admin.get(f"/v1/admin/jobs/{job}/logs").json()
    name = admin.get(f"/v1/admin/jobs/{job}").json()["worker"]
    assert [(one["worker"], one["level"], one["message"]) for one in seen["data"]] == [
        (name, "warning", "it is\x1b slow"),
        (name, "info", "done"),
    ]
    assert seen["data"][0]["at"] == "2026-11-21T10:00:00Z"
    assert (seen["job"], seen["more"], seen["lost"], seen["not_asked"]) == (job, 0, {name: 3}, [])
    assert 0 < seen["since_ms"] <= seen["data"][0]["told_ms"]
    last = admin.get(f"/v1/admin/jobs/{job}/logs", params={"limit": 1, "worker": name}).json()
    assert ([one["message"] for one in last["data"]], last["more"]) == (["done"], 1)
    assert admin.get(f"/v1/admin/jobs/{job}/logs", params={"worker": "other"}).json()["data"] == []


def test_lines_of_jobs_are_an_admins_and_wrong_questions_are_named(served: Running, admin: httpx.Client) -> None:
    job = submit(served, "somebody", "silent")
    answer = httpx.get(f"{served.url}/v1/admin/jobs/{job}/logs", headers=served.headers, timeout=60)
    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "forbidden")
    assert admin.get("/v1/admin/jobs/job_nobody/logs").status_code == 404
    for query in ("limit=0", "limit=1001", "limit=x", "wroker=a"):
        answer = admin.get(f"/v1/admin/jobs/{job}/logs?{query}")
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_parameter")


def test_keys_are_listed_without_secrets_and_revoked(served: Running, admin: httpx.Client) -> None:
    secret = served.coordinator.keys.create("client", name="intern")
    answer = admin.get("/v1/keys")
    assert secret not in answer.text
    assert secret[:12] in [one["prefix"] for one in answer.json()["data"] if one["name"] == "intern"]
    assert admin.post(f"/v1/keys/{secret[:12]}/revoke").json()["prefix"] == secret[:12]
    headers = {"authorization": f"Bearer {secret}"}
    assert httpx.get(served.url + "/v1/models", headers=headers).status_code == 401
    again = admin.post(f"/v1/keys/{secret[:12]}/revoke")
    assert (again.status_code, "coordinator keys list" in again.json()["error"]["message"]) == (404, True)


def test_a_worker_is_put_out_with_its_key(served: Running, admin: httpx.Client) -> None:
    token = served.coordinator.keys.create("worker", name="lent")
    port = int(served.url.rpartition(":")[2])
    with RawWorker(port, "lent", token) as worker:
        worker.hello(CHAT)
        answer = admin.post("/v1/workers/lent/revoke")
        assert (answer.status_code, token[:12] in answer.json()["message"]) == (200, True)
        error, _ = worker.expect_close()
        assert error is not None
        assert error.code == "auth_failed"
    with pytest.raises(InvalidStatus, match="401"), RawWorker(port, "lent", token):
        pass
    gone = admin.post("/v1/workers/lent/revoke")
    assert (gone.status_code, "GET /v1/workers" in gone.json()["error"]["message"]) == (404, True)


def test_a_request_to_join_is_decided(served: Running, admin: httpx.Client) -> None:
    told = {"machine": "box", "user": "anna", "models": []}
    found = served.coordinator.parts.registrations
    request, _ = found.request(secrets.token_hex(8), "10.0.0.7", secrets.token_bytes(32), "studio", told)
    assert admin.post(f"/v1/registrations/{request}/approve", json={}).json()["state"] == "approved"
    assert admin.post(f"/v1/registrations/{request}/reject", json={}).json()["state"] == "rejected"


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/admin/jobs"),
        ("GET", "/v1/admin/jobs/x"),
        ("GET", "/v1/keys"),
        ("POST", "/v1/keys/bhc_x/revoke"),
        ("POST", "/v1/workers/w/revoke"),
    ],
)
def test_a_client_key_opens_none_of_it(http: httpx.Client, method: str, path: str) -> None:
    answer = http.request(method, path)
    assert (answer.status_code, "--scope admin" in answer.json()["error"]["message"]) == (403, True)
