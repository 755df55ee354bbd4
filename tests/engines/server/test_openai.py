"""The OpenAI routes against a real HTTP server that answers well and badly on request."""

from __future__ import annotations

import json
import math
import struct

import pytest

from engines.server.openai import _Answer, llm_body
from protocol import work
from protocol.engine_wire import Cancel, Model, Ready
from protocol.faults import Fault, FaultError

CHAT = {"messages": [{"role": "user", "content": "hi"}]}


@pytest.fixture
def load(spawn, standin):
    def start(**options):  # noqa: ANN003
        child = spawn("server")
        answer = child.load(Model(name="outer", options={"url": standin.url, "served_model": "inner", **options}))
        return child, answer

    return start


@pytest.fixture
def child(load):
    child, ready = load()
    assert isinstance(ready, Ready), ready
    return child


def _data(**fields):  # noqa: ANN003
    return f"data: {json.dumps(fields)}\n\n"


def _piece(finish_reason=None, **delta):  # noqa: ANN003
    return _data(choices=[{"index": 0, "delta": delta, "finish_reason": finish_reason}])


# ---- load


def test_what_the_server_says_of_itself_is_reported(load):
    _, ready = load(vram_gb=8, device="cuda:0", slots=7)
    assert (ready.device, ready.slots) == ("cuda:0", 7)
    assert ready.limits["n_ctx"] == 77
    assert (ready.limits["models"], ready.limits["vram_gb"], ready.limits["declared"]) == (["inner"], 8.0, True)


def test_it_waits_until_the_server_is_healthy(load, standin):
    standin.health = [503, 500, 200]
    _, ready = load()
    assert isinstance(ready, Ready)
    assert [path for _, path, _, _ in standin.seen] == ["/health"] * 3 + ["/v1/models"]


def test_a_server_that_never_becomes_healthy_is_a_failed_load(load, standin):
    standin.health = [503]
    _, fault = load(start_s=0.3)
    assert isinstance(fault, Fault)
    assert (fault.code, fault.field) == ("load_failed", "options.start_s")
    assert "answers 503" in fault.message


def test_nobody_there_is_a_failed_load(spawn):
    fault = spawn("server").load(Model(name="x", options={"url": "http://127.0.0.1:1", "start_s": 0.2}))
    assert isinstance(fault, Fault)
    assert "Connection refused" in fault.message


def test_a_gpu_that_nobody_declared_is_a_fallback(spawn, standin):
    fault = spawn("server").load(Model(name="x", device="cuda", options={"url": standin.url}))
    assert isinstance(fault, Fault)
    assert fault.code == "cpu_fallback"


def test_the_key_comes_from_the_granted_environment(load):
    _, fault = load(key_env="NO_SUCH_VARIABLE")
    assert isinstance(fault, Fault)
    assert fault.field == "options.key_env"


def test_the_key_is_sent(load, standin):
    child, _ = load(key_env="PATH")  # any variable that the engine surely has
    child.run("embedding", {"input": ["x"]})
    headers = standin.seen[-1][2]
    assert headers["Authorization"].startswith("Bearer /")


# ---- llm


