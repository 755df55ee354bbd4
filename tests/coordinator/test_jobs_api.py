"""The job API over a real server."""

from __future__ import annotations

import base64
import json
import threading
import time
from datetime import datetime, timedelta, timezone
from typing import Any

import httpx
import pytest

from coordinator.jobs_api import MAX_INPUTS, safe_mime
from protocol.faults import Fault, FaultError
from protocol.work import CommandResult, Delta, FreeResult, LlmChunk, LlmResult

WAIT_S = 60.0
PNG = b"\x89PNG\r\n\x1a\n" + bytes(100)


def become(http: httpx.Client, job: str, *states: str) -> dict[str, Any]:
    end = time.monotonic() + WAIT_S
    while True:
        record = http.get(f"/v1/jobs/{job}").json()
        if record["state"] in states:
            return dict(record)
        assert time.monotonic() < end
        time.sleep(0.01)


def finished(http: httpx.Client, job: str) -> dict[str, Any]:
    return become(http, job, "succeeded", "failed", "cancelled")


def command(job: Any) -> None:
    job.started()
    job.upload("out put.html", b"<b>hi</b>", "text/html")
    job.complete(CommandResult(exit_code=0, output_tail=["done"]), {"compute_ms": 5})


def test_the_life_of_a_job(http: httpx.Client, serve: Any) -> None:
    worker = serve(command, "tool", "command", labels={"team": "a", "more": "b"})
    body = {
        "kind": "command",
        "model": "tool",
        "params": {"args": {"n": 3}},
        "priority": 2,
        "deadline_ms": 60_000,
        "labels": {"team": "a"},
        "vram_gb_estimate": 1.5,
    }
    answer = http.post("/v1/jobs", json=body)
    assert answer.status_code == 202
    job = answer.json()
    assert (job["object"], job["kind"], job["priority"], job["labels"]) == ("job", "command", 2, {"team": "a"})
    done = finished(http, job["id"])
    assert (done["state"], done["usage"], done["fault"]) == ("succeeded", {"compute_ms": 5}, None)
    assert http.get(f"/v1/jobs/{job['id']}/result").json() == {"exit_code": 0, "output_tail": ["done"]}
    (file,) = done["files"]
    content = http.get(file["url"])
    assert content.content == b"<b>hi</b>"
    assert content.headers["content-disposition"].startswith("attachment")
    assert "sandbox" in content.headers["content-security-policy"]
    assert job["id"] in [item["id"] for item in http.get("/v1/jobs", params={"state": "succeeded"}).json()["data"]]
    offer = worker.jobs[0].offer
    assert (offer.priority, offer.vram_gb_estimate) == (2, 1.5)
    assert 0 < offer.deadline_ms <= 60_000


def test_waiting_for_the_end(http: httpx.Client, serve: Any) -> None:
    go_on = threading.Event()

    def script(job: Any) -> None:
        job.started()
        assert go_on.wait(WAIT_S)
        job.complete(FreeResult(output={"x": job.params["x"]}))

    serve(script, "free", "x-demo")
    body = {"kind": "x-demo", "model": "free", "params": {"x": [1, None]}}
    once = {**body, "idempotency_key": "early"}
    job = http.post("/v1/jobs", json=once).json()["id"]
    become(http, job, "running")
    early = http.post("/v1/jobs", json={**once, "wait": 0.2})
    assert (early.status_code, early.json()["state"], early.json()["id"]) == (202, "running", job)
    assert http.get(f"/v1/jobs/{early.json()['id']}/result").status_code == 409
    go_on.set()
    done = http.post("/v1/jobs", json={**body, "wait": True})
    assert (done.status_code, done.json()["state"]) == (200, "succeeded")
    assert http.get(f"/v1/jobs/{done.json()['id']}/result").json() == {"output": {"x": [1, None]}}


