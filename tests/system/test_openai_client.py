"""The official `openai` client against a whole worker with every real engine: what people write works as it is."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

pytest.importorskip("openai", reason="openai is not installed (dev group)")
pytest.importorskip("xllamacpp", reason="xllamacpp is not installed (extra llm)")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed (extra embed)")
pytest.importorskip("faster_whisper", reason="faster-whisper is not installed (extra stt)")
pytest.importorskip("piper", reason="piper-tts is not installed (extra tts)")
pytest.importorskip("PIL", reason="pillow is not installed (extra image)")
pytest.importorskip("av", reason="av is not installed (extra video)")
pytest.importorskip("starlette", reason="starlette is not installed (extra coordinator)")

import openai

from engines.diffusion.checks import wrong_file
from engines.llm.fixture_cases import fixture as llm_fixture
from engines.piper import tones
from tests.system.served import ENGINES, LLMS, VOICE, Served, healthy, serve

pytestmark = [pytest.mark.engine, pytest.mark.slow]

TIMEOUT_S = 120.0
# Alone it is a moment; the machine may stand still for seconds. What the job itself would take is far more.
SOON_S = 15.0
DIGITS = ENGINES / "whisper/fixture/digits.flac"
HEARD = "three one four"
ONE_OF_TWO = {
    "type": "object",
    "properties": {"n": {"enum": [1, 2]}},
    "required": ["n"],
    "additionalProperties": False,
}
TOOL: Any = {"type": "function", "function": {"name": "pick", "parameters": ONE_OF_TWO}}
SCHEMA: Any = {"type": "json_schema", "json_schema": {"name": "pick", "schema": ONE_OF_TWO, "strict": True}}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The worker; it must end well after all tests."""
    with serve(tmp_path_factory.mktemp("served"), healthy()) as served:
        yield served


@pytest.fixture(scope="module")
def ai(served: Served) -> Iterator[Any]:
    """The client, without retries of its own."""
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key=served.key, max_retries=0, timeout=TIMEOUT_S) as client:
        yield client


@pytest.fixture(params=LLMS)
def llm(request: pytest.FixtureRequest) -> str:
    """A chat model on each backend."""
    return str(request.param)


def say(text: str) -> Any:
    return [{"role": "user", "content": text}]


def count(n: int) -> str:
    return " ".join(str(number) for number in range(1, n + 1))


# ---- chat


def test_chat(ai: Any, llm: str) -> None:
    answer = ai.chat.completions.create(model=llm, messages=say("count to 12"), temperature=0)
    [choice] = answer.choices
    assert (choice.message.role, choice.message.content) == ("assistant", count(12))
    assert choice.finish_reason == "stop"
    assert answer.model == llm
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (15, 27, 42)


def test_chat_stream_with_usage(ai: Any, llm: str) -> None:
    stream = ai.chat.completions.create(
        model=llm, messages=say("count to 20"), temperature=0, stream=True, stream_options={"include_usage": True}
    )
    *chunks, last = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks]
    assert "".join(pieces) == count(20)
    assert sum(bool(piece) for piece in pieces) > 10, "it came in one lump"
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert all(chunk.usage is None for chunk in chunks)
    assert last.choices == []
    assert last.usage.total_tokens == last.usage.prompt_tokens + last.usage.completion_tokens > 40
    assert len({chunk.id for chunk in [*chunks, last]}) == 1


def test_the_clients_own_stream_helper(ai: Any, llm: str) -> None:
    with ai.chat.completions.stream(model=llm, messages=say("say hello world"), temperature=0) as stream:
        deltas = [event.delta for event in stream if event.type == "content.delta"]
        assert stream.get_final_completion().choices[0].message.content == "hello world"
    assert "".join(deltas) == "hello world"


def test_stop_and_max_tokens(ai: Any, llm: str) -> None:
    asked = {"model": llm, "messages": say("count to 12"), "temperature": 0}
    stopped = ai.chat.completions.create(**asked, stop=["9 10", "never"]).choices[0]
    assert (stopped.message.content, stopped.finish_reason) == (count(8) + " ", "stop")
    assert ai.chat.completions.create(**asked, stop="5").choices[0].message.content == count(4) + " "
    for name in ("max_tokens", "max_completion_tokens"):
        cut = ai.chat.completions.create(**asked, **{name: 5})
        assert (cut.choices[0].message.content, cut.choices[0].finish_reason) == ("1 2 3", "length")
        assert cut.usage.completion_tokens == 5