def test_a_stream_with_tools_reasoning_and_usage(child, standin):
    call = {"index": 0, "id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a"'}}
    rest = {"index": 0, "function": {"arguments": ":1}"}}
    usage = {"prompt_tokens": 3, "completion_tokens": 5, "prompt_tokens_details": {"cached_tokens": 2}}
    standin.chat = [
        ": a comment\n\n",
        _piece(role="assistant", content=None),
        _piece(reasoning="hm"),
        _piece(content="so "),
        _piece(tool_calls=[call]),
        _piece(tool_calls=[rest]),
        _piece("tool_calls"),
        _data(choices=[], usage=usage),
        "data: [DONE]\n\n",
    ]
    tools = [{"type": "function", "function": {"name": "f"}}]
    answer = child.run("llm", {**CHAT, "tools": tools, "tool_choice": "auto"}, stream=True)
    whole = {"type": "function", "id": "c1", "function": {"name": "f", "arguments": '{"a":1}'}}
    assert answer.body == work.LlmResult(
        content="so ", reasoning_content="hm", tool_calls=[whole], finish_reason="tool_calls"
    )
    assert answer.result.usage == {"prompt_tokens": 3, "completion_tokens": 5, "cached_tokens": 2}
    assert len(answer.chunks) == 5
    sent = standin.body_of("/v1/chat/completions")
    assert (sent["model"], sent["tools"], sent["stream"]) == ("inner", tools, True)


def test_a_separator_inside_json_does_not_split_an_event(child, standin):
    standin.chat = [_piece(content="a\u2028b\x0bc").replace("\\u2028", "\u2028"), _piece("stop"), "data: [DONE]\n\n"]
    assert child.run("llm", CHAT).body.content == "a\u2028b\x0bc"


@pytest.mark.parametrize(
    ("frames", "code", "words", "retry"),
    [
        ([_piece(content="a"), None], "engine_failed", "ended before", True),
        ([_piece(content="a"), _data(error={"message": "cuda is gone", "code": 500})], "engine_failed", "cuda", False),
        (["data: {not json\n\n"], "engine_failed", "not a JSON object", False),
        (["400", '{"error": {"message": "bad top_p", "param": "top_p"}}'], "invalid_request", "bad top_p", False),
        (["422", '{"detail": "odd"}'], "invalid_request", "odd", False),
        (
            ["400", '{"error": {"code": "context_length_exceeded", "message": "m"}}'],
            "context_length_exceeded",
            "m",
            False,
        ),
        (["401", "{}"], "engine_failed", "key_env", False),
        (["404", "{}"], "engine_failed", "does not offer", False),
        (["413", "{}"], "payload_too_large", "{}", False),
        (["429", '"slow down"'], "engine_failed", "slow down", True),
        (["500", "[1]"], "engine_failed", "answered 500", False),
    ],
)
def test_bad_answers_are_typed_faults(child, standin, frames, code, words, retry):
    standin.chat = frames
    fault = child.run("llm", CHAT).fault
    assert (fault.code, fault.may_retry) == (code, retry)
    assert words in fault.message


def test_a_field_of_the_servers_error_is_kept(child, standin):
    standin.chat = ["400", '{"error": {"message": "bad", "param": "top_p"}}']
    assert child.run("llm", CHAT).fault.field == "top_p"


def test_cancel_before_the_first_byte_hangs_up(child, standin):
    standin.chat = ["HOLD"]
    answer = child.begin("llm", CHAT)
    assert standin.asked.wait(60)
    child.send(Cancel(run=1))
    assert child.finish(answer).fault.code == "cancelled"
    assert standin.gone.wait(60)


@pytest.mark.parametrize(
    ("kind", "params", "field"),
    [
        ("llm", {"prompt": "x", "grammar": "g"}, "grammar"),
        ("llm", {"prompt": "x", "json_object": True}, "json_object"),
        (
            "llm",
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]},
            "messages.0.content",
        ),
        ("image", {"prompt": "x", "steps": 3}, "steps"),
        ("audio_tts", {"text": "x"}, "kind"),
    ],
)
def test_what_the_server_would_ignore_is_refused_by_name(spawn, standin, kind, params, field):
    child = spawn("server")
    options = {"url": standin.url, "image_fields": {}}
    child.load(Model(name="x", kinds=("llm", "image"), options=options))
    answer = child.run(kind, params)
    assert not answer.started
    assert (answer.fault.code, answer.fault.field) == ("unsupported", field)


def test_a_picture_in_a_message_must_be_inline(load, standin):
    child, _ = load(features=["vision"])
    standin.chat = [_piece("stop", content="ok"), "data: [DONE]\n\n"]

    def ask(url):
        return child.run(
            "llm", {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]}
        )

    assert ask("http://169.254.169.254/").fault.field == "messages.0.content"
    assert ask("data:image/png;base64,AA==").body.content == "ok"