def test_inputs_as_data_urls_and_as_a_form(http: httpx.Client, serve: Any) -> None:
    seen: list[bytes] = []

    def script(job: Any) -> None:
        seen.append(job.read("image"))
        job.started()
        job.complete(FreeResult())

    serve(script, "free-in", "x-in")
    body = {"kind": "x-in", "model": "free-in", "params": {}, "wait": 30}
    data = "data:image/png;base64," + base64.b64encode(PNG).decode()
    assert http.post("/v1/jobs", json={**body, "inputs": {"image": data}}).json()["state"] == "succeeded"
    form = http.post("/v1/jobs", data={"job": json.dumps(body)}, files={"image": ("a.png", PNG)})
    assert form.json()["state"] == "succeeded"
    assert seen == [PNG, PNG]
    both = {**body, "inputs": {"image": data}}
    answer = http.post("/v1/jobs", data={"job": json.dumps(both)}, files={"image": ("a.png", PNG)})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "inputs")


def test_a_failed_job_answers_with_its_fault(http: httpx.Client, serve: Any) -> None:
    def script(_job: Any) -> None:
        raise FaultError(Fault("command_failed", "It ended with 3.", detail={"exit_code": 3}))

    serve(script, "tool-fail", "command")
    job = http.post("/v1/jobs", json={"kind": "command", "model": "tool-fail", "wait": 30}).json()
    assert job["state"] == "failed"
    assert (job["fault"]["code"], job["fault"]["detail"]) == ("command_failed", {"exit_code": 3})
    result = http.get(f"/v1/jobs/{job['id']}/result")
    assert (result.status_code, result.json()["error"]["code"]) == (500, "command_failed")


def test_cancelling(http: httpx.Client, serve: Any) -> None:
    def script(job: Any) -> None:
        job.started()
        assert job.cancelled.wait(WAIT_S)
        raise FaultError(Fault("cancelled", "Cancelled."))

    serve(script, "tool-long", "command")
    job = http.post("/v1/jobs", json={"kind": "command", "model": "tool-long"}).json()["id"]
    assert http.post(f"/v1/jobs/{job}/cancel").json()["state"] == "cancelled"
    assert finished(http, job)["fault"]["message"] == "cancelled by its owner"
    assert http.post(f"/v1/jobs/{job}/cancel").json()["state"] == "cancelled"
    assert http.get(f"/v1/jobs/{job}/result").status_code == 499


def test_events_of_a_job(http: httpx.Client, serve: Any) -> None:
    go_on = threading.Event()

    def script(job: Any) -> None:
        assert go_on.wait(WAIT_S)
        job.started()
        job.progress(1, 2, "decode")
        job.chunk(LlmChunk(delta=Delta(content="hi")))
        job.complete(LlmResult(content="hi"))

    serve(script, "talk", "llm")
    body = {"kind": "llm", "model": "talk", "params": {"prompt": "x"}, "stream": True}
    job = http.post("/v1/jobs", json=body).json()["id"]
    names = []
    with http.stream("GET", f"/v1/jobs/{job}/events") as answer:
        lines = answer.iter_lines()
        for line in lines:
            if line.startswith("event: "):
                names.append(line[7:])
                go_on.set()
                data = json.loads(next(lines)[6:])
                if line == "event: chunk":
                    assert data == {"seq": 0, "data": {"delta": {"content": "hi"}}}
                if line == "event: progress":
                    assert data == {"n": 1, "total": 2, "phase": "decode", "text": ""}
    assert names == ["job", "started", "progress", "chunk", "ended"]
    again = http.get(f"/v1/jobs/{job}/events").text
    assert "event: ended" in again
    assert again.endswith("data: [DONE]\n\n")


def test_the_same_idempotency_key_gives_the_same_job(http: httpx.Client, serve: Any) -> None:
    serve(command, "tool-once", "command")
    body = {"kind": "command", "model": "tool-once", "idempotency_key": "once", "wait": 30}
    first, second = (http.post("/v1/jobs", json=body).json()["id"] for _ in range(2))
    assert first == second
    other = http.post("/v1/jobs", json={**body, "params": {"args": {"n": 1}}})
    assert (other.status_code, other.json()["error"]["code"]) == (409, "conflict")


def test_jobs_of_another_tenant_are_not_there(served: Any, http: httpx.Client, serve: Any) -> None:
    serve(command, "tool-tenant", "command")
    job = http.post("/v1/jobs", json={"kind": "command", "model": "tool-tenant", "wait": 30}).json()["id"]
    secret = served.coordinator.keys.create("client", tenant="other")
    headers = {"authorization": f"Bearer {secret}"}
    for path in ("", "/result", "/events", "/files/x"):
        assert httpx.get(f"{served.url}/v1/jobs/{job}{path}", headers=headers).status_code == 404
    assert httpx.post(f"{served.url}/v1/jobs/{job}/cancel", headers=headers).status_code == 404
    assert httpx.get(f"{served.url}/v1/jobs", headers=headers).json()["data"] == []


