"""Many jobs in one call, over a real server."""

from __future__ import annotations

import base64
import itertools
import threading
import time
from collections.abc import Iterable
from typing import Any

import httpx
import pytest

from coordinator.blobs.folder import FolderBlobs
from coordinator.lots_api import MAX_JOBS
from protocol.work import CommandResult, SttResult

WAIT_S = 60.0
_numbers = itertools.count()


def line(model: str, **more: Any) -> dict[str, Any]:
    return {"kind": "command", "model": model, **more}


def command(job: Any) -> None:
    job.complete(CommandResult(exit_code=0, output_tail=[]))


def ended(http: httpx.Client, lot: str, count: int) -> dict[str, Any]:
    """The batch, once so many of its jobs are over."""
    end = time.monotonic() + WAIT_S
    while True:
        found = dict(http.get(f"/v1/jobs/batch/{lot}").json())
        if sum(found["counts"][state] for state in ("succeeded", "failed", "cancelled")) == count:
            return found
        assert time.monotonic() < end, found
        time.sleep(0.01)


def test_each_line_has_its_answer_and_the_whole_its_progress(http: httpx.Client, serve: Any) -> None:
    serve(command, "many", "command")
    key = f"lot-{next(_numbers)}"
    first = http.post("/v1/jobs", json=line("many", idempotency_key=key)).json()
    jobs = [
        line("many"),
        line("nobody has this"),
        {"kind": "command"},
        "no object",
        line("many", idempotency_key=key),
        line("many", idempotency_key=key, params={"args": {"n": 1}}),
        line("many", wait=True),
        line("many", priority=5),
    ]
    answer = http.post("/v1/jobs/batch", json={"jobs": jobs})
    assert answer.status_code == 200, answer.text
    lot = answer.json()
    assert (lot["object"], lot["total"], lot["refused"]) == ("job.batch", 8, 5)
    assert lot["counts"] == {"queued": 2, "running": 0, "succeeded": 0, "failed": 0, "cancelled": 0}
    said = [(one["index"], one["error"]["code"] if "error" in one else one["state"]) for one in lot["jobs"]]
    assert [index for index, _ in said] == list(range(8))
    assert said[1:4] == [(1, "model_not_found"), (2, "invalid_parameter"), (3, "invalid_parameter")]
    assert lot["jobs"][2]["error"]["param"] == "model"
    assert lot["jobs"][4]["id"] == first["id"]
    assert (said[5], said[6]) == ((5, "conflict"), (6, "invalid_parameter"))
    made = [lot["jobs"][0], lot["jobs"][7]]
    assert [(one["batch"], one["priority"]) for one in made] == [(lot["id"], 0), (lot["id"], 5)]
    assert ended(http, lot["id"], 2)["counts"] == {
        "queued": 0,
        "running": 0,
        "succeeded": 2,
        "failed": 0,
        "cancelled": 0,
    }


def test_a_batch_is_cancelled_as_a_whole(http: httpx.Client, serve: Any) -> None:
    def script(job: Any) -> None:
        job.started()
        assert job.cancelled.wait(WAIT_S)

    worker = serve(script, "slow", "command", slots=1)
    lot = http.post("/v1/jobs/batch", json={"jobs": [line("slow")] * 5}).json()["id"]
    end = time.monotonic() + WAIT_S
    while not http.get(f"/v1/jobs/batch/{lot}").json()["counts"]["running"]:
        assert time.monotonic() < end
        time.sleep(0.01)
    over = http.post(f"/v1/jobs/batch/{lot}/cancel").json()
    assert over["counts"] == {"queued": 0, "running": 0, "succeeded": 0, "failed": 0, "cancelled": 5}
    assert worker.jobs[0].cancelled.wait(WAIT_S), "the worker was told"
    assert http.post(f"/v1/jobs/batch/{lot}/cancel").json() == over


def test_inputs_come_with_their_lines_and_those_of_refused_lines_are_not_kept(
    http: httpx.Client, serve: Any, served: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[bytes] = []
    done = threading.Event()

    def script(job: Any) -> None:
        heard.append(job.read("audio"))
        job.complete(SttResult(text="yes", language="en", duration=1.0))
        done.set()

    serve(script, "hears", "audio_stt")
    kept: list[str] = []
    blobs = served.coordinator.parts.blobs

    def noted(job: str, keys: Iterable[str]) -> None:
        keys = list(keys)
        kept.extend(keys)
        FolderBlobs.delete(blobs, job, keys)

    monkeypatch.setattr(blobs, "delete", noted)
    sound = "data:audio/wav;base64," + base64.b64encode(b"RIFF0000WAVE").decode()
    jobs = [{"kind": "audio_stt", "model": name, "inputs": {"audio": sound}} for name in ("hears", "no such model")]
    answers = http.post("/v1/jobs/batch", json={"jobs": jobs}).json()["jobs"]
    assert "error" not in answers[0]
    assert answers[1]["error"]["code"] == "model_not_found"
    assert done.wait(WAIT_S)
    assert heard == [b"RIFF0000WAVE"]
    assert len(kept) == 1, "the refused line's, and not the other's"


def test_what_is_no_batch_is_refused(http: httpx.Client) -> None:
    for body in ({}, {"jobs": []}, {"jobs": {}}, {"jobs": [line("m")] * (MAX_JOBS + 1)}, {"jobs": [line("m")], "x": 1}):
        assert http.post("/v1/jobs/batch", json=body).json()["error"]["code"] == "invalid_parameter"
    assert http.get("/v1/jobs/batch/lot_unknown").status_code == 404
    assert http.post("/v1/jobs/batch/lot_unknown/cancel").status_code == 404