def test_a_request_holds_only_what_was_set():
    params = work.LlmParams(prompt="x", seed=0, temperature=0.0, stop=["a"], logprobs=True)
    assert llm_body("m", params) == {
        "model": "m",
        "stream": True,
        "stream_options": {"include_usage": True},
        "prompt": "x",
        "seed": 0,
        "temperature": 0.0,
        "stop": ["a"],
        "logprobs": 1,
    }
    schema = work.LlmParams(messages=[work.Message(role="user", content="x")], json_schema={"type": "object"})
    assert llm_body("m", schema)["response_format"]["json_schema"]["schema"] == {"type": "object"}


def test_logprobs_of_all_chunks_are_joined():
    answer = _Answer()
    for token in "ab":
        answer.take({"choices": [{"delta": {"content": token}, "logprobs": {"content": [{"token": token}]}}]}, True)
    assert answer.result().logprobs == {"content": [{"token": "a"}, {"token": "b"}]}


def test_an_error_event_keeps_its_meaning():
    with pytest.raises(FaultError) as caught:
        _Answer().take({"error": {"message": "too long", "type": "exceed_context_size_error", "code": 400}}, True)
    assert caught.value.fault.code == "context_length_exceeded"


# ---- the other kinds


def test_embeddings_are_sorted_and_normalised(child):
    body = child.run("embedding", {"input": ["a", "b"]}).body
    values = struct.unpack("<4f", body.vectors)
    assert values == pytest.approx([0.6, 0.8, 3 / math.hypot(3, 5), 5 / math.hypot(3, 5)])
    fault = child.run("embedding", {"input": ["a"], "dimensions": 9}).fault
    assert (fault.code, fault.field) == ("unsupported", "dimensions")


def test_rerank_is_best_first(child):
    body = child.run("rerank", {"query": "q", "documents": ["a", "b", "c"], "top_n": 2}).body
    assert [row["index"] for row in body.results] == [2, 1]


def test_speech_is_measured_by_its_own_bytes(child, standin):
    answer = child.run("audio_tts", {"text": "hello", "speed": 1.5, "voice": "nova"})
    assert (answer.body.sample_rate, answer.body.duration) == (16_000, 0.5)
    assert answer.result.usage == {"characters": 5, "audio_seconds": 0.5}
    assert standin.body_of("/v1/audio/speech")["voice"] == "nova"
    assert child.run("audio_tts", {"text": "x", "format": "mp3"}).fault.message == "The server did not answer with mp3."


@pytest.mark.parametrize("shape", ["data", "relative", "absolute"])
def test_pictures_come_inline_or_from_the_server_itself(child, standin, shape):
    standin.shape = shape
    answer = child.run("image", {"prompt": "x", "n": 2, "seed": 5, "steps": 3, "width": 32, "height": 16})
    assert answer.body == work.ImageResult(width=32, height=16, format="png", seeds=[5, 6])
    assert [path.read_bytes() for path in answer.files] == [standin.picture] * 2
    sent = standin.body_of("/v1/images/generations")
    assert (sent["size"], sent["seed"], sent["num_inference_steps"]) == ("32x16", 5, 3)
    assert "guidance_scale" not in sent


@pytest.mark.parametrize(("shape", "words"), [("elsewhere", "another server"), ("nothing", "no picture")])
def test_no_picture_is_fetched_from_elsewhere(child, standin, shape, words):
    standin.shape = shape
    fault = child.run("image", {"prompt": "x"}).fault
    assert (fault.code, words in fault.message) == ("engine_failed", True)


def test_another_format_than_asked_is_told(child):
    fault = child.run("image", {"prompt": "x", "format": "webp"}).fault
    assert (fault.code, fault.field) == ("unsupported", "format")


def test_a_start_image_is_refused(child, tmp_path):
    answer = child.run("image", {"prompt": "x"}, inputs={"image": tmp_path / "x"})
    assert answer.fault.field == "inputs.image"
