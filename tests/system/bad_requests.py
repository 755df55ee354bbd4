"""Bad requests and how they are sent: the tables of test_bad_input.py."""

from __future__ import annotations

import base64
import struct
import time
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import httpx

from tests.system.served import ENGINES, HAS_LLAMA_CPP_PYTHON, LLMS

PATIENCE_S = 120.0
DIGITS = ENGINES / "whisper/fixture/digits.flac"
JSON = "application/json"
CHATS, PLAIN, EMBEDDINGS = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"
SPEECH, IMAGES, VIDEOS, JOBS = "/v1/audio/speech", "/v1/images/generations", "/v1/videos", "/v1/jobs"
HEAR, TRANSLATE = "/v1/audio/transcriptions", "/v1/audio/translations"


# ---- how requests are sent

Ask = Callable[[httpx.Client], httpx.Response]


def chat(model: str, text: str = "ping", **more: Any) -> dict[str, Any]:
    """Body of a chat."""
    return {"model": model, "messages": [{"role": "user", "content": text}], "temperature": 0, **more}


def post(path: str, **body: Any) -> Ask:
    """A JSON body."""
    return lambda http: http.post(path, json=body)


def raw(path: str, body: bytes, content_type: str = JSON, **headers: str) -> Ask:
    """A body as it is."""
    return lambda http: http.post(path, content=body, headers={"content-type": content_type, **headers})


def hear(audio: bytes | None = None, path: str = HEAR, **fields: str) -> Ask:
    """An upload to the whisper model; the good clip unless told."""
    files = {"file": ("a.wav", DIGITS.read_bytes() if audio is None else audio)}
    return lambda http: http.post(path, data={"model": "whisper", **fields}, files=files)


def film(**fields: Any) -> Ask:
    """A video and its content; `image` is the start image."""
    image = fields.pop("image", None)
    body = {"model": "video", "prompt": "red", "size": "64x64", "seconds": "0.5", "fps": 8, "seed": 1, **fields}
    if image is not None:
        body["input_reference"] = data_url(image)

    def ask(http: httpx.Client) -> httpx.Response:
        made = http.post(VIDEOS, json=body)
        if made.is_error:
            return made
        return _outcome(http, made.json()["id"], f"{VIDEOS}/{made.json()['id']}/content")

    return ask


def run(kind: str, model: str, params: dict[str, Any], **files: bytes) -> Ask:
    """A job and its result."""
    inputs = {name: data_url(data) for name, data in files.items()}

    def ask(http: httpx.Client) -> httpx.Response:
        made = http.post(JOBS, json={"kind": kind, "model": model, "params": params, "inputs": inputs})
        return made if made.is_error else _outcome(http, made.json()["id"], f"{JOBS}/{made.json()['id']}/result")

    return ask


def _outcome(http: httpx.Client, job: str, url: str) -> httpx.Response:
    ended(http, job)
    return http.get(url)


def ended(http: httpx.Client, job: str) -> dict[str, Any]:
    """Wait for the end of a job."""
    until = time.monotonic() + PATIENCE_S
    while (shown := http.get(f"{JOBS}/{job}").json())["state"] in ("queued", "running"):
        assert time.monotonic() < until, shown
        time.sleep(0.01)
    return shown


def data_url(data: bytes) -> str:
    """Bytes inside JSON; the type is found out from the bytes."""
    return "data:application/octet-stream;base64," + base64.b64encode(data).decode()


# ---- bad files


def wav(data: bytes = bytes(8000), *, channels: int = 1, rate: int = 16_000, bits: int = 16, code: int = 1) -> bytes:
    """A WAV with any header. Code 3 is float."""
    frame = channels * bits // 8
    head = struct.pack("<HHIIHH", code, channels, rate, rate * frame & 0xFFFFFFFF, frame & 0xFFFF, bits)
    body = b"WAVEfmt " + struct.pack("<I", len(head)) + head + b"data" + struct.pack("<I", len(data)) + data
    return b"RIFF" + struct.pack("<I", len(body)) + body


