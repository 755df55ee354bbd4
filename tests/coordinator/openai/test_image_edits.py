"""Edits: the image and its mask reach the worker, and what cannot be done is refused by name."""

from __future__ import annotations

import base64
from typing import Any

import httpx
import openai
import pytest

from protocol.work import ImageResult

PNG = b"\x89PNG\r\n\x1a\n" + bytes(100)
JPEG = b"\xff\xd8\xff" + bytes(100)


def script(job: Any) -> None:
    job.started()
    for index in range(job.params.n):
        names = sorted(item.name for item in job.offer.inputs)
        job.upload(f"{index}.png", b"|".join([job.read(name) for name in names]), "image/png")
    job.complete(ImageResult(width=64, height=64, format="png", seeds=[1] * job.params.n))


@pytest.fixture
def worker(serve: Any) -> Any:
    return serve(script, "edit", "image")


def test_with_a_mask_its_places_are_made_anew(ai: openai.OpenAI, worker: Any) -> None:
    answer = ai.images.edit(model="edit", image=JPEG, mask=PNG, prompt="a hat", n=2, size="64x64")  # type: ignore[call-overload]
    assert [base64.b64decode(item.b64_json) for item in answer.data] == [JPEG + b"|" + PNG] * 2
    made = worker.jobs[0].params
    assert (made.prompt, made.strength, made.width) == ("a hat", 1.0, 64)


def test_without_a_mask_the_whole_image_is_the_start(ai: openai.OpenAI, worker: Any) -> None:
    more = {"strength": 0.5, "seed": 3, "steps": 4, "negative_prompt": "rain"}
    answer = ai.images.edit(
        model="edit",
        image=[JPEG],
        prompt="a hat",
        response_format="url",
        quality="70",
        extra_body=more,  # type: ignore[call-overload]
    )
    assert httpx.get(answer.data[0].url).content == JPEG
    made = worker.jobs[0].params
    assert (made.strength, made.seed, made.steps, made.negative_prompt, made.quality) == (0.5, 3, 4, "rain", 70)


def test_streamed(ai: openai.OpenAI, worker: Any) -> None:
    [event] = ai.images.edit(model="edit", image=PNG, prompt="a hat", stream=True)
    assert event.type == "image_edit.completed"
    assert base64.b64decode(event.b64_json) == PNG


@pytest.mark.parametrize(
    ("fields", "files", "status", "field"),
    [
        ({}, {}, 400, "image"),
        ({}, {"image": JPEG, "mask": JPEG}, 415, "mask"),
        ({}, {"image": b"text"}, 415, "image"),
        ({}, {"image": b""}, 400, "image"),
        ({}, {"image": PNG, "markup": PNG}, 400, "markup"),
        ({"input_fidelity": "high"}, {"image": PNG}, 400, "input_fidelity"),
        ({"background": "transparent"}, {"image": PNG}, 400, "background"),
        ({"n": "many"}, {"image": PNG}, 400, "n"),
        ({"n": "17"}, {"image": PNG}, 400, "n"),
        ({"strength": "0"}, {"image": PNG}, 400, "strength"),
        ({"quality": "101"}, {"image": PNG}, 400, "quality"),
        ({"quality": "high"}, {"image": PNG}, 400, "quality"),
        ({"size": "big"}, {"image": PNG}, 400, "size"),
        ({"colour": "red"}, {"image": PNG}, 400, "colour"),
    ],
)
def test_refusals_name_the_field(
    http: httpx.Client, fields: dict[str, str], files: dict[str, bytes], status: int, field: str
) -> None:
    data = {"model": "edit", "prompt": "a hat", **fields}
    parts = {name: (name, content) for name, content in files.items()} or {"": ("", b"")}
    if not files:
        boundary = "x"
        body = "".join(f'--x\r\ncontent-disposition: form-data; name="{k}"\r\n\r\n{v}\r\n' for k, v in data.items())
        headers = {"content-type": f"multipart/form-data; boundary={boundary}"}
        answer = http.post("/v1/images/edits", content=body + "--x--\r\n", headers=headers)
    else:
        answer = http.post("/v1/images/edits", data=data, files=parts)
    assert (answer.status_code, answer.json()["error"]["param"]) == (status, field)


def test_only_forms_and_one_image(http: httpx.Client, ai: openai.OpenAI) -> None:
    assert http.post("/v1/images/edits", json={"model": "edit", "prompt": "x"}).status_code == 415
    with pytest.raises(openai.BadRequestError) as refused:
        ai.images.edit(model="edit", image=[PNG, PNG], prompt="x")
    assert refused.value.param == "image[]"
