"""What callers and operators do wrong, over HTTP, on the real engines.

One worker serves every row. A row sends one bad request; its answer must be a typed refusal that names the field;
then the same model, or its healthy twin, must answer a good request. What kills or hangs an engine is further down:
those jobs are submitted first and judged last, since each of them is tried three times.
"""

from __future__ import annotations

import base64
import io
import json
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import httpx
import pytest

pytest.importorskip("xllamacpp", reason="xllamacpp is not installed (extra llm)")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed (extra embed)")
pytest.importorskip("faster_whisper", reason="faster_whisper is not installed (extra stt)")
pytest.importorskip("piper", reason="piper is not installed (extra tts)")
pytest.importorskip("PIL", reason="PIL is not installed (extra image)")
pytest.importorskip("av", reason="av is not installed (extra video)")
pytest.importorskip("starlette", reason="starlette is not installed (extra coordinator)")
pytest.importorskip("onnx", reason="onnx is not installed (extra dev)")

from engines.diffusion.checks import wrong_file
from engines.piper import tones
from tests.system.bad_requests import (
    CHATS,
    DIGITS,
    EMBEDDINGS,
    HEAR,
    IMAGES,
    JOBS,
    PATIENCE_S,
    ROWS,
    SPEECH,
    chat,
    ended,
    film,
    hear,
    post,
    run,
)
from tests.system.served import (
    BAD,
    ENGINES,
    LATE,
    NEVER_ANNOUNCED,
    VOICE,
    Model,
    Served,
    broken,
    copy,
    flip,
    healthy,
    make_hanging,
    serve,
    sha256,
)

pytestmark = [pytest.mark.engine, pytest.mark.slow]