def test_a_seed_repeats(ai: Any, llm: str) -> None:
    def noise(seed: int) -> str:
        loose: Any = {"temperature": 2.0, "max_tokens": 60, "seed": seed}
        wide = {"grammar": "root ::= [a-z]{60}", "top_k": 0, "min_p": 0.0}
        return ai.completions.create(model=llm, prompt="qzx", **loose, extra_body=wide).choices[0].text

    assert noise(7) == noise(7) != noise(8)


def test_json_schema(ai: Any, llm: str) -> None:
    answer = ai.chat.completions.create(model=llm, messages=say("hello"), temperature=0, response_format=SCHEMA)
    assert json.loads(answer.choices[0].message.content) in ({"n": 1}, {"n": 2})


def test_parse_into_a_pydantic_model(ai: Any, llm: str) -> None:
    import pydantic

    class Pick(pydantic.BaseModel):
        yes: bool

    answer = ai.chat.completions.parse(model=llm, messages=say("hello"), temperature=0, response_format=Pick)
    assert answer.choices[0].message.parsed.yes in (True, False)


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "pick"}}], ids=str)
def test_a_tool_call(ai: Any, llm: str, choice: Any) -> None:
    asked: Any = {"model": llm, "messages": say("hello"), "temperature": 0, "tools": [TOOL], "tool_choice": choice}
    plain = ai.chat.completions.create(**asked).choices[0]
    [call] = plain.message.tool_calls
    assert plain.finish_reason == "tool_calls"
    assert call.function.name == "pick"
    assert json.loads(call.function.arguments) in ({"n": 1}, {"n": 2})
    chunks = list(ai.chat.completions.create(**asked, stream=True))
    deltas = [delta for chunk in chunks for delta in chunk.choices[0].delta.tool_calls or ()]
    assert deltas[0].function.name == "pick"
    assert json.loads("".join(delta.function.arguments or "" for delta in deltas)) in ({"n": 1}, {"n": 2})
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


def test_logprobs(ai: Any, llm: str) -> None:
    answer = ai.chat.completions.create(
        model=llm, messages=say("say hi"), temperature=0, logprobs=True, top_logprobs=2
    ).choices[0]
    items = answer.logprobs.content
    assert "".join(item.token for item in items).strip() == answer.message.content
    assert all(item.logprob <= 0 and len(item.top_logprobs) == 2 for item in items)
    assert items[0].logprob == items[0].top_logprobs[0].logprob, "greedy takes the likeliest"


def test_plain_completion(ai: Any, llm: str) -> None:
    prompt = "<|user|>count to 9<|end|><|assistant|>"
    asked: Any = {"model": llm, "prompt": prompt, "temperature": 0, "max_tokens": 40}
    answer = ai.completions.create(**asked)
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == (count(9), "stop")
    assert "".join(chunk.choices[0].text for chunk in ai.completions.create(**asked, stream=True)) == count(9)
    probabilities = ai.completions.create(**asked, logprobs=1).choices[0].logprobs
    assert len(probabilities.tokens) == len(probabilities.token_logprobs) == len(probabilities.text_offset) > 10


def test_async_requests_side_by_side(served: Served, llm: str) -> None:
    async def ask() -> list[str]:
        async with openai.AsyncOpenAI(
            base_url=f"{served.url}/v1", api_key=served.key, max_retries=0, timeout=TIMEOUT_S
        ) as client:

            async def plain(n: int) -> str:
                answer = await client.chat.completions.create(model=llm, messages=say(f"count to {n}"), temperature=0)
                return answer.choices[0].message.content or ""

            async def streamed(n: int) -> str:
                text = ""
                stream = await client.chat.completions.create(
                    model=llm, messages=say(f"count to {n}"), temperature=0, stream=True
                )
                async for chunk in stream:
                    text += chunk.choices[0].delta.content or ""
                return text

            return await asyncio.gather(*(one(n) for n in range(5, 11) for one in (plain, streamed)))

    assert asyncio.run(ask()) == [count(n) for n in range(5, 11) for _ in range(2)]


