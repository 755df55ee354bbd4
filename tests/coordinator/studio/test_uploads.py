"""Results of studio workers that are files: what is taken, what becomes of it, and what is refused."""

from __future__ import annotations

import io
import socket
import struct
import wave
import zlib
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from starlette.requests import Request
from starlette.responses import Response

from coordinator.studio import routes
from coordinator.studio.jobs import StudioJobs
from coordinator.testing_studio import PATIENCE_S
from tests.coordinator.studio_rig import FAST, House, until


def png(width: int = 8, height: int = 6) -> bytes:
    """A real picture."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    rows = b"".join(b"\0" + bytes(3 * width) for _ in range(height))
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def wav(seconds: float = 0.5) -> bytes:
    """Real sound."""
    target = io.BytesIO()
    with wave.open(target, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(8000)
        file.writeframes(bytes(int(8000 * seconds) * 2))
    return target.getvalue()


MP4 = b"\0\0\0\x18ftypisom" + bytes(100)
PICTURE = {"prompt": "a red square", "width": 64, "height": 64, "format": "png", "seed": 4}


def test_a_picture_goes_to_the_client_with_its_real_size(house: House) -> None:
    with house.worker().session() as it:
        body = {"model": f"{house.tag}-image", "prompt": "a red square", "size": "64x64", "response_format": "url"}
        asked = house.ask("/v1/images/generations", json=body)
        claim = it.claim()
        task = {"kind": "image", "prompt": "a red square", "width": 64, "height": 64, "ext": "png"}
        assert claim["task"] == task
        assert claim["modelSource"]["engine"] == "sd-cpp"
        assert it.worker.upload(claim["jobId"], png(64, 32)).json() == {"ok": True}
    answer = asked.result().json()
    assert answer["size"] == "64x32"
    assert httpx.get(answer["data"][0]["url"]).content == png(64, 32)


def test_speech_goes_to_the_client(house: House) -> None:
    with house.worker().session() as it:
        body = {"model": f"{house.tag}-audio_tts", "input": "hello", "response_format": "wav", "voice": "default"}
        asked = house.ask("/v1/audio/speech", json=body)
        claim = it.claim()
        assert claim["task"] == {"kind": "audio_tts", "text": "hello", "voice": "default", "speed": 1.0, "ext": "wav"}
        assert it.worker.upload(claim["jobId"], wav(), ext="wav").is_success
    answer = asked.result()
    assert answer.content == wav()
    assert answer.headers["x-audio-sample-rate"] == "8000"
    job = house.job(claim["jobId"])
    assert job["usage"] == {"characters": 5.0, "audio_seconds": 0.5}


def test_a_film_and_the_next_offer_follow_the_upload(house: House) -> None:
    first = house.submit("video", {"prompt": "p", "format": "mp4", "seconds": 1})
    second = house.submit("video", {"prompt": "q", "format": "mp4"})
    with house.worker().session() as it:
        claim = it.claim()
        assert (claim["jobId"], claim["task"]["seconds"], claim["task"]["fps"]) == (first, 1.0, 12)
        assert it.quiet(0.1)
        fields = {"prompt": "p", "ext": "mp4", "generationMeta": '{"seed": 3}'}
        assert it.worker.upload(first, MP4, ext="mp4", fields=fields).is_success
        assert it.claim()["jobId"] == second
    assert house.job(first)["files"][0]["name"] == "video.mp4"
    assert house.result(first)["frames"] == 12


def test_inputs_are_fetched_without_any_token(house: House) -> None:
    with house.worker(base="/outer/graphics/api").session() as it:
        form = {"model": f"{house.tag}-audio_stt", "language": "en"}
        asked = house.ask("/v1/audio/transcriptions", data=form, files={"file": ("a.wav", wav())})
        claim = it.claim()
        task = claim["task"]
        assert (task["language"], task["timestamps"]) == ("en", "segment")
        assert task["inputUrl"].startswith(f"{house.url}/outer/graphics/api/blobs/")
        assert httpx.get(task["inputUrl"]).content == wav()
        assert httpx.get(task["inputUrl"].replace("sig=", "sig=0")).status_code == 403
        result = {"text": "said", "language": "en", "duration": 1.5}
        it.send("completeJson", jobId=claim["jobId"], result=result)
        it.expect("completeAck")
    assert asked.result().json()["text"] == "said"


def test_a_start_image_is_part_of_the_claim(house: House) -> None:
    import base64

    data = base64.b64encode(png()).decode()
    body = {"kind": "image", "model": f"{house.tag}-image", "params": {"prompt": "p", "strength": 0.5}}
    files = {"image": f"data:image/png;base64,{data}"}
    made = house.client.post("/v1/jobs", json={**body, "inputs": files, "wait_for_worker": True})
    assert made.is_success, made.text
    with house.worker().session() as it:
        task = it.claim()["task"]
        assert task["denoise"] == 0.5
        assert httpx.get(task["initImageUrl"]).content == png()


# ---- refused -----------------------------------------------------------------------------------------------


def test_a_job_of_another_worker_or_of_nobody_is_a_conflict(house: House) -> None:
    waiting, done = house.submit("image", PICTURE), "job-nobody-knows"
    with house.worker().session() as holder, house.worker().session() as other:
        job = holder.claim()["jobId"]
        assert job == waiting
        for name in (job, done):
            assert other.worker.upload(name, png()).status_code in (404, 409)
        assert other.worker.upload(job, png(), headers=holder.worker.headers).status_code == 401
        assert other.worker.upload(job, png(), headers={"authorization": "Bearer wrong"}).status_code == 401
        assert other.worker.upload(job, png(), headers={"x-nothing": "1"}).status_code == 401
        until(lambda: house.job(job)["state"] == "running")
        assert holder.worker.upload(job, png()).is_success
        assert holder.worker.upload(job, png()).status_code == 409  # it is done, and stays what it is


def test_without_a_session_nothing_is_claimed(house: House) -> None:
    worker = house.worker()
    job = house.submit("image", PICTURE)
    assert worker.upload(job, png()).status_code == 409
    with worker.session() as it:
        assert it.claim()["jobId"] == job
    until(lambda: house.seen(worker) is None)
    assert worker.upload(job, png()).status_code == 409


FORMS: list[tuple[dict[str, Any], int]] = [
    ({"data": {"prompt": "p", "ext": "png"}, "files": {"other": ("x", b"")}}, 400),
    ({"files": [("image", ("a.png", png())), ("image", ("b.png", png()))]}, 400),
    ({"data": {"ext": "../../x"}, "files": {"image": ("../../x", png())}}, 400),
    ({"data": {"ext": "png" * 9}, "files": {"image": ("a.png", png())}}, 400),
    ({"data": {"prompt": "p" * 2**21}, "files": {"image": ("a.png", png())}}, 413),
    ({"content": b"{}", "headers": {"content-type": "application/json"}}, 415),
    ({"content": b"rubbish", "headers": {"content-type": "multipart/form-data; boundary=x"}}, 400),
    ({"content": b"", "headers": {"content-type": "multipart/form-data"}}, 400),
]


def test_what_is_no_result_is_refused_and_the_job_stays_with_its_worker(house: House) -> None:
    job = house.submit("image", PICTURE)
    with house.worker().session() as it:
        it.claim()
        for request, status in FORMS:
            request = {**request, "headers": {**it.worker.headers, **request.get("headers", {})}}
            answer = it.worker.post(job, **request)
            assert answer.status_code == status, (request.get("files"), answer.text)
        until(lambda: house.job(job)["state"] == "running")
        assert it.worker.upload(job, png()).is_success
    assert house.job(job)["files"][0]["name"] == "image-0.png"


@pytest.mark.parametrize("content", [b"", b"no picture", b"<html>", wav(), b"\xff\xd8\xff a jpeg"])
def test_a_file_that_is_not_what_the_job_asks_for_ends_the_attempt(house: House, content: bytes) -> None:
    """By 409 the worker lets go: after a 5xx it would send the same file again, while nobody else gets the job."""
    job, waiting = house.submit("image", PICTURE, max_attempts=2), ""
    with house.worker().session() as it:
        for _ in range(2):
            assert it.claim()["jobId"] == job
            answer = it.worker.upload(job, content)
            assert answer.status_code == 409
            assert "Expected png" in answer.text or "empty" in answer.text
        it.send("fail", jobId=job, error="HTTP 409", retryable=True)  # as some workers do then
        assert it.expect("failAck")["jobId"] == job
        seen = house.ended(job)
        assert (seen["state"], seen["fault"]["code"], seen["tries"]) == ("failed", "engine_protocol", 2)
        assert it.worker.upload(job, png()).status_code == 409
        waiting = house.submit("image", PICTURE)
        assert it.claim()["jobId"] == waiting
        assert it.worker.upload(waiting, png()).is_success


def test_a_file_that_was_lost_on_its_way_into_the_store_is_no_success(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    """2xx would tell the worker that its result is kept; it is judged by the blobs, after it was received."""

    async def lost(*_which: Any) -> None:
        return None

    job = house.submit("image", PICTURE, max_attempts=1)
    with house.worker().session() as it:
        it.claim()
        with monkeypatch.context() as patched:
            patched.setattr(house.there.coordinator.parts.blobs, "find_output", lost)
            assert it.worker.upload(job, png()).status_code == 409
        assert house.ended(job)["fault"]["code"] == "upload_failed"


def test_a_file_for_a_kind_of_json_results_is_refused(house: House) -> None:
    job = house.submit()
    with house.worker().session() as it:
        it.claim()
        assert it.worker.upload(job, png()).status_code == 400
        other = house.submit("image", PICTURE)
        it.send("fail", jobId=job, error="x", retryable=False)
        it.expect("failAck")
        assert it.claim()["jobId"] == other
        it.send("completeJson", jobId=other, result={"text": "x"})
        assert it.expect("completeAck")["jobId"] == other
        it.beat()


def test_what_comes_after_a_cancel_is_taken_and_dropped(house: House) -> None:
    job = house.submit("image", PICTURE)
    with house.worker().session() as it:
        it.claim()
        house.client.post(f"/v1/jobs/{job}/cancel").raise_for_status()
        assert it.worker.upload(job, png()).is_success
        it.beat()
    seen = house.job(job)
    assert (seen["state"], seen["files"], seen["usage"]) == ("cancelled", [], {"images": 1.0})
    assert not list(house.there.coordinator.parts.blobs.path(f"{job}/1/{'0' * 64}-x").parent.glob("*"))


@pytest.mark.parametrize("sent", [b"", b"--x\r\n", b'--x\r\ncontent-disposition: form-data; name="image"\r\n\r\nab'])
def test_an_upload_that_stalls_is_ended(house: House, sent: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    idle_s, real = 0.5, routes.receive

    async def receive(request: Request, jobs: StudioJobs, told_s: float, *rest: Any) -> Response:
        assert told_s == FAST.upload_idle_s
        return await real(request, jobs, idle_s, *rest)

    monkeypatch.setattr(routes, "receive", receive)
    job = house.submit("image", PICTURE)
    with house.worker().session() as it:
        it.claim()
        address = urlsplit(house.url)
        head = (
            f"POST /graphics/api/workers/{it.worker.id}/jobs/{job}/complete HTTP/1.1\r\nhost: x\r\n"
            f"authorization: Bearer {it.worker.token}\r\ncontent-type: multipart/form-data; boundary=x\r\n"
            "content-length: 1000\r\n\r\n"
        )
        with socket.create_connection((address.hostname, address.port), timeout=PATIENCE_S) as slow:
            slow.sendall(head.encode() + sent)
            assert slow.recv(100).startswith(b"HTTP/1.1 408")
        idle_s = PATIENCE_S
        assert it.worker.upload(job, png()).is_success


def test_a_session_that_ends_during_an_upload_makes_it_late(house: House) -> None:
    """The claim went with the session: the file is a conflict, and the job runs once more, elsewhere."""
    job = house.submit("image", PICTURE)
    worker = house.worker()
    it = worker.session()
    it.claim()
    address = urlsplit(house.url)
    part = b'--x\r\ncontent-disposition: form-data; name="image"\r\n\r\n' + png() + b"\r\n--x--\r\n"
    head = (
        f"POST /graphics/api/workers/{worker.id}/jobs/{job}/complete HTTP/1.1\r\nhost: x\r\n"
        f"authorization: Bearer {worker.token}\r\ncontent-type: multipart/form-data; boundary=x\r\n"
        f"content-length: {len(part)}\r\n\r\n"
    )
    with socket.create_connection((address.hostname, address.port), timeout=PATIENCE_S) as slow:
        slow.sendall(head.encode() + part[:60])
        until(lambda: house.job(job)["state"] == "running")
        it.drop()
        until(lambda: house.job(job)["state"] == "queued")  # until then its end would count, late as it is
        slow.sendall(part[60:])
        assert slow.recv(100).startswith(b"HTTP/1.1 409")
    with house.worker().session() as other:
        assert other.claim()["jobId"] == job
        assert other.worker.upload(job, png()).is_success
    assert house.job(job)["state"] == "succeeded"
