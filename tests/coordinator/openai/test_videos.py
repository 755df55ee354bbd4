"""Videos: create, poll, fetch, delete; JSON and multipart; a start image."""

from __future__ import annotations

import base64
import threading
import time
from typing import Any

import httpx
import openai
import pytest

from protocol.faults import Fault, FaultError
from protocol.work import VideoResult

# The official client warns of OpenAI's own service; its routes are what we serve.
pytestmark = pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning")

PNG = b"\x89PNG\r\n\x1a\n" + bytes(100)
WAIT_S = 60.0


def until(check: Any) -> Any:
    """Poll as a client does, bounded."""
    end = time.monotonic() + WAIT_S
    while not (value := check()):
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.01)
    return value


def finish(job: Any) -> None:
    params = job.params
    job.upload("video." + params.format, b"frames", "video/webm")
    result = VideoResult(
        width=params.width,
        height=params.height,
        frames=params.frames,
        fps=params.fps,
        format=params.format,
        codec="vp9",
        seed=1,
    )
    job.complete(result, {"frames": params.frames})


def test_the_life_of_a_video(ai: openai.OpenAI, http: httpx.Client, serve: Any) -> None:
    go_on = threading.Event()

    def script(job: Any) -> None:
        job.started()
        job.progress(1, 4, "step")
        assert go_on.wait(WAIT_S)
        finish(job)

    worker = serve(script, "film", "video")
    video = ai.videos.create(model="film", prompt="waves", seconds="2", size="64x48", extra_body={"fps": 6})  # type: ignore[arg-type]
    assert (video.object, video.status, video.seconds, video.size) == ("video", "queued", "2", "64x48")
    until(lambda: ai.videos.retrieve(video.id).progress == 25)
    assert ai.videos.retrieve(video.id).status == "in_progress"
    with pytest.raises(openai.NotFoundError, match="in_progress"):
        ai.videos.download_content(video.id)
    go_on.set()
    until(lambda: ai.videos.retrieve(video.id).status == "completed")
    done = ai.videos.retrieve(video.id)
    assert (done.progress, done.prompt) == (100, "waves")
    assert done.completed_at
    content = ai.videos.download_content(video.id)
    assert content.content == b"frames"
    assert content.response.headers["content-type"] == "video/webm"
    assert video.id in [item.id for item in ai.videos.list()]
    assert worker.jobs[0].params.frames == 12
    assert ai.videos.delete(video.id).deleted
    with pytest.raises(openai.NotFoundError):
        ai.videos.retrieve(video.id)
    assert video.id not in [item.id for item in ai.videos.list()]
    assert http.get(f"/v1/jobs/{video.id}").status_code == 404


def test_videos_are_listed_in_pages_whatever_else_was_asked(ai: openai.OpenAI, http: httpx.Client, serve: Any) -> None:
    def script(job: Any) -> None:
        job.started()
        finish(job)

    serve(script, "film-list", "video")
    made = [ai.videos.create(model="film-list", prompt=str(n)).id for n in range(3)]
    for video in made:
        until(lambda video=video: ai.videos.retrieve(video).status == "completed")
    chats = [{"kind": "llm", "model": "film-list", "params": {"messages": [{"role": "user", "content": "x"}]}}] * 120
    assert http.post("/v1/jobs/batch", json={"jobs": chats}).status_code == 200
    assert [video.id for video in ai.videos.list().data[:3]] == made[::-1]
    first = ai.videos.list(limit=2)
    assert ([video.id for video in first.data], first.has_more) == (made[:0:-1], True)
    assert next(video.id for video in ai.videos.list(limit=1, after=made[1]).data) == made[0]
    assert [video.id for video in ai.videos.list(order="asc", after=made[0]).data] == made[1:]
    assert {video.id for video in ai.videos.list(limit=1)} >= set(made), "the client turns the pages itself"
    for query in ("limit=0", "limit=x", "order=up"):
        assert http.get(f"/v1/videos?{query}").status_code == 400


def test_deleting_a_running_video_cancels_it(ai: openai.OpenAI, serve: Any) -> None:
    def script(job: Any) -> None:
        job.started()
        assert job.cancelled.wait(WAIT_S)
        raise FaultError(Fault("cancelled", "Cancelled."))

    worker = serve(script, "film-cancel", "video")
    video = ai.videos.create(model="film-cancel", prompt="waves")
    until(lambda: ai.videos.retrieve(video.id).status == "in_progress")
    assert ai.videos.delete(video.id).deleted
    assert worker.jobs[0].cancelled.wait(WAIT_S)
    with pytest.raises(openai.NotFoundError):
        ai.videos.retrieve(video.id)


def test_a_failed_video_says_why(ai: openai.OpenAI, serve: Any) -> None:
    def script(_job: Any) -> None:
        raise FaultError(Fault("engine_failed", "No frames came."))

    serve(script, "film-fail", "video")
    video = ai.videos.create(model="film-fail", prompt="waves")
    until(lambda: ai.videos.retrieve(video.id).status == "failed")
    error = ai.videos.retrieve(video.id).error
    assert error
    assert (error.code, error.message) == ("engine_failed", "No frames came.")


def test_a_start_image_as_a_file_and_as_a_data_url(ai: openai.OpenAI, http: Any, serve: Any) -> None:
    seen: list[bytes] = []

    def script(job: Any) -> None:
        seen.append(job.read("image"))
        job.started()
        finish(job)

    serve(script, "film-image", "video")
    first = ai.videos.create(model="film-image", prompt="waves", input_reference=("a.png", PNG, "image/png"))
    until(lambda: ai.videos.retrieve(first.id).status == "completed")
    link = "data:image/png;base64," + base64.b64encode(PNG).decode()
    body = {"model": "film-image", "prompt": "waves", "input_reference": {"image_url": link}}
    second = http.post("/v1/videos", json=body).json()
    until(lambda: ai.videos.retrieve(second["id"]).status == "completed")
    assert seen == [PNG, PNG]


@pytest.mark.parametrize(
    ("body", "field", "status"),
    [
        ({"seconds": "long"}, "seconds", 400),
        ({"seconds": 601}, "seconds", 400),
        ({"seconds": 0.01, "fps": 1}, "seconds", 400),
        ({"size": "65x64"}, "size", 400),
        ({"fps": 61}, "fps", 400),
        ({"format": "avi"}, "format", 400),
        ({"remix": "x"}, "remix", 400),
        ({"input_reference": "http://example.org/a.png"}, "input_reference", 400),
        ({"input_reference": {"file_id": "f"}}, "input_reference", 400),
        ({"input_reference": "data:image/png;base64,////?"}, "input_reference", 400),
        ({"input_reference": base64.b64encode(b"no image").decode()}, "input_reference", 415),
    ],
)
def test_refusals_name_the_field(http: Any, body: dict[str, Any], field: str, status: int) -> None:
    answer = http.post("/v1/videos", json={"model": "film", "prompt": "waves", **body})
    assert (answer.status_code, answer.json()["error"]["param"]) == (status, field)


def test_unknown_videos_and_variants(http: Any) -> None:
    assert http.get("/v1/videos/job_nobody").status_code == 404
    assert http.get("/v1/videos/job_nobody/content?variant=thumbnail").json()["error"]["param"] == "variant"
    assert http.delete("/v1/videos/job_nobody").status_code == 404
