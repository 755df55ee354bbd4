"""METHODS.md against the installed client: nothing is forgotten, and what is green is called here."""

from __future__ import annotations

import inspect
import json
import re
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from openai._resource import SyncAPIResource

from protocol.work import (
    AudioResult,
    Delta,
    EmbeddingResult,
    ImageResult,
    LlmChunk,
    LlmResult,
    Segment,
    SttResult,
    VideoResult,
)

TABLE = Path(__file__).parents[3] / "coordinator/openai/METHODS.md"
MODEL = "every-method"
KINDS = ("llm", "embedding", "audio_stt", "audio_tts", "image", "video")
PNG = b"\x89PNG\r\n\x1a\n" + bytes(64)
USER: Any = [{"role": "user", "content": "hi"}]
WAIT_S = 60.0

# The client calls some of what is green deprecated: OpenAI's own service ends, ours does not.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


# ---- the table ----------------------------------------------------------------------------------------------


def walk(resource: Any, path: tuple[str, ...] = ()) -> Iterator[str]:
    """Every public method of the client's resources, by its dotted name."""
    for name in dir(type(resource)):
        if name.startswith(("_", "with_")):
            continue
        static = inspect.getattr_static(type(resource), name)
        if callable(static) and not isinstance(static, type):
            if path:
                yield ".".join((*path, name))
        elif not isinstance(static, type) and isinstance(below := getattr(resource, name), SyncAPIResource):
            yield from walk(below, (*path, name))


@pytest.fixture(scope="module")
def methods() -> set[str]:
    with openai.OpenAI(api_key="k", base_url="http://nowhere/v1") as client:
        return set(walk(client))


def rows(section: str) -> dict[str, str]:
    """First column -> second column of a section's table."""
    text = TABLE.read_text().split(f"\n## {section}\n", 1)[1].split("\n## ", 1)[0]
    found = [re.fullmatch(r"\| (\S+) \| ?(.*?) ?\|", line) for line in text.splitlines()]
    return {row[1]: row[2] for row in found if row and row[1] not in ("method", "---")}


def covers(name: str, method: str) -> bool:
    return method == name or method.startswith(f"{name}.")


def test_every_method_of_the_client_is_in_the_table(methods: set[str]) -> None:
    green, absent = rows("Green"), rows("Not here")
    assert len(methods) > 200, "the client's tree was not walked"
    forgotten = {m for m in methods if m not in green and not any(covers(name, m) for name in absent)}
    assert not forgotten, f"say of these whether they are green: {sorted(forgotten)}"
    assert all(absent.values()), "what is not here says why"


def test_the_table_has_nothing_that_the_client_has_not(methods: set[str]) -> None:
    """Older releases lack some methods; the one that the table was written with has them all."""
    if openai.__version__.split(".")[:2] != ["3", "54"]:
        pytest.skip(f"the table was written with 3.54, and {openai.__version__} is installed")
    assert set(rows("Green")) <= methods
    assert [name for name in rows("Not here") if not any(covers(name, method) for method in methods)] == []


def test_no_row_contradicts_another() -> None:
    green, absent = rows("Green"), rows("Not here")
    exact = {name for name in green if any(covers(row, name) for row in absent)}
    assert exact <= {name for name in green if name.startswith("beta.chat.completions.")}


# ---- the calls ----------------------------------------------------------------------------------------------


def engine(job: Any) -> None:
    """Answers every kind."""
    job.started()
    params = job.params
    if job.offer.kind == "llm":
        text = '{"yes": true}'
        if job.offer.stream:
            job.chunk(LlmChunk(delta=Delta(content=text)))
        job.complete(LlmResult(content=text), {"prompt_tokens": 1, "completion_tokens": 1})
    elif job.offer.kind == "embedding":
        job.complete(EmbeddingResult(count=1, dimensions=1, vectors=struct.pack("<f", 1.0)))
    elif job.offer.kind == "audio_stt":
        segment = Segment(id=0, start=0, end=1, text=" hi")
        job.complete(SttResult(text="hi", language="en", duration=1.0, segments=[segment]))
    elif job.offer.kind == "audio_tts":
        job.upload("speech.mp3", b"sound", "audio/mpeg")
        job.complete(AudioResult(sample_rate=8000, duration=1.0, format=params.format))
    elif job.offer.kind == "image":
        job.upload("0.png", PNG, "image/png")
        job.complete(ImageResult(width=64, height=64, format="png", seeds=[1]))
    else:
        job.upload("0.webm", b"\x1a\x45\xdf\xa3", "video/webm")
        job.complete(VideoResult(width=64, height=64, frames=1, fps=1, format="webm", codec="vp9", seed=1))


def a_file(ai: openai.OpenAI, model: str = MODEL) -> str:
    line = {"custom_id": "a", "method": "POST", "url": "/v1/embeddings", "body": {"model": model, "input": "x"}}
    return ai.files.create(file=("in.jsonl", json.dumps(line).encode()), purpose="batch").id


