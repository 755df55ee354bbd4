"""What a tenant does not want kept is gone once it was delivered: from rows, files, journals and logs."""

from __future__ import annotations

import base64
import io
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from coordinator.testing import TENANT, FakeWorker, OfferedJob, Running, running
from protocol.faults import Fault, FaultError
from protocol.link_wire import LogBatch, LogLine, ModelOffer
from protocol.work import AudioResult, FreeResult, ImageResult, LlmResult, SttResult

PATIENCE_S = 60.0
KINDS = ("llm", "embedding", "audio_stt", "audio_tts", "image", "x-free")


@pytest.fixture
def state(tmp_path: Path) -> Path:
    return tmp_path / "state"


@pytest.fixture
def there(state: Path) -> Iterator[Running]:
    """A coordinator whose one tenant keeps nothing."""
    with running(state) as it:
        it.coordinator.parts.tenants.set(TENANT, store_content=False)
        yield it


@pytest.fixture
def http(there: Running) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=there.url, headers=there.headers, timeout=60) as client:
        yield client


def worker(there: Running, script: Callable[[OfferedJob], None]) -> FakeWorker:
    return FakeWorker(there, (ModelOffer(name="m", kinds=KINDS, engine="fake", slots=4),), script)


def until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE_S
    while not true():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


def where(state: Path, canary: str) -> list[str]:
    """Files of the state folder that hold the canary, as it is or as a client may have coded it."""
    coded = [canary.encode(), base64.b64encode(canary.encode())]
    found = []
    for folder, _, names in os.walk(state):  # passes over folders that go meanwhile, which `Path.rglob` does not
        for name in names:
            path = Path(folder, name)
            with suppress(FileNotFoundError):
                data = path.read_bytes()
                if any(one in data for one in coded):
                    found.append(str(path.relative_to(state)))
    return found


def gone(there: Running, state: Path, canary: str) -> None:
    """Wait until nothing holds the canary."""
    until(lambda: not where(state, canary))


async def ring(there: Running) -> None:
    """Have what was deleted taken out of the journal now."""
    there.coordinator.privacy._bell.set()


def answer(job: OfferedJob) -> None:
    """What an engine of the kind would do, with the prompt in all that comes out."""
    job.started()
    said = str(job.params)
    if "fail-now" in said:
        raise FaultError(Fault("engine_failed", f"I do not like {said}", detail={"stderr_tail": [said]}))
    match job.offer.kind:
        case "llm":
            if job.offer.stream:
                job.chunk({"delta": {"content": said}})
            job.complete(LlmResult(content=said), {"prompt_tokens": 1.0, "completion_tokens": 1.0})
        case "image":
            job.upload("0.png", said.encode(), "image/png")
            job.complete(ImageResult(seeds=[1], width=64, height=64, format="png"))
        case "audio_tts":
            job.upload("speech.wav", said.encode(), "audio/wav")
            job.complete(AudioResult(duration=1.0, sample_rate=8000, format="wav"))
        case "audio_stt":
            job.complete(SttResult(text=job.read("audio").decode("latin-1"), language="en", duration=1.0))
        case "rerank" | "embedding":
            job.complete(FreeResult(output={"said": said}))
        case _:
            job.upload("a.txt", said.encode(), "text/plain")
            job.upload("b.txt", said.encode(), "text/plain")
            job.complete(FreeResult(output={"said": said}))


def chat(canary: str, **more: Any) -> dict[str, Any]:
    return {"model": "m", "messages": [{"role": "user", "content": canary}], **more}


# ---- each way by which something is delivered ---------------------------------------------------------------


def test_an_answer_that_was_sent_is_forgotten_and_its_key_is_answered(there, http, state):
    with worker(there, answer):
        head = {"idempotency-key": "k1"}
        first = http.post("/v1/chat/completions", json=chat("canary-chat"), headers=head)
        assert "canary-chat" in first.text
        gone(there, state, "canary-chat")
        again = http.post("/v1/chat/completions", json=chat("canary-chat"), headers=head)
        assert again.status_code == 409
        assert "its content was deleted" in again.json()["error"]["message"]
        assert http.get(f"/v1/jobs/{first.headers['x-bulkhead-job']}/result").status_code == 404
        job = http.get(f"/v1/jobs/{first.headers['x-bulkhead-job']}").json()
        assert (job["state"], job["usage"]["prompt_tokens"]) == ("succeeded", 1.0), "it is counted all the same"


