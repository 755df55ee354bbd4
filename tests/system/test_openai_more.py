"""The official client against real engines: batches, several answers, streamed speech, edited images, a cold model."""

from __future__ import annotations

import base64
import io
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

pytest.importorskip("openai", reason="openai is not installed (dev group)")
pytest.importorskip("xllamacpp", reason="xllamacpp is not installed (extra llm)")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed (extra embed)")
pytest.importorskip("piper", reason="piper-tts is not installed (extra tts)")
pytest.importorskip("PIL", reason="pillow is not installed (extra image)")
pytest.importorskip("starlette", reason="starlette is not installed (extra coordinator)")

import openai
from PIL import Image

from engines.piper import tones
from tests.system.served import ESPEAK, Model, Served, healthy, serve

pytestmark = [pytest.mark.engine, pytest.mark.slow]

TIMEOUT_S = 120.0
NAMES = {"chat", "embed", "voice-espeak", "image"}
# No model but these loads long enough for its load to be seen.
COLD = [Model(f"synthetic-cold-{name}", "synthetic", kinds=["llm"], options={"load_s": 3.0}) for name in "ab"]
SPOKEN = "Hello world. " * 12


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The worker; it must end well after all tests."""
    models = [model for model in healthy() if model.name in NAMES]
    with serve(tmp_path_factory.mktemp("served"), [*models, *COLD]) as served:
        yield served


@pytest.fixture(scope="module")
def ai(served: Served) -> Iterator[Any]:
    """The client, without retries of its own."""
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key=served.key, max_retries=0, timeout=TIMEOUT_S) as client:
        yield client


def say(text: str) -> Any:
    return [{"role": "user", "content": text}]


def count(n: int) -> str:
    return " ".join(str(number) for number in range(1, n + 1))


# ---- a cold model

AT_ONCE = {"x-bulkhead-begin-s": "0"}


def test_a_plain_request_does_not_wait_for_a_load(ai: Any) -> None:
    """It is told to come again, and finds the model loaded in the end: the load was not given up."""
    asked: Any = {"model": "synthetic-cold-a", "messages": say("a b c")}
    with pytest.raises(openai.InternalServerError) as refused:
        ai.chat.completions.create(**asked, extra_headers=AT_ONCE)
    assert (refused.value.status_code, refused.value.code) == (503, "model_loading")
    assert refused.value.response.headers["retry-after"] == "5"
    assert ai.chat.completions.create(**asked).choices[0].message.content


def test_a_stream_tells_how_far_the_load_is(served: Served) -> None:
    body = {"model": "synthetic-cold-b", "messages": say("a b c"), "stream": True}
    headers = {"Authorization": f"Bearer {served.key}", **AT_ONCE}
    with httpx.stream(
        "POST", f"{served.url}/v1/chat/completions", json=body, headers=headers, timeout=TIMEOUT_S, trust_env=False
    ) as answer:
        assert answer.status_code == 200
        lines = list(answer.iter_lines())
    assert [line for line in lines if line.startswith(": waiting: load")], lines[:5]
    assert lines[-2] == "data: [DONE]"


# ---- batches


def run_batch(ai: Any, endpoint: Any, bodies: list[dict[str, Any]]) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """Run a batch to its end: the batch, its answers and its errors by custom id."""
    lines = [{"custom_id": f"c{n}", "method": "POST", "url": endpoint, "body": body} for n, body in enumerate(bodies)]
    file = ai.files.create(file=("in.jsonl", "\n".join(map(json.dumps, lines)).encode()), purpose="batch")
    batch = ai.batches.create(input_file_id=file.id, endpoint=endpoint, completion_window="24h")
    until = time.monotonic() + TIMEOUT_S
    while (batch := ai.batches.retrieve(batch.id)).status not in ("completed", "failed"):
        assert time.monotonic() < until, batch
        time.sleep(0.05)
    files = (batch.output_file_id, batch.error_file_id)
    texts = [ai.files.content(file).text if file else "" for file in files]
    answers, errors = ({item["custom_id"]: item for item in map(json.loads, text.splitlines())} for text in texts)
    return batch, answers, errors


def test_a_batch_of_chats(ai: Any) -> None:
    bodies = [{"model": "chat", "messages": say(f"count to {n}"), "temperature": 0} for n in range(3, 11)]
    bodies.append({"model": "chat", "messages": say("word " * 2000)})
    batch, answers, errors = run_batch(ai, "/v1/chat/completions", bodies)
    assert (batch.status, batch.request_counts.completed, batch.request_counts.failed) == ("completed", 8, 1)
    said = {name: item["response"]["body"]["choices"][0]["message"]["content"] for name, item in answers.items()}
    assert said == {f"c{n}": count(n + 3) for n in range(8)}
    assert errors["c8"]["response"]["body"]["error"]["code"] == "context_length_exceeded"
    assert batch.usage.output_tokens == sum(
        item["response"]["body"]["usage"]["completion_tokens"] for item in answers.values()
    )


def test_a_batch_of_embeddings_is_what_single_requests_are(ai: Any) -> None:
    texts = ["the red car is fast", "the moon and the sun"]
    _, answers, _ = run_batch(ai, "/v1/embeddings", [{"model": "embed", "input": text} for text in texts])
    single = [ai.embeddings.create(model="embed", input=text).data[0].embedding for text in texts]
    rows = [answers[f"c{n}"]["response"]["body"]["data"][0]["embedding"] for n in range(2)]
    assert np.allclose(rows, single, atol=1e-5)


# ---- several answers


def test_several_answers_are_the_single_ones(ai: Any) -> None:
    loose: Any = {"model": "chat", "prompt": "qzx", "temperature": 2.0, "max_tokens": 30}
    wide = {"grammar": "root ::= [a-z]{30}", "top_k": 0, "min_p": 0.0}
    single = [ai.completions.create(**loose, seed=seed, extra_body=wide).choices[0].text for seed in (5, 6, 7)]
    several = ai.completions.create(**loose, seed=5, n=3, extra_body=wide)
    assert [choice.text for choice in several.choices] == single
    assert len({*single}) == 3
    streamed = {0: "", 1: "", 2: ""}
    for chunk in ai.completions.create(**loose, seed=5, n=3, stream=True, extra_body=wide):
        for choice in chunk.choices:
            streamed[choice.index] += choice.text
    assert list(streamed.values()) == single


# ---- speech


@pytest.mark.parametrize("name", ["mp3", "opus", "ogg", "wav", "flac"])
def test_streamed_speech_is_the_whole_speech(ai: Any, tmp_path: Path, name: str) -> None:
    asked: Any = {"model": "voice-espeak", "voice": "default", "input": SPOKEN, "response_format": name}
    config = Path(f"{ESPEAK}.json")
    whole, path = tmp_path / "whole", tmp_path / "streamed"
    whole.write_bytes(ai.audio.speech.create(**asked).content)
    with ai.audio.speech.with_streaming_response.create(**asked, stream_format="audio") as answer:
        answer.stream_to_file(path)
    assert tones.decode_file(path, config) == tones.decode_file(whole, config) != ""
    events = ai.audio.speech.create(**asked, stream_format="sse").text
    pieces = [json.loads(line[6:]) for line in events.splitlines() if line.startswith("data: {")]
    assert pieces[-1]["type"] == "speech.audio.done"
    assert len(pieces) > (2 if name in ("mp3", "opus", "ogg") else 1)
    path.write_bytes(b"".join(base64.b64decode(piece["audio"]) for piece in pieces[:-1]))
    assert tones.decode_file(path, config) == tones.decode_file(whole, config)


# ---- images


def test_an_edit_changes_what_its_mask_lets_it(ai: Any) -> None:
    start, mask = io.BytesIO(), io.BytesIO()
    pixels = np.zeros((128, 128, 3), np.uint8)
    pixels[..., 2] = 200
    Image.fromarray(pixels).save(start, "PNG")
    alpha = Image.new("RGBA", (128, 128), (0, 0, 0, 255))
    alpha.paste((0, 0, 0, 0), (0, 0, 64, 128))
    alpha.save(mask, "PNG")
    answer = ai.images.edit(
        model="image",
        image=("start.png", start.getvalue()),
        mask=("mask.png", mask.getvalue()),
        prompt="red",
        size="128x128",
        extra_body={"seed": 3, "steps": 8},
    )
    made = np.asarray(Image.open(io.BytesIO(base64.b64decode(answer.data[0].b64_json))).convert("RGB"))
    assert np.array_equal(made[:, 64:], pixels[:, 64:])
    red, _, blue = made[:, :48].reshape(-1, 3).mean(axis=0)
    assert red > blue + 60


def test_a_stream_of_pictures_is_the_plain_one(ai: Any) -> None:
    asked: Any = {"model": "image", "prompt": "a red circle", "size": "64x64", "extra_body": {"seed": 7, "steps": 4}}
    [event] = ai.images.generate(**asked, stream=True)
    assert event.b64_json == ai.images.generate(**asked).data[0].b64_json


def test_a_mask_of_another_size_is_named(ai: Any) -> None:
    start, mask = io.BytesIO(), io.BytesIO()
    Image.new("RGB", (64, 64)).save(start, "PNG")
    Image.new("RGBA", (32, 32), (0, 0, 0, 0)).save(mask, "PNG")
    with pytest.raises(openai.BadRequestError, match="32 x 32") as refused:
        ai.images.edit(model="image", image=start.getvalue(), mask=mask.getvalue(), prompt="x", size="64x64")
    assert refused.value.param == "mask"