def a_batch(ai: openai.OpenAI, model: str = MODEL) -> Any:
    return ai.batches.create(input_file_id=a_file(ai, model), endpoint="/v1/embeddings", completion_window="24h")


def ended_batch(ai: openai.OpenAI) -> Any:
    made, until = a_batch(ai), time.monotonic() + WAIT_S
    while (now := ai.batches.retrieve(made.id)).status != "completed":
        assert time.monotonic() < until, now
        time.sleep(0.02)
    return now


def a_video(ai: openai.OpenAI) -> Any:
    return ai.videos.create_and_poll(model=MODEL, prompt="x", poll_interval_ms=20)


def parsed(completions: Any) -> bool:
    import pydantic

    class Answer(pydantic.BaseModel):
        yes: bool

    answer = completions.parse(model=MODEL, messages=USER, response_format=Answer)
    return bool(answer.choices[0].message.parsed.yes)


def streamed(completions: Any) -> bool:
    with completions.stream(model=MODEL, messages=USER) as stream:
        return stream.get_final_completion().choices[0].message.content == '{"yes": true}'


def chatted(completions: Any) -> bool:
    return completions.create(model=MODEL, messages=USER).choices[0].message.content == '{"yes": true}'


CALLS: dict[str, Callable[[Any], bool]] = {
    "audio.speech.create": lambda ai: ai.audio.speech.create(model=MODEL, voice="a", input="x").content == b"sound",
    "audio.transcriptions.create": lambda ai: ai.audio.transcriptions.create(model=MODEL, file=b"a").text == "hi",
    "audio.translations.create": lambda ai: ai.audio.translations.create(model=MODEL, file=b"a").text == "hi",
    "batches.cancel": lambda ai: ai.batches.cancel(a_batch(ai, "nobody").id).status == "cancelling",
    "batches.create": lambda ai: ended_batch(ai).request_counts.completed == 1,
    "batches.list": lambda ai: a_batch(ai).id in {one.id for one in ai.batches.list(limit=3).data},
    "batches.retrieve": lambda ai: ai.batches.retrieve((made := a_batch(ai)).id).id == made.id,
    "beta.chat.completions.create": lambda ai: chatted(ai.beta.chat.completions),
    "beta.chat.completions.parse": lambda ai: parsed(ai.beta.chat.completions),
    "beta.chat.completions.stream": lambda ai: streamed(ai.beta.chat.completions),
    "chat.completions.create": lambda ai: chatted(ai.chat.completions),
    "chat.completions.parse": lambda ai: parsed(ai.chat.completions),
    "chat.completions.stream": lambda ai: streamed(ai.chat.completions),
    "completions.create": lambda ai: ai.completions.create(model=MODEL, prompt="x").choices[0].text != "",
    "embeddings.create": lambda ai: ai.embeddings.create(model=MODEL, input="x").data[0].embedding == [1.0],
    "files.content": lambda ai: b"custom_id" in ai.files.content(a_file(ai)).content,
    "files.create": lambda ai: a_file(ai).startswith("file-"),
    "files.delete": lambda ai: ai.files.delete(a_file(ai)).deleted,
    "files.list": lambda ai: a_file(ai) in {one.id for one in ai.files.list(limit=3).data},
    "files.retrieve": lambda ai: ai.files.retrieve(a_file(ai)).filename == "in.jsonl",
    "files.retrieve_content": lambda ai: "custom_id" in ai.files.retrieve_content(a_file(ai)),
    "files.wait_for_processing": lambda ai: ai.files.wait_for_processing(a_file(ai)).status == "processed",
    "images.edit": lambda ai: ai.images.edit(model=MODEL, image=PNG, prompt="x").data[0].b64_json != "",
    "images.generate": lambda ai: ai.images.generate(model=MODEL, prompt="x").data[0].b64_json != "",
    "models.list": lambda ai: MODEL in {model.id for model in ai.models.list()},
    "models.retrieve": lambda ai: ai.models.retrieve(MODEL).id == MODEL,
    "videos.create": lambda ai: ai.videos.create(model=MODEL, prompt="x").object == "video",
    "videos.create_and_poll": lambda ai: a_video(ai).status == "completed",
    "videos.delete": lambda ai: ai.videos.delete(a_video(ai).id).deleted,
    "videos.download_content": lambda ai: ai.videos.download_content(a_video(ai).id).content[:1] == b"\x1a",
    "videos.list": lambda ai: a_video(ai).id in {video.id for video in ai.videos.list().data},
    "videos.poll": lambda ai: ai.videos.poll(a_video(ai).id).status == "completed",
    "videos.retrieve": lambda ai: ai.videos.retrieve(a_video(ai).id).status == "completed",
}


def test_what_is_green_is_called() -> None:
    assert set(CALLS) == set(rows("Green"))


@pytest.mark.parametrize("name", CALLS)
def test_green(ai: openai.OpenAI, serve: Any, methods: set[str], name: str) -> None:
    if name not in methods:
        pytest.skip(f"openai {openai.__version__} has no {name}")
    serve(engine, MODEL, *KINDS)
    assert CALLS[name](ai)