QUICK_S = 60.0  # a refusal; alone it takes milliseconds, a first load 0.2 s. Nobody waits for a job's deadline


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The worker; it must end well after all rows."""
    folder = tmp_path_factory.mktemp("served")
    models = [
        *healthy(),
        *broken(folder / "models"),
        *(Model(f"synthetic-{name}", "bad", kinds=["llm"]) for name in BAD),
    ]
    models.append(Model("hang-image", "image", make_hanging(folder / "models")))
    with serve(folder, models) as served:
        yield served


@pytest.fixture(scope="module", autouse=True)
def slow(served: Served) -> dict[str, str]:
    """Row of `DEADLY` -> its job, submitted before everything else."""
    return {name: served.http.post(JOBS, json=row.job).raise_for_status().json()["id"] for name, row in DEADLY.items()}


# ---- good requests, each with its answer checked


def well(served: Served, model: str) -> None:
    """The model answers rightly. A lane that pauses after a failed load gets the time for it."""
    until = time.monotonic() + PATIENCE_S
    while model not in {one["id"] for one in served.http.get("/v1/models").json()["data"]}:
        assert time.monotonic() < until, f"{model} did not come back"
        time.sleep(0.02)
    WELL[model](served.http, model)


def _good(answer: httpx.Response) -> httpx.Response:
    return answer.raise_for_status()


def well_chat(http: httpx.Client, model: str) -> None:
    assert _good(http.post(CHATS, json=chat(model))).json()["choices"][0]["message"]["content"] == "pong"


def well_echo(http: httpx.Client, model: str) -> None:
    answer = _good(http.post(CHATS, json=chat(model, "still here"))).json()
    assert answer["choices"][0]["message"]["content"] == "still here"


def well_embed(http: httpx.Client, model: str) -> None:
    row = _good(http.post(EMBEDDINGS, json={"model": model, "input": "red car"})).json()["data"][0]["embedding"]
    assert sum(value * value for value in row) == pytest.approx(1, abs=1e-3)


def well_whisper(http: httpx.Client, model: str) -> None:
    answer = _good(http.post(HEAR, data={"model": model}, files={"file": DIGITS.read_bytes()}))
    assert answer.json()["text"] == "three one four"


def well_voice(http: httpx.Client, model: str) -> None:
    said, config, heard = (
        ("hello world", "tone-espeak", "həlˈoʊ wˈɜːld") if "espeak" in model else ("job 42", "tone-text", "job 42")
    )
    answer = _good(http.post(SPEECH, json={"model": model, "input": said, "response_format": "wav"}))
    import soundfile

    samples, rate = soundfile.read(io.BytesIO(answer.content), dtype="float32")
    ids = json.loads((VOICE.parent / f"{config}.onnx.json").read_bytes())["phoneme_id_map"]
    assert tones.decode(samples, rate, ids) == heard


def well_image(http: httpx.Client, model: str) -> None:
    body = {"model": model, "prompt": "a red circle", "size": "64x64", "steps": 10, "seed": 7}
    picture = base64.b64decode(_good(http.post(IMAGES, json=body)).json()["data"][0]["b64_json"])
    assert wrong_file(io.BytesIO(picture), "red", "circle", (64, 64), "png") == ""  # type: ignore[arg-type]


def well_video(http: httpx.Client, model: str) -> None:
    import av

    answer = film(prompt="the blue square")(http)
    with av.open(io.BytesIO(_good(answer).content)) as container:
        assert len(list(container.decode(video=0))) == 4


def well_command(http: httpx.Client, model: str) -> None:
    answer = run("command", "greet", {"args": {"who": "world"}})(http)
    assert "hello world" in _good(answer).text


WELL: dict[str, Callable[[httpx.Client, str], None]] = {
    **dict.fromkeys(("chat", "chat-py", "late-chat"), well_chat),
    **{f"synthetic-{name}": well_echo for name in BAD},
    **dict.fromkeys(("embed", "embed-gguf", "late-embed"), well_embed),
    **dict.fromkeys(("whisper", "late-whisper"), well_whisper),
    **dict.fromkeys(("voice", "voice-espeak", "late-voice"), well_voice),
    **dict.fromkeys(("image", "hang-image"), well_image),
    "video": well_video,
    "greet": well_command,
}


@pytest.mark.parametrize("name", ROWS)
def test_a_bad_request_is_refused_by_name_and_the_next_one_works(served: Served, name: str) -> None:
    row = ROWS[name]
    began = time.monotonic()
    answer = row.ask(served.http)
    assert time.monotonic() - began < QUICK_S
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (row.status, row.code, row.param), error
    assert row.says in error["message"], error
    assert error["type"] == _TYPES.get(row.status, "invalid_request_error")
    well(served, row.then)


_TYPES = {401: "authentication_error", 503: "server_error"}


# ---- digests


def test_a_model_with_a_wrong_digest_is_never_announced(served: Served) -> None:
    answer = served.http.post(CHATS, json=chat(NEVER_ANNOUNCED))
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")
    # Said again at each look: the file may have been mended meanwhile.
    until = time.monotonic() + PATIENCE_S
    while not (
        lines := [line for line in served.words().splitlines() if f"{NEVER_ANNOUNCED} is not announced" in line]
    ):
        assert time.monotonic() < until, served.words()
        time.sleep(0.02)
    line = lines[0]
    healthy_digest = sha256(ENGINES / "llm/fixture/chat-q8_0.gguf")
    assert "flipped.gguf has the sha256" in line
    assert f"where {healthy_digest} was expected" in line


LATE_ASK = {
    "late-chat": post(CHATS, **chat("late-chat")),
    "late-embed": post(EMBEDDINGS, model="late-embed", input="x"),
    "late-whisper": hear(model="late-whisper"),
    "late-voice": post(SPEECH, model="late-voice", input="x"),
}


@pytest.mark.parametrize("name", LATE)
def test_one_flipped_bit_is_a_corrupt_model_until_it_is_mended(served: Served, name: str) -> None:
    """ctranslate2 would load it and answer nonsense; the digest is looked at before every load."""
    _engine, source, inside = LATE[name]
    path = served.folder / "models" / name / inside if inside else served.folder / "models" / name
    flip(path)
    answer = LATE_ASK[name](served.http)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (503, "model_corrupt", "sha256.model"), error
    assert error["owner"] == "engine"
    assert not error["retryable"]
    copy(source / inside if inside else source, path)
    well(served, name)


# ---- what ends an engine


class Death(NamedTuple):
    """A job that ends or hangs its engine, how it ends itself, and the model that must be well afterwards.

    Attributes:
        code: of the attempt's fault. A job to blame for it twice ends as poisoned, with this code beside it.
        poisoned: whether it is to blame: the engine was loaded, and the job was alone in it.
    """

    job: dict[str, Any]
    code: str
    detail: dict[str, Any]
    stderr: str
    then: tuple[str, ...]
    tries: int = 2
    poisoned: bool = True


def _llm(model: str, text: str, **more: Any) -> dict[str, Any]:
    return {"kind": "llm", "model": model, "params": {"messages": [{"role": "user", "content": text}]}, **more}


HANGS = {"prompt": "red", "width": 64, "height": 256, "steps": 2}
DEADLY = {
    "a signal": Death(
        _llm("synthetic-segv", "crash:SIGSEGV"),
        "engine_crashed",
        {"signal": signal.SIGSEGV},
        "Segmentation fault",
        ("synthetic-segv", "chat"),
    ),
    "an exit code": Death(
        _llm("synthetic-exit", "exit:3"), "engine_crashed", {"exit_code": 3}, "", ("synthetic-exit", "chat")
    ),
    "espeak data of another version": Death(
        {"kind": "audio_tts", "model": "old-espeak", "params": {"text": "hello"}},
        "engine_crashed",
        {"exit_code": 1},
        "Wrong version of espeak-ng-data",
        ("voice-espeak",),
        tries=3,
        poisoned=False,
    ),
    "no progress": Death(_llm("synthetic-hang", "hang"), "engine_hung", {}, "in hang", ("synthetic-hang", "chat")),
    "a network that never returns": Death(
        {"kind": "image", "model": "hang-image", "params": HANGS, "deadline_ms": 2500},
        "deadline_exceeded",
        {},
        "",
        ("hang-image", "image"),
        tries=1,
        poisoned=False,
    ),
}


@pytest.mark.parametrize("name", DEADLY)
def test_what_ends_an_engine_is_a_typed_fault_and_the_engine_comes_back(
    served: Served, slow: dict[str, str], name: str
) -> None:
    row = DEADLY[name]
    job = ended(served.http, slow[name])
    assert (job["state"], job["tries"]) == ("failed", row.tries), job
    fault = job["fault"]
    detail = fault.get("detail", {})
    if row.poisoned:
        assert_poisoned(fault, row.code)
    elif row.tries > 1:  # retried up to the coordinator's cap; the fault of the last attempt stands
        assert detail["attempts"] == row.tries
        assert f"All {row.tries} attempts failed" in fault["message"]
    assert row.poisoned or fault["code"] == row.code, fault
    assert row.detail.items() <= detail.items(), detail
    assert row.stderr in "\n".join(detail.get("stderr_tail", [])), detail
    for model in row.then:
        well(served, model)


def assert_poisoned(fault: dict[str, Any], last_code: str) -> None:
    """The job ended its engine twice while nothing else ran there: one try to find out, one to be sure."""
    detail = fault["detail"]
    assert (fault["code"], detail["crashes"], detail["last_code"]) == ("job_poisoned", 2, last_code), fault
    assert "nothing else ran there" in fault["message"]


def events_of(served: Served, model: str, text: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """What a stream of the misbehaving engine says, and its job."""
    with served.http.stream("POST", CHATS, json=chat(model, text, stream=True)) as answer:
        assert answer.status_code == 200
        events = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
    assert "[DONE]" not in events
    job = served.http.get(f"{JOBS}/{answer.headers['x-bulkhead-job']}").json()
    assert job["state"] == "failed"
    return [json.loads(event) for event in events], job


def said(chunks: list[dict[str, Any]]) -> str:
    return "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)


def test_a_crash_in_a_stream_ends_it_with_an_error_event_and_is_not_tried_again(served: Served) -> None:
    """What was sent cannot be taken back: another attempt would contradict it."""
    (*chunks, last), job = events_of(served, "synthetic-stream", "crash-after:3")
    assert said(chunks) == "0 1 2 "
    assert (last["error"]["code"], last["error"]["owner"]) == ("engine_crashed", "engine")
    assert "SIGSEGV" in last["error"]["message"]
    assert job["tries"] == 1
    assert job["fault"]["detail"]["signal"] == signal.SIGSEGV
    assert "Segmentation fault" in job["fault"]["detail"]["stderr_tail"][0]
    well(served, "synthetic-stream")


def test_a_crash_before_the_first_chunk_is_tried_again_behind_an_open_stream(served: Served) -> None:
    (*chunks, last), job = events_of(served, "synthetic-retried", "crash:SIGABRT")
    assert said(chunks) == ""
    assert last["error"]["code"] == "job_poisoned"
    assert "SIGABRT" in last["error"]["message"]
    assert job["tries"] == 2
    assert_poisoned(job["fault"], "engine_crashed")
    assert job["fault"]["detail"]["signal"] == signal.SIGABRT
    well(served, "synthetic-retried")


def test_a_crash_without_a_stream_is_an_http_error_that_names_its_job(served: Served) -> None:
    answer = served.http.post(CHATS, json=chat("synthetic-plain", "exit:3"))
    error = answer.json()["error"]
    assert (answer.status_code, error["type"], error["param"]) == (500, "server_error", None)
    assert "exit code 3" in error["message"]
    job = served.http.get(f"{JOBS}/{answer.headers['x-bulkhead-job']}").json()
    assert job["fault"]["detail"]["exit_code"] == 3
    well(served, "synthetic-plain")
