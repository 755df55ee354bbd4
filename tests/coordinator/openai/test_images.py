"""Images: base64 and signed URLs, sizes, encoder options."""

from __future__ import annotations

import base64
from typing import Any

import httpx
import openai
import pytest

from protocol.work import IMAGE_MIME, ImageResult

PNG = b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 4000  # more than one piece of the streamed answer


def script(job: Any) -> None:
    job.started()
    for index in range(job.params.n):
        job.upload(f"{index}.{job.params.format}", PNG + bytes([index]), IMAGE_MIME[job.params.format])
    seeds = list(range(job.params.n))
    size = {"width": job.params.width, "height": job.params.height}
    job.complete(ImageResult(**size, format=job.params.format, seeds=seeds), {"images": job.params.n})


@pytest.fixture
def worker(serve: Any) -> Any:
    return serve(script, "paint", "image")


def test_base64_is_the_default(ai: openai.OpenAI, worker: Any) -> None:
    answer = ai.images.generate(model="paint", prompt="red", n=2, size="64x48")  # type: ignore[call-overload]
    assert [base64.b64decode(item.b64_json) for item in answer.data] == [PNG + b"\0", PNG + b"\1"]
    assert answer.size == "64x48"
    assert answer.output_format == "png"
    assert answer.data[1].model_extra["seed"] == 1


def test_urls_are_signed_and_need_no_key(ai: openai.OpenAI, worker: Any) -> None:
    answer = ai.images.generate(model="paint", prompt="red", response_format="url")
    assert answer.data
    url = answer.data[0].url
    assert url
    assert url.startswith("http://127.0.0.1:")
    assert httpx.get(url).content == PNG + b"\0"
    assert httpx.get(url[:-1] + ("0" if url[-1] != "0" else "1")).status_code == 403


def test_options_reach_the_engine(ai: openai.OpenAI, worker: Any) -> None:
    ours = {"negative_prompt": "blue", "steps": 3, "guidance": 2.5, "seed": 9, "quality": 70}
    ai.images.generate(model="paint", prompt="red", output_format="webp", extra_body=ours)
    made = worker.jobs[0].params
    assert (made.negative_prompt, made.steps, made.guidance, made.seed, made.quality) == ("blue", 3, 2.5, 9, 70)
    assert (made.format, made.width, made.height) == ("webp", 512, 512)


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"size": "big"}, "size"),
        ({"size": "65x64"}, "size"),
        ({"size": "8x8"}, "size"),
        ({"size": "9999x8"}, "size"),
        ({"n": 17}, "n"),
        ({"n": "2"}, "n"),
        ({"prompt": ""}, "prompt"),
        ({"output_format": "gif"}, "output_format"),
        ({"quality": "hd"}, "quality"),
        ({"quality": 0}, "quality"),
        ({"output_compression": 101}, "output_compression"),
        ({"response_format": "file"}, "response_format"),
        ({"background": "transparent"}, "background"),
        ({"style": "vivid"}, "style"),
        ({"steps": 501}, "steps"),
        ({"stream": True, "partial_images": 2}, "partial_images"),
        ({"stream": True, "response_format": "url"}, "response_format"),
    ],
)
def test_refusals_name_the_field(http: Any, body: dict[str, Any], field: str) -> None:
    answer = http.post("/v1/images/generations", json={"model": "paint", "prompt": "red", **body})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == field


def test_a_stream_brings_each_picture_when_all_are_made(ai: openai.OpenAI, worker: Any) -> None:
    events: Any = list(ai.images.generate(model="paint", prompt="red", n=2, size="64x48", stream=True))
    assert [event.type for event in events] == ["image_generation.completed"] * 2
    assert [base64.b64decode(event.b64_json) for event in events] == [PNG + b"\0", PNG + b"\1"]
    assert (events[1].size, events[1].output_format, events[1].model_extra["seed"]) == ("64x48", "png", 1)