def png(width: int, height: int, pixels: bytes) -> bytes:
    """A PNG whose header may promise more than it holds."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(pixels)) + chunk(b"IEND", b"")


BOMB = png(50_000, 50_000, bytes(50_000 * 3 + 1))
SHORT_PNG = png(64, 64, bytes(100))
NAN_WAV = wav(struct.pack("<f", float("nan")) * 16_000, bits=32, code=3)
INF_WAV = wav(struct.pack("<f", float("inf")) * 16_000, bits=32, code=3)


# ---- the table


class Row(NamedTuple):
    """A bad request, its answer, and the model that must be well afterwards."""

    ask: Ask
    status: int
    code: str
    param: str | None
    then: str
    says: str = ""


GRAMMARS = {
    "open groups": "root ::= (((",
    "open class": "root ::= [",
    "no root": 'x ::= "a"',
    "undefined rule": "root ::= missing",
    "left recursion": 'root ::= root "a"',
    "NUL": 'root ::= "a\0"',
}
NONSENSE = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nonsense"}}}
PICTURE = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}]
LONG = "word " * 2000


def _of_chat(model: str) -> dict[str, Row]:
    """Every row once for each backend of llm."""

    def row(says: str = "", code: str = "invalid_parameter", **body: Any) -> Row:
        param = body.pop("param")
        return Row(post(CHATS, **{**chat(model), **body}), 400, code, param, model, says)

    fit = "context_length_exceeded"
    rows = {f"grammar: {name}": row(param="grammar", grammar=text) for name, text in GRAMMARS.items()}
    rows |= {
        "grammar in a stream": row(param="grammar", grammar="root ::= (((", stream=True),
        "schema": row(param="response_format", response_format=NONSENSE),
        "prompt beyond the context": row("512", fit, param="messages", **chat(model, LONG)),
        "answer beyond the context": row("512", fit, param="max_completion_tokens", max_completion_tokens=5000),
        "answer beyond the context, streamed": row("512", fit, param="max_tokens", max_tokens=5000, stream=True),
        "a picture": row("text", "unsupported", param="messages.0.content", messages=PICTURE),
        "plain prompt beyond the context": Row(
            post(PLAIN, model=model, prompt=LONG), 400, fit, "prompt", model, "Shorten the prompt"
        ),
        "token ids as a prompt": Row(
            post(PLAIN, model=model, prompt=[1, 999_999]), 400, "invalid_parameter", "prompt", model
        ),
        "temperature": row("2", param="temperature", temperature=3),
        "n": row("from 1 to 16", param="n", n=17),
        "unknown field": row("Unknown field", param="temprature", temprature=1),
        "wrong type": row("int", param="max_tokens", max_tokens="many"),
        "messages of the wrong type": row("array", param="messages", messages="hello"),
        "unknown role": row("boss", param="messages[0].role", messages=[{"role": "boss", "content": "x"}]),
        "no messages": row(param="messages", messages=[]),
    }
    return {f"{model}: {name}": row for name, row in rows.items()}


REQUEST = {
    "NaN": Row(raw(CHATS, b'{"model": "chat", "temperature": NaN}'), 400, "invalid_request", None, "chat"),
    "Infinity": Row(raw(CHATS, b'{"model": "chat", "top_p": -Infinity}'), 400, "invalid_request", None, "chat"),
    "1e999": Row(raw(CHATS, b'{"model": "chat", "temperature": 1e999}'), 400, "invalid_request", None, "chat"),
    "deep nesting": Row(
        raw(CHATS, b'{"messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"), 400, "invalid_request", None, "chat"
    ),
    "65 levels": Row(
        raw(CHATS, b'{"metadata": ' + b'{"a": ' * 65 + b"1" + b"}" * 66), 400, "invalid_request", None, "chat", "64"
    ),
    "half a surrogate pair": Row(
        raw(CHATS, b'{"model": "chat", "messages": [{"role": "user", "content": "a\\ud800b"}]}'),
        400,
        "invalid_request",
        None,
        "chat",
    ),
    "not UTF-8": Row(raw(CHATS, b'{"model": "\xff\xfe"}'), 400, "invalid_request", None, "chat", "utf-8"),
    "cut JSON": Row(raw(CHATS, b'{"model":'), 400, "invalid_request", None, "chat", "not JSON"),
    "empty body": Row(raw(CHATS, b""), 400, "invalid_request", None, "chat", "empty"),
    "a list": Row(raw(CHATS, b"[]"), 400, "invalid_request", None, "chat", "JSON object"),
    "oversized body": Row(
        raw(CHATS, b'{"x": "' + b"x" * 9 * 2**20 + b'"}'), 413, "payload_too_large", None, "chat", "8388608"
    ),
    "wrong content type": Row(raw(CHATS, b"{}", "text/plain"), 415, "unsupported_media_type", None, "chat", "text/"),
    "no model": Row(post(CHATS, messages=[]), 400, "invalid_parameter", "model", "chat", "required"),
    "model of the wrong type": Row(
        post(CHATS, **chat("chat") | {"model": 3}), 400, "invalid_parameter", "model", "chat"
    ),
    "unknown model": Row(post(CHATS, **chat("nobody")), 404, "model_not_found", "model", "chat", "/v1/models"),
    "model of another kind": Row(post(CHATS, **chat("voice")), 400, "unsupported", "model", "chat", "audio_tts"),
    "bad key": Row(
        raw(CHATS, b"{}", authorization="Bearer bhc_wrong"), 401, "unauthorized", None, "chat", "unknown or was revoked"
    ),
    "no key": Row(raw(CHATS, b"{}", authorization=""), 401, "unauthorized", None, "chat", "Bearer KEY"),
    "unknown route": Row(raw("/v1/nope", b"{}"), 404, "not_found", None, "chat"),
    "unknown kind of job": Row(
        post(JOBS, kind="dance", model="chat", params={}), 400, "invalid_parameter", "kind", "chat"
    ),
    "unknown parameter of a job": Row(
        run("llm", "chat", {"prompt": "x", "temprature": 1}), 400, "invalid_parameter", "params.temprature", "chat"
    ),
    "argument that is not there": Row(
        run("command", "greet", {}), 400, "invalid_parameter", "args.who", "greet", "missing"
    ),
    "argument with a NUL": Row(
        run("command", "greet", {"args": {"who": "a\0b"}}), 400, "invalid_parameter", "params.args", "greet", "NUL"
    ),
    "program of the caller's": Row(
        run("command", "greet", {"argv": ["sh"]}), 400, "invalid_parameter", "params.argv", "greet"
    ),
}

EMBEDDING = {
    f"{model}: {name}": Row(post(EMBEDDINGS, model=model, input=value), 400, code, param, model, says)
    for model in ("embed", "embed-gguf")
    for name, value, code, param, says in (
        ("token id", [999_999], "invalid_parameter", "input.0", "vocabulary"),
        ("token id in a batch", [[1], [1, 999_999]], "invalid_parameter", "input.1", "vocabulary"),
        ("negative token id", [-1], "invalid_parameter", "input", "token ids"),
        ("token id of 2^40", [2**40], "invalid_parameter", "input", "token ids"),
        ("too long", "word " * 5000, "context_length_exceeded", "input.0", "exceed"),
        ("empty text", "", "invalid_parameter", "input", "empty"),
        ("empty text in a batch", ["a", ""], "invalid_parameter", "input", "empty"),
        ("empty batch", [], "invalid_parameter", "input", "2048"),
        ("mixed batch", ["a", [1]], "invalid_parameter", "input", "only"),
    )
} | {
    "dimensions": Row(
        post(EMBEDDINGS, model="embed", input="x", dimensions=10_000), 400, "invalid_parameter", "dimensions", "embed"
    )
}

HEARING = {
    name: Row(ask, status, code, param, "whisper", says)
    for name, ask, status, code, param, says in (
        ("chunk_length 0", hear(chunk_length_s="0"), 400, "invalid_parameter", "chunk_length_s", ">= 1"),
        ("beam_size 100000", hear(beam_size="100000"), 400, "invalid_parameter", "beam_size", "<= 16"),
        ("temperature", hear(temperature="nan"), 400, "invalid_parameter", "temperature", ""),
        ("language", hear(language="de"), 400, "invalid_parameter", "language", "English-only"),
        ("translation", hear(path=TRANSLATE), 400, "invalid_parameter", "model", "English-only"),
        ("format", hear(response_format="docx"), 400, "invalid_parameter", "response_format", "vtt"),
        ("unknown form field", hear(beams="3"), 400, "invalid_parameter", "beams", "Unknown field"),
        ("empty file", hear(b""), 400, "invalid_parameter", "file", "empty"),
        ("garbage", hear(b"just text"), 400, "invalid_input_file", "file", "not audio"),
        ("zeros", hear(bytes(100_000)), 400, "invalid_input_file", "file", "not audio"),
        ("bad RIFF", hear(b"RIFF\xff\xff\xff\xffWAVE" + bytes(100)), 400, "invalid_input_file", "file", "not audio"),
        ("65535 channels", hear(wav(channels=65_535)), 400, "invalid_input_file", "file", ""),
        ("no sample rate", hear(wav(rate=0)), 400, "invalid_input_file", "file", ""),
        ("2 GHz", hear(wav(rate=2**31 - 1)), 400, "invalid_input_file", "file", "sample rate"),
        ("0 bits", hear(wav(bits=0)), 400, "invalid_input_file", "file", "decoder"),
        ("NaN audio", hear(NAN_WAV), 400, "invalid_input_file", "file", "not finite"),
        ("infinite audio", hear(INF_WAV), 400, "invalid_input_file", "file", "not finite"),
        ("no form", raw(HEAR, b"{}"), 415, "unsupported_media_type", None, "multipart"),
        (
            "no file",
            lambda http: http.post(HEAR, files={"model": (None, "whisper")}),
            400,
            "invalid_parameter",
            "file",
            "required",
        ),
        (
            "a form that breaks off",
            raw(
                HEAR,
                b'--b\r\nContent-Disposition: form-data; name="model"\r\n\r\nwhi',
                "multipart/form-data; boundary=b",
            ),
            400,
            "invalid_request",
            None,
            "closing boundary",
        ),
        (
            "prompt token id",
            run("audio_stt", "whisper", {"prompt": [999_999]}, audio=DIGITS.read_bytes()),
            400,
            "invalid_parameter",
            "prompt",
            "vocabulary",
        ),
        (
            "prompt token id below 0",
            run("audio_stt", "whisper", {"prompt": [-1]}, audio=DIGITS.read_bytes()),
            400,
            "invalid_parameter",
            "params.prompt[0]",
            ">= 0",
        ),
        ("job without audio", run("audio_stt", "whisper", {}), 400, "invalid_parameter", "inputs.audio", "required"),
    )
}

SPEAKING = {
    f"{model}: {name}": Row(post(SPEECH, model=model, **body), 400, "invalid_parameter", param, model, says)
    for model in ("voice", "voice-espeak")
    for name, body, param, says in (
        ("empty", {"input": ""}, "input", "length >= 1"),
        ("blank", {"input": " \n"}, "input", "nothing to say"),
        ("NULs", {"input": "\0\0"}, "input", "NUL"),
        ("NUL inside", {"input": "a\0b"}, "input", "NUL"),
        # espeak-ng says the name of a grinning face, but has nothing to say of full stops
        ("no sound in it", {"input": "..." if "espeak" in model else "\N{GRINNING FACE}"}, "input", "nothing in"),
        ("too long", {"input": "a" * 100_001}, "input", "100000"),
        ("voice", {"input": "a", "voice": "nobody"}, "voice", "known: default"),
        ("speed", {"input": "a", "speed": 100}, "speed", "<= 4"),
        ("format", {"input": "a", "response_format": "aiff"}, "response_format", "flac"),
        ("language", {"input": "a", "language": "de"}, "language", "en_US"),
    )
} | {
    "voice: half a surrogate pair": Row(
        raw(SPEECH, b'{"model": "voice", "input": "a\\ud800b"}'), 400, "invalid_request", None, "voice"
    )
}


def _picture(**body: Any) -> Ask:
    return post(IMAGES, **{"model": "image", "prompt": "red", "size": "64x64", **body})


def _painted(image: bytes) -> Ask:
    return run("image", "image", {"prompt": "red", "width": 64, "height": 64}, image=image)


SEEING = {
    f"{then}: {name}": Row(ask, status, code, param, then, says)
    for name, ask, status, code, param, then, says in (
        ("odd size", _picture(size="63x64"), 400, "invalid_parameter", "size", "image", "multiple of 8"),
        ("size of nothing", _picture(size="0x0"), 400, "invalid_parameter", "size", "image", "WIDTHxHEIGHT"),
        ("beyond the model", _picture(size="4096x4096"), 400, "invalid_parameter", "size", "image", "pixels"),
        ("absurd size", _picture(size="99999x99999"), 400, "invalid_parameter", "size", "image", "4096"),
        ("steps", _picture(steps=10**6), 400, "invalid_parameter", "steps", "image", "<= 500"),
        ("count", _picture(n=1000), 400, "invalid_parameter", "n", "image", "<= 16"),
        ("seed", _picture(seed=-1), 400, "invalid_parameter", "seed", "image", ">= 0"),
        ("prompt", _picture(prompt="red " * 200), 400, "context_length_exceeded", "prompt", "image", "75"),
        ("no prompt", _picture(prompt=""), 400, "invalid_parameter", "prompt", "image", ""),
        ("PNG bomb", _painted(BOMB), 400, "invalid_input_file", "image", "image", "pixels"),
        ("broken PNG", _painted(SHORT_PNG), 400, "invalid_input_file", "image", "image", ""),
        ("no picture", _painted(b"nothing"), 415, "unsupported_media_type", "inputs.image", "image", "PNG"),
        ("PNG bomb", film(image=BOMB), 400, "invalid_input_file", "input_reference", "video", "pixels"),
        ("broken PNG", film(image=SHORT_PNG), 400, "invalid_input_file", "input_reference", "video", ""),
        ("no picture", film(image=b"nothing"), 415, "unsupported_media_type", "input_reference", "video", "PNG"),
        ("a link", film(input_reference="http://x/"), 400, "invalid_parameter", "input_reference", "video", "links"),
        ("21 MiB", film(image=bytes(21 * 2**20)), 413, "payload_too_large", "input_reference", "video", "20971520"),
        ("odd size", film(size="63x64"), 400, "invalid_parameter", "size", "video", "multiple of 8"),
        ("odd height", film(size="64x99"), 400, "invalid_parameter", "size", "video", "multiple of 8"),
        ("beyond the model", film(size="4096x4096"), 400, "invalid_parameter", "size", "video", "pixels"),
        ("absurd length", film(seconds="99999"), 400, "invalid_parameter", "seconds", "video", "600"),
        ("no frame", film(seconds="0.01", fps=1), 400, "invalid_parameter", "seconds", "video", "frames"),
        ("seconds of words", film(seconds="long"), 400, "invalid_parameter", "seconds", "video", "number"),
        ("fps", film(fps=0), 400, "invalid_parameter", "fps", "video", ">= 1"),
        ("prompt", film(prompt="red " * 200), 400, "context_length_exceeded", "prompt", "video", "75"),
    )
}

LOADING = {
    name: Row(ask, 503, "load_failed", param, then, says)
    for name, ask, param, then, says in (
        ("n_ctx of 100 million", post(CHATS, **chat("huge-chat")), "options.n_ctx", "chat", "exceed the 512"),
        ("cut GGUF", post(CHATS, **chat("cut-chat")), "files.model", "chat", "truncated"),
        ("cut ONNX, embed", post(EMBEDDINGS, model="cut-embed", input="x"), "files.model", "embed", "model.onnx"),
        ("cut ONNX, image", _picture(model="cut-image"), "files.model", "image", "unet"),
        ("cut voice", post(SPEECH, model="cut-voice", input="x"), "files.model", "voice", "cut.onnx"),
        ("cut model.bin", hear(model="cut-whisper"), "files.model", "whisper", "cut-whisper"),
        (
            "no espeak data",
            post(SPEECH, model="no-espeak", input="x"),
            "options.espeak_data",
            "voice-espeak",
            "phontab",
        ),
    )
}
if HAS_LLAMA_CPP_PYTHON:
    LOADING |= {
        "n_ctx of 100 million, second backend": LOADING["n_ctx of 100 million"]._replace(
            ask=post(CHATS, **chat("huge-chat-py")), then="chat-py"
        ),
        "cut GGUF, second backend": LOADING["cut GGUF"]._replace(
            ask=post(CHATS, **chat("cut-chat-py")), then="chat-py"
        ),
    }

ROWS = {
    **{name: row for model in LLMS for name, row in _of_chat(model).items()},
    **REQUEST,
    **EMBEDDING,
    **HEARING,
    **SPEAKING,
    **SEEING,
    **LOADING,
}