# ---- embeddings


@pytest.mark.parametrize("model", ["embed", "embed-gguf"])
def test_embeddings(ai: Any, model: str) -> None:
    texts = ["the red car is fast", "a fast red car", "the moon and the sun"]
    plain = ai.embeddings.create(model=model, input=texts, encoding_format="float")
    packed = ai.embeddings.create(model=model, input=texts)  # the client asks for base64 by itself
    assert [item.index for item in plain.data] == [0, 1, 2]
    rows = np.array([item.embedding for item in plain.data], np.float32)
    assert np.allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-3)
    assert np.allclose(rows, np.array([item.embedding for item in packed.data]), atol=1e-6)
    raw = ai.embeddings.with_raw_response.create(model=model, input=texts, encoding_format="base64")
    first = raw.http_response.json()["data"][0]["embedding"]
    assert np.array_equal(np.frombuffer(base64.b64decode(first), "<f4"), rows[0])
    assert plain.usage.prompt_tokens == plain.usage.total_tokens > 10
    single = ai.embeddings.create(model=model, input=texts[1]).data[0].embedding
    assert np.allclose(single, rows[1], atol=1e-5)


def test_the_nearer_text_is_nearer(ai: Any) -> None:
    texts = ["the red car is fast", "a fast red car", "the moon and the sun"]
    rows = np.array([item.embedding for item in ai.embeddings.create(model="embed", input=texts).data])
    assert rows[0] @ rows[1] > rows[0] @ rows[2] + 0.2


# ---- audio


def transcribe(ai: Any, **more: Any) -> Any:
    with DIGITS.open("rb") as file:
        return ai.audio.transcriptions.create(model="whisper", file=file, language="en", **more)


def test_transcription_as_json_and_text(ai: Any) -> None:
    assert transcribe(ai).text == HEARD
    assert transcribe(ai, response_format="json", temperature=0).text == HEARD
    assert transcribe(ai, response_format="text") == HEARD + "\n"


def test_transcription_as_subtitles(ai: Any) -> None:
    number, times, text = transcribe(ai, response_format="srt").strip().splitlines()
    assert (number, text) == ("1", HEARD)
    assert times.startswith("00:00:00,000 --> 00:00:0")
    head, empty, times, text = transcribe(ai, response_format="vtt").strip().splitlines()
    assert (head, empty, text) == ("WEBVTT", "", HEARD)
    assert times.startswith("00:00:00.000 --> 00:00:0")


def test_verbose_transcription_with_words(ai: Any) -> None:
    both = transcribe(ai, response_format="verbose_json", timestamp_granularities=["word", "segment"])
    assert [word.word.strip() for word in both.words] == HEARD.split()
    starts = [word.start for word in both.words]
    assert starts == sorted(starts)
    assert 0 <= starts[0] < both.words[-1].end <= both.duration + 0.1
    assert "".join(segment.text for segment in both.segments).strip() == both.text.strip() == HEARD
    assert both.language == "en"
    assert transcribe(ai, response_format="verbose_json", timestamp_granularities=["word"]).segments is None
    assert transcribe(ai, response_format="verbose_json").words is None


def test_streamed_transcription(ai: Any) -> None:
    *deltas, done = list(transcribe(ai, stream=True))
    assert "".join(event.delta for event in deltas).strip() == done.text == HEARD
    assert done.type == "transcript.text.done"


@pytest.mark.filterwarnings("ignore:deprecated:DeprecationWarning")  # the client's word on translations
def test_translation_by_an_english_only_model_is_refused(ai: Any) -> None:
    with DIGITS.open("rb") as file, pytest.raises(openai.BadRequestError) as refused:
        ai.audio.translations.create(model="whisper", file=file)
    assert refused.value.param == "model"
    assert "English-only" in refused.value.message


def test_speech_in_every_format(ai: Any, tmp_path: Path) -> None:
    text, config = "hello, world 42", Path(f"{VOICE}.json")
    for name in ("wav", "flac", "opus", "mp3", "ogg"):
        path = tmp_path / f"speech.{name}"
        with ai.audio.speech.with_streaming_response.create(
            model="voice", voice="alloy", input=text, response_format=name
        ) as answer:
            answer.stream_to_file(path)
        assert tones.decode_file(path, config) == text, name
    answer = ai.audio.speech.create(model="voice", voice="default", input=text, response_format="pcm", speed=2)
    rate = int(answer.response.headers["x-audio-sample-rate"])
    samples = np.frombuffer(answer.content, "<i2").astype(np.float32) / 32768
    assert tones.decode(samples, rate, json.loads(config.read_bytes())["phoneme_id_map"]) == text