def test_a_stream_that_was_read_is_forgotten(there, http, state):
    with worker(there, answer):
        with http.stream("POST", "/v1/chat/completions", json=chat("canary-stream", stream=True)) as stream:
            assert "canary-stream" in stream.read().decode()
        gone(there, state, "canary-stream")


def test_a_failure_that_quotes_the_prompt_is_forgotten(there, http, state):
    with worker(there, answer):
        answered = http.post("/v1/chat/completions", json=chat("fail-now canary-fail"))
        assert (answered.status_code, answered.json()["error"]["code"]) == (500, "engine_failed")
        gone(there, state, "canary-fail")
        job = http.get(f"/v1/jobs/{answered.headers['x-bulkhead-job']}").json()
        assert job["fault"]["code"] == "engine_failed"
        assert "canary" not in json.dumps(job)


def test_files_are_forgotten_with_what_they_came_with(there, http, state):
    with worker(there, answer):
        assert "canary-say" in http.post("/v1/audio/speech", json={"model": "m", "input": "canary-say"}).text
        gone(there, state, "canary-say")
        heard = http.post(
            "/v1/audio/transcriptions", data={"model": "m"}, files={"file": ("a.wav", io.BytesIO(b"canary-heard"))}
        )
        assert "canary-heard" in heard.text
        gone(there, state, "canary-heard")
        http.post("/v1/images/generations", json={"model": "m", "prompt": "canary-b64"}).raise_for_status()
        gone(there, state, "canary-b64")


def test_a_picture_behind_a_url_is_forgotten_once_it_was_fetched(there, http, state):
    with worker(there, answer):
        body = {"model": "m", "prompt": "canary-url", "response_format": "url"}
        url = http.post("/v1/images/generations", json=body).json()["data"][0]["url"]
        assert httpx.get(url, headers={"range": "bytes=0-9"}).status_code == 206
        there.call(there.coordinator.privacy.forget_delivered)
        assert where(state, "canary-url"), "a part is not the whole"
        assert "canary-url" in httpx.get(url).text
        gone(there, state, "canary-url")
        assert httpx.get(url).status_code == 404


def test_a_job_is_forgotten_when_all_its_files_were_fetched(there, http, state):
    with worker(there, answer):
        asked = {"kind": "x-free", "model": "m", "params": {"say": "canary-job"}, "wait": 30}
        job = http.post("/v1/jobs", json=asked).json()
        assert "canary-job" in http.get(f"/v1/jobs/{job['id']}/result").text
        assert "canary-job" in http.get(job["files"][0]["url"]).text
        there.call(there.coordinator.privacy.forget_delivered)
        assert where(state, "canary-job")
        assert "canary-job" in http.get(job["files"][1]["url"]).text
        gone(there, state, "canary-job")


def test_a_result_without_files_is_forgotten_when_it_was_fetched(there, http, state):
    with worker(there, answer):
        asked = {"kind": "llm", "model": "m", "params": {"messages": chat("canary-got")["messages"]}, "wait": 30}
        job = http.post("/v1/jobs", json=asked).json()
        http.head(f"/v1/jobs/{job['id']}/result").raise_for_status()
        there.call(there.coordinator.privacy.forget_delivered)
        assert where(state, "canary-got"), "nothing was delivered yet"
        assert "canary-got" in http.get(f"/v1/jobs/{job['id']}/result").text
        gone(there, state, "canary-got")


def test_what_nobody_fetches_goes_after_a_while(there, http, state):
    with worker(there, answer):
        asked = {"kind": "x-free", "model": "m", "params": {"say": "canary-late"}, "wait": 30}
        http.post("/v1/jobs", json=asked).raise_for_status()
        there.call(there.coordinator.privacy.sweep)
        assert where(state, "canary-late")
        there.coordinator._store.shift_clock(3_600_000 + 60_000)
        there.call(there.coordinator.privacy.sweep)
        there.call(ring, there)
        assert not [name for name in where(state, "canary-late") if "sqlite" not in name]
        there.coordinator._store.settle()
        gone(there, state, "canary-late")


def test_what_a_client_left_in_the_middle_goes_with_the_next_look(there, http, state):
    """Its job is cancelled, so there is nothing to deliver, and nobody to deliver it to."""

    def endless(job: OfferedJob) -> None:
        job.started()
        job.chunk({"delta": {"content": "canary-left"}})
        assert job.cancelled.wait(PATIENCE_S)
        job.fail(Fault("cancelled", "as asked: canary-left"))

    with worker(there, endless):
        with http.stream("POST", "/v1/chat/completions", json=chat("canary-left", stream=True)) as stream:
            assert any("canary-left" in line for line in stream.iter_lines())
            assert where(state, "canary-left")
        until(lambda: [job["state"] for job in http.get("/v1/jobs").json()["data"]] == ["cancelled"])
        there.loop.call_soon_threadsafe(there.coordinator.privacy.look)
        gone(there, state, "canary-left")