def test_a_job_may_wait_for_its_worker(http: httpx.Client, serve: Any) -> None:
    body = {"kind": "command", "model": "tool-later", "wait_for_worker": True}
    job = http.post("/v1/jobs", json=body).json()["id"]
    serve(command, "tool-later", "command")
    assert finished(http, job)["state"] == "succeeded"


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"kind": "poetry"}, "kind"),
        ({"kind": None}, "kind"),
        ({"model": None}, "model"),
        ({"params": []}, "params"),
        ({"kind": "llm", "params": {"prompt": "x", "top_p": 7}}, "params.top_p"),
        ({"kind": "llm", "params": {"prompt": "x", "nope": 7}}, "params.nope"),
        ({"inputs": []}, "inputs"),
        ({"inputs": {"a/b": "aaaa"}}, "inputs.a/b"),
        ({"inputs": {"a": "http://x"}}, "inputs.a"),
        ({"inputs": {f"a{n}": "aaaa" for n in range(MAX_INPUTS + 1)}}, "inputs"),
        ({"kind": "llm", "params": {"prompt": "x"}, "inputs": {"image": "aaaa"}}, "inputs.image"),
        ({"kind": "audio_stt"}, "inputs.audio"),
        ({"priority": 101}, "priority"),
        ({"priority": 1.5}, "priority"),
        ({"deadline_ms": 0}, "deadline_ms"),
        ({"labels": {"a": 1}}, "labels"),
        ({"labels": []}, "labels"),
        ({"wait": -1}, "wait"),
        ({"wait": "long"}, "wait"),
        ({"stream": "yes"}, "stream"),
        ({"idempotency_key": "a\nb"}, "idempotency_key"),
        ({"vram_gb_estimate": -1}, "vram_gb_estimate"),
        ({"labels": {str(n): "x" * 190 for n in range(20)}}, "labels"),
        ({"run_after": "tomorrow"}, "run_after"),
        ({"run_after": "2026-11-22T06:00:00"}, "run_after"),
        ({"run_after": "9999-12-31T00:00:00Z"}, "run_after"),
        ({"run_after": True}, "run_after"),
        ({"run_after": -1}, "run_after"),
        ({"tenant": "me"}, "tenant"),
    ],
)
def test_refusals_name_the_field(http: httpx.Client, body: dict[str, Any], field: str) -> None:
    answer = http.post("/v1/jobs", json={"kind": "command", "model": "tool", **body})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, field)


def test_bad_queries(http: httpx.Client) -> None:
    for query, field in (("limit=0", "limit"), ("limit=x", "limit"), ("limit=101", "limit"), ("state=odd", "state")):
        answer = http.get(f"/v1/jobs?{query}")
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, field)
    assert http.get("/v1/jobs/nobody").status_code == 404


def test_a_workers_type_is_believed_only_when_it_looks_like_one() -> None:
    assert safe_mime("image/png") == "image/png"
    assert safe_mime("text/html\r\nset-cookie: x") == "application/octet-stream"


# ---- times, needs, attempts ---------------------------------------------------------------------------------


def test_a_job_may_wait_for_its_hour(http: httpx.Client, serve: Any) -> None:
    serve(command, "timed", "command")
    later = int(time.time() * 1000) + 3_600_000
    body = {"kind": "command", "model": "timed", "deadline_ms": 1000}
    job = http.post("/v1/jobs", json={**body, "run_after": later}).json()
    assert (job["state"], job["run_after_ms"], job["deadline_at_ms"]) == ("queued", later, later + 1000)
    date = datetime.fromtimestamp(later / 1000, timezone(timedelta(hours=2))).isoformat()
    dated = http.post("/v1/jobs", json={**body, "run_after": date}).json()
    assert dated["run_after_ms"] == later
    past = http.post("/v1/jobs", json={**body, "deadline_ms": 60_000, "run_after": "2026-01-01T00:00:00Z"}).json()
    assert finished(http, past["id"])["state"] == "succeeded"
    assert http.get(f"/v1/jobs/{job['id']}").json()["state"] == "queued"
    for one in (job, dated):
        assert http.post(f"/v1/jobs/{one['id']}/cancel").json()["state"] == "cancelled"