def test_what_is_spoken_is_heard(ai: Any) -> None:
    spoken = ai.audio.speech.create(model="voice", voice="default", input="hello world", response_format="flac")
    assert ai.audio.transcriptions.create(model="whisper", file=("a", spoken.content)).text == "hello world"


# ---- pictures


def test_images_inline_and_by_url(ai: Any, tmp_path: Path) -> None:
    more = {"seed": 7, "steps": 10}
    asked: Any = {"model": "image", "prompt": "a red circle", "size": "256x256", "extra_body": more}
    [inline] = ai.images.generate(**asked, response_format="b64_json").data
    path = tmp_path / "inline.png"
    path.write_bytes(base64.b64decode(inline.b64_json))
    assert wrong_file(path, "red", "circle", (256, 256), "png") == ""
    answer = ai.images.generate(**asked, response_format="url", n=2)
    first, second = (httpx.get(item.url, trust_env=False).raise_for_status() for item in answer.data)
    assert first.content == path.read_bytes(), "the same seed, the same picture"
    path.write_bytes(second.content)
    assert wrong_file(path, "red", "circle", (256, 256), "png") == ""
    assert [item.seed for item in answer.data] == [7, 8]
    webp = ai.images.generate(**asked, output_format="webp").data[0].b64_json
    path = tmp_path / "other.webp"
    path.write_bytes(base64.b64decode(webp))
    assert wrong_file(path, "red", "circle", (256, 256), "webp") == ""