def test_a_blow_between_forgetting_and_emptying_the_journal_leaves_nothing(there, http, state, tmp_path, monkeypatch):
    store, dead = there.coordinator._store, tmp_path / "dead"
    monkeypatch.setattr(store, "settle", lambda: False)
    with worker(there, answer):
        http.post("/v1/chat/completions", json=chat("canary-blow")).raise_for_status()
        until(lambda: not store.unforgotten([TENANT], 0, store.now_ms() + 1))
        shutil.copytree(state, dead)  # what a killed process leaves
        assert where(dead, "canary-blow") == ["coordinator.sqlite-wal"]
    with running(dead) as again:
        gone(again, dead, "canary-blow")


def test_a_tenant_that_keeps_its_content_keeps_it(there, http, state):
    there.coordinator.parts.tenants.set(TENANT, store_content=True)
    with worker(there, answer):
        first = http.post("/v1/chat/completions", json=chat("canary-kept"), headers={"idempotency-key": "k"})
        there.coordinator._store.shift_clock(3_600_000 * 2)
        there.call(there.coordinator.privacy.sweep)
        again = http.post("/v1/chat/completions", json=chat("canary-kept"), headers={"idempotency-key": "k"})
        assert again.json()["choices"] == first.json()["choices"]


def test_a_batch_leaves_nothing_once_its_output_was_fetched(there, http, state):
    lines = [
        {"custom_id": str(n), "method": "POST", "url": "/v1/chat/completions", "body": chat(f"canary-batch {word}")}
        for n, word in enumerate(("good", "fail-now"))
    ]
    text = "\n".join(json.dumps(line) for line in lines)
    with worker(there, answer):
        file = http.post("/v1/files", data={"purpose": "batch"}, files={"file": ("in.jsonl", text.encode())}).json()
        asked = {"input_file_id": file["id"], "endpoint": "/v1/chat/completions", "completion_window": "24h"}
        batch = http.post("/v1/batches", json=asked).json()
        until(lambda: http.get(f"/v1/batches/{batch['id']}").json()["status"] == "completed")
        until(lambda: http.get(f"/v1/files/{file['id']}").status_code == 404)
        batch = http.get(f"/v1/batches/{batch['id']}").json()
        for name in ("output_file_id", "error_file_id"):
            assert "canary-batch" in http.get(f"/v1/files/{batch[name]}/content").text
        gone(there, state, "canary-batch")
        assert http.get(f"/v1/files/{batch['output_file_id']}").status_code == 404


def test_what_workers_told_of_a_job_that_is_forgotten_goes_too(there, http, state):
    kept = there.coordinator.parts.dispatcher.attempts.kept

    def talks(job: OfferedJob) -> None:
        worker_.send(LogBatch(lines=(LogLine("then", "info", str(job.params), job.id),)))
        answer(job)

    def told(job: str) -> list[str]:
        async def asked() -> list[str]:
            return [line.message for line in kept.of(job).lines]

        found: list[str] = there.call(asked)
        return found

    with worker(there, talks) as worker_:
        asked = {"kind": "llm", "model": "m", "params": {"messages": chat("canary-told")["messages"]}, "wait": 30}
        job = http.post("/v1/jobs", json=asked).json()["id"]
        (line,) = told(job)
        assert "canary-told" in line
        assert "canary-told" in http.get(f"/v1/jobs/{job}/result").text
        until(lambda: not told(job))
        worker_.send(LogBatch(lines=(LogLine("then", "info", "marker", "j"), LogLine("then", "info", "late", job))))
        worker_.send(LogBatch(lines=(LogLine("then", "info", "marker", "other"),)))
        until(lambda: bool(told("other")))
        assert (told("j"), told(job)) == (["marker"], [])


# ---- logs --------------------------------------------------------------------------------------------------