def test_a_job_that_no_worker_can_have_is_refused_at_once_or_waits_if_asked_to(http: httpx.Client, serve: Any) -> None:
    serve(command, "picky", "command", vram_threshold_gb=8.0)
    body = {"kind": "command", "model": "picky"}
    for more, field in (({"labels": {"trusted": "true"}}, "labels"), ({"vram_gb_estimate": 9}, "vram_gb_estimate")):
        answer = http.post("/v1/jobs", json={**body, **more})
        assert answer.status_code == 503
        error = answer.json()["error"]
        assert (error["code"], error["param"]) == ("no_worker", field)
    waiting = http.post("/v1/jobs", json={**body, "labels": {"trusted": "true"}, "wait_for_worker": True}).json()
    assert waiting["state"] == "queued"
    assert finished(http, http.post("/v1/jobs", json=body).json()["id"])["state"] == "succeeded", "it blocks nobody"
    again = http.get(f"/v1/jobs/{waiting['id']}").json()
    assert (again["state"], again["attempt"]) == ("queued", 0), "it was not claimed and put back"
    trusted = serve(command, "picky", "command", labels={"trusted": "true"})
    assert finished(http, waiting["id"])["state"] == "succeeded"
    assert [job.id for job in trusted.jobs] == [waiting["id"]]


def test_attempts_are_shown_and_a_failed_job_is_tried_again(http: httpx.Client, serve: Any, served: Any) -> None:
    broken = threading.Event()
    broken.set()

    def script(job: Any) -> None:
        if broken.is_set():
            raise FaultError(Fault("engine_failed", "The engine has no idea."))
        command(job)

    worker = serve(script, "fragile", "command")
    job = http.post("/v1/jobs", json={"kind": "command", "model": "fragile"}).json()["id"]
    assert http.post(f"/v1/jobs/{job}/retry").status_code in (409, 202), "as long as it runs it has not failed"
    failed = finished(http, job)
    assert (failed["state"], failed["dead"]) == ("failed", True)
    dead = http.get("/v1/jobs", params={"state": "failed", "dead": "1"}).json()["data"]
    assert job in [one["id"] for one in dead]
    assert http.get("/v1/jobs", params={"dead": "yes"}).status_code == 400
    broken.clear()
    answer = http.post(f"/v1/jobs/{job}/retry")
    assert (answer.status_code, answer.json()["state"], answer.json()["fault"]) == (202, "queued", None)
    done = finished(http, job)
    assert (done["state"], done["tries"]) == ("succeeded", 1)
    first, *_, last = done["attempts"]
    assert (first["worker"], first["outcome"], first["fault"]["code"]) == (
        worker.jobs[0] and failed["worker"],
        "failed",
        "engine_failed",
    )
    assert (last["outcome"], last["fault"]) == ("succeeded", None)
    assert first["number"] < last["number"]
    assert first["began_ms"] <= first["ended_ms"] <= last["ended_ms"]
    again = http.post(f"/v1/jobs/{job}/retry")
    assert (again.status_code, again.json()["error"]["code"]) == (409, "conflict")
    assert http.post("/v1/jobs/job_unknown/retry").status_code == 404


def test_a_tenant_sees_its_own_jobs_and_an_administrator_everybodys(
    http: httpx.Client, serve: Any, served: Any
) -> None:
    def fail(job: Any) -> None:
        raise FaultError(Fault("engine_failed", "No."))

    serve(fail, "owned", "command")
    job = http.post("/v1/jobs", json={"kind": "command", "model": "owned"}).json()["id"]
    assert finished(http, job)["state"] == "failed"
    keys = served.coordinator.keys
    for scope, status in (("client", 404), ("admin", 200)):
        secret = keys.create(scope, name="other", tenant="another")
        with httpx.Client(base_url=served.url, headers={"authorization": f"Bearer {secret}"}) as other:
            assert other.get(f"/v1/jobs/{job}").status_code == status
            assert other.post(f"/v1/jobs/{job}/cancel").status_code == status
            assert other.post(f"/v1/jobs/{job}/retry").status_code == (404 if status == 404 else 202)