# The client says that OpenAI's own service ends; its routes are what we serve.
@pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*[Vv]ideo.*deprecated:DeprecationWarning")
def test_videos(ai: Any) -> None:
    import av

    video = ai.videos.create_and_poll(
        model="video",
        prompt="the blue square",
        size="256x256",
        seconds="2",
        poll_interval_ms=50,
        extra_body={"fps": 12, "seed": 3},
    )
    assert (video.status, video.progress, video.seconds, video.size) == ("completed", 100, "2", "256x256")
    content = ai.videos.download_content(video.id).read()
    with av.open(io.BytesIO(content)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(frames) == 24
    red, _, blue = frames[12][128, 128].tolist()
    assert blue > 150 > red
    assert video.id in [one.id for one in ai.videos.list()]
    assert ai.videos.retrieve(video.id).prompt == "the blue square"
    assert ai.videos.delete(video.id).deleted
    with pytest.raises(openai.NotFoundError):
        ai.videos.retrieve(video.id)


# ---- models, errors


def test_models(ai: Any, served: Served) -> None:
    listed = {model.id: model for model in ai.models.list()}
    assert listed.keys() == served.names
    one = ai.models.retrieve("whisper")
    assert (one.id, one.object, one.kinds) == ("whisper", "model", ["audio_stt"])


BadCall = Callable[[Any], Any]
ERRORS: dict[str, tuple[BadCall, str, str | None, str]] = {
    "unknown model": (
        lambda ai: ai.chat.completions.create(model="nobody", messages=say("hi")),
        "NotFoundError",
        "model",
        "model_not_found",
    ),
    "unknown model, looked up": (lambda ai: ai.models.retrieve("no/body"), "NotFoundError", "model", "model_not_found"),
    "range": (
        lambda ai: ai.chat.completions.create(model="chat", messages=say("hi"), temperature=9),
        "BadRequestError",
        "temperature",
        "invalid_parameter",
    ),
    "context": (
        lambda ai: ai.chat.completions.create(model="chat", messages=say("word " * 2000)),
        "BadRequestError",
        "messages",
        "context_length_exceeded",
    ),
    "context, streamed": (
        lambda ai: ai.chat.completions.create(model="chat", messages=say("word " * 2000), stream=True),
        "BadRequestError",
        "messages",
        "context_length_exceeded",
    ),
    "engine's refusal in the route's words": (
        lambda ai: ai.audio.speech.create(model="voice", voice="default", input="\N{GRINNING FACE}"),
        "BadRequestError",
        "input",
        "invalid_parameter",
    ),
    "size": (
        lambda ai: ai.images.generate(model="image", prompt="red", size="4096x4096"),
        "BadRequestError",
        "size",
        "invalid_parameter",
    ),
    "broken audio": (
        lambda ai: ai.audio.transcriptions.create(model="whisper", file=("a.wav", b"no audio")),
        "BadRequestError",
        "file",
        "invalid_input_file",
    ),
    "key": (
        lambda ai: ai.with_options(api_key="bhc_wrong").models.list(),
        "AuthenticationError",
        None,
        "unauthorized",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_are_the_clients_own_classes(ai: Any, name: str) -> None:
    call, class_, param, code = ERRORS[name]
    with pytest.raises(getattr(openai, class_)) as caught:
        call(ai)
    error = caught.value
    assert (error.param, error.code) == (param, code)
    assert error.request_id.startswith("req_")
    assert len(error.body["message"].split()) >= 3


def test_async_errors_are_the_same(served: Served) -> None:
    async def ask() -> None:
        async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key=served.key, max_retries=0) as client:
            await client.chat.completions.create(model="chat", messages=say("hi"), extra_body={"grammar": "root ::= ("})

    with pytest.raises(openai.BadRequestError) as caught:
        asyncio.run(ask())
    assert caught.value.param == "grammar"


# ---- a client that leaves


def left(served: Served, job: str) -> None:
    """Wait until the job is cancelled."""
    began = time.monotonic()
    while (state := served.http.get(f"/v1/jobs/{job}").json()["state"]) != "cancelled":
        assert state in ("queued", "running"), state
        assert time.monotonic() - began < SOON_S, "the job goes on without its client"
        time.sleep(0.01)


def timed(call: Callable[[], Any]) -> float:
    began = time.monotonic()
    call()
    return time.monotonic() - began


def test_leaving_a_stream_frees_its_slot(ai: Any, served: Served) -> None:
    """The model has one slot and its answer takes 60 s."""
    stream = ai.chat.completions.create(model="synthetic-slow", messages=say("a b c"), stream=True)
    for _ in range(3):
        next(stream)
    job = stream.response.headers["x-bulkhead-job"]
    stream.close()
    left(served, job)
    stream = ai.chat.completions.create(model="synthetic-slow", messages=say("a b c"), stream=True)
    assert timed(lambda: [next(stream) for _ in range(3)]) < SOON_S, "the slot was not free"
    job = stream.response.headers["x-bulkhead-job"]
    stream.close()
    left(served, job)


def test_leaving_a_real_model_in_the_middle_of_its_stream(ai: Any, served: Served, llm: str) -> None:
    """A grammar with 3000 states at once: every token costs the library milliseconds, and no end is allowed."""
    endless = llm_fixture("").endless
    assert endless is not None
    asked = {**endless.params, "model": llm, "max_tokens": 500, "stream": True}
    grammar = {"grammar": asked.pop("grammar")}
    stream = ai.completions.create(**asked, extra_body=grammar)
    next(stream)
    job = stream.response.headers["x-bulkhead-job"]
    stream.close()
    left(served, job)
    pong = lambda: ai.chat.completions.create(model=llm, messages=say("ping"), temperature=0)  # noqa: E731
    assert timed(pong) < SOON_S
    assert pong().choices[0].message.content == "pong"


def test_a_client_that_gives_up_waiting_frees_the_only_slot(ai: Any, served: Served) -> None:
    """Sixteen large pictures of 500 steps take minutes; the client waits for some seconds."""
    asked: Any = {"model": "image", "prompt": "a red circle"}
    hurried = ai.with_options(timeout=4.0)
    with pytest.raises(openai.APITimeoutError):
        hurried.images.generate(**asked, size="1536x1536", n=16, extra_body={"steps": 500})
    small = lambda: ai.images.generate(**asked, size="64x64", extra_body={"steps": 4})  # noqa: E731
    assert timed(small) < SOON_S
    newest = [job for job in served.http.get("/v1/jobs?limit=5").json()["data"] if job["kind"] == "image"]
    assert [job["state"] for job in newest[:2]] == ["succeeded", "cancelled"]