def test_no_prompt_is_in_any_log_by_default(there, http, state, caplog):
    """Every route that takes content, through success, failure and refusal, with all that we say ourselves."""
    canary, other = "canary-log", "fail-now canary-log"
    with caplog.at_level(logging.INFO), caplog.at_level(logging.DEBUG, "coordinator"), worker(there, answer):
        for said in (canary, other):
            asks: list[tuple[str, dict[str, Any]]] = [
                ("/v1/chat/completions", {"json": chat(said)}),
                ("/v1/chat/completions", {"json": chat(said, stream=True)}),
                ("/v1/chat/completions", {"json": chat(said, temperature=said)}),
                ("/v1/chat/completions", {"json": chat(said, **{said: 1})}),
                ("/v1/completions", {"json": {"model": "m", "prompt": said}}),
                ("/v1/embeddings", {"json": {"model": "m", "input": said}}),
                ("/v1/rerank", {"json": {"model": "m", "query": said, "documents": [said]}}),
                ("/v1/audio/speech", {"json": {"model": "m", "input": said}}),
                (
                    "/v1/audio/transcriptions",
                    {"data": {"model": "m", "prompt": said}, "files": {"file": said.encode()}},
                ),
                ("/v1/images/generations", {"json": {"model": "m", "prompt": said}}),
                ("/v1/videos", {"json": {"model": "m", "prompt": said}}),
                ("/v1/jobs", {"json": {"kind": "x-free", "model": "m", "params": {"say": said}, "wait": 30}}),
                ("/v1/jobs", {"content": said.encode()}),
                ("/v1/files", {"data": {"purpose": said}, "files": {"file": said.encode()}}),
                ("/v1/batches", {"json": {"input_file_id": said}}),
            ]
            for path, ask in asks:
                http.post(path, **ask)
    mine = [record.getMessage() for record in caplog.records if not record.name.startswith(("httpx", "httpcore"))]
    assert [line for line in mine if "canary" in line] == []


# ---- the other stores --------------------------------------------------------------------------------------


@pytest.fixture
def far(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Running, Any]]:
    """A coordinator over PostgreSQL and S3, and its store."""
    pytest.importorskip("obstore", reason="the extra s3 is not installed")
    pytest.importorskip("moto", reason="moto, the S3 server of these tests, is not installed")
    pytest.importorskip("psycopg", reason="the extra postgres is not installed")
    from coordinator.blobs.opening import BlobsConfig, open_blobs
    from coordinator.store.postgres import PostgresStore
    from coordinator.testing_postgres import postgres_server, why_not
    from tests.coordinator.s3_rig import ID, SECRET, s3_server

    if reason := why_not():
        pytest.skip(reason)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", ID)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    with s3_server() as rig, postgres_server() as server, server.space() as url:
        place = BlobsConfig(url="s3://files/far", endpoint=rig.endpoint)
        store = PostgresStore(url)
        with running(
            tmp_path / "far",
            open_store=lambda: store,
            open_blobs=lambda: open_blobs(place, tmp_path / "far" / "blobs"),
        ) as it:
            it.coordinator.parts.tenants.set(TENANT, store_content=False)
            yield it, store


def test_nothing_is_left_in_the_tables_of_postgres_nor_in_s3(far: tuple[Running, Any], tmp_path: Path) -> None:
    there, store = far
    blobs: Any = there.coordinator.parts.blobs
    tables = [
        row["name"]
        for row in store._read("SELECT tablename AS name FROM pg_tables WHERE schemaname = current_schema()")
    ]
    assert {"jobs", "attempts", "files", "batches", "batch_items", "input_blobs"} <= set(tables)

    def held() -> list[str]:
        found = [name for name in tables if store._read(f"SELECT 1 AS x FROM {name} AS t WHERE {_HOLDS} LIMIT 1")]
        for name, _ in blobs._listed(""):
            found += [name] if name.startswith(("in/", "out/", "up/")) else []
        return found + where(tmp_path / "far", "canary-far")

    with httpx.Client(base_url=there.url, headers=there.headers, timeout=60) as http, worker(there, answer):
        asked = {"kind": "x-free", "model": "m", "params": {"say": "canary-far"}, "wait": 30}
        job = http.post("/v1/jobs", json=asked).json()
        assert "jobs" in held(), "the search finds what there is"
        assert any(name.startswith("out/") for name in held())
        for file in job["files"]:
            assert "canary-far" in http.get(file["url"]).text
        assert "canary-far" in http.post("/v1/chat/completions", json=chat("canary-far")).text
        http.post("/v1/chat/completions", json=chat("fail-now canary-far"))
        http.post("/v1/audio/transcriptions", data={"model": "m"}, files={"file": ("a", io.BytesIO(b"canary-far"))})
        until(lambda: not held())


# Each row as text; bytea is written in hexadecimal there.
_TEXT = "CAST(t AS text)"
_HOLDS = f"strpos({_TEXT}, 'canary-far') > 0 OR strpos({_TEXT}, '{b'canary-far'.hex()}') > 0"
