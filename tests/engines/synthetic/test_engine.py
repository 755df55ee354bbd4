"""The synthetic engine over the real wire: deterministic answers of every kind, and only for its own name."""

from __future__ import annotations

import hashlib
import json
import math
import struct

import pytest

from engines.synthetic import media
from engines.synthetic.engine import SyntheticEngine, _first_stop
from protocol import work
from protocol.engine_wire import Cancel, Model, Progress, Ready
from protocol.faults import Fault

NAME = "synthetic-test"


@pytest.fixture
def child(spawn):
    child = spawn("synthetic")
    ready = child.load(Model(name=NAME, device="cpu", options={"dimensions": 16, "slots": 3}))
    assert isinstance(ready, Ready), ready
    assert (ready.device, ready.slots) == ("cpu", 3)
    return child


def test_it_never_serves_a_model_that_is_not_named_synthetic(spawn):
    fault = spawn("synthetic").load(Model(name="llama-3", device="cpu"))
    assert isinstance(fault, Fault)
    assert (fault.code, fault.field) == ("load_failed", "name")
    assert "llama-3" in fault.message


@pytest.mark.parametrize(
    ("options", "field"),
    [({"slotz": 1}, "options.slotz"), ({"slots": 0}, "options.slots"), ({"delay_ms": "x"}, "options.delay_ms")],
)
def test_bad_load_options_are_named(spawn, options, field):
    fault = spawn("synthetic").load(Model(name=NAME, options=options))
    assert isinstance(fault, Fault)
    assert fault.field == field


def test_asking_for_a_gpu_is_a_failed_load(spawn):
    fault = spawn("synthetic").load(Model(name=NAME, device="cuda"))
    assert isinstance(fault, Fault)
    assert fault.code == "cpu_fallback"


def test_a_slow_load_reports_progress(spawn):
    child = spawn("synthetic")
    assert isinstance(child.load(Model(name=NAME, options={"load_s": 0.2})), Ready)


def test_it_claims_every_kind_of_the_catalogue():
    assert set(SyntheticEngine.kinds) == set(work.PARAMS)


# ---- llm


def test_chat_is_an_echo_word_by_word(child):
    chat = {"messages": [{"role": "system", "content": "x"}, {"role": "user", "content": "one two three"}]}
    answer = child.run("llm", chat, stream=True)
    assert answer.started
    assert answer.body == work.LlmResult(content="one two three", finish_reason="stop")
    assert answer.result.usage == {"prompt_tokens": 3, "completion_tokens": 3}
    pieces = [chunk.get("delta", {}).get("content") for chunk in answer.chunks]
    assert pieces == ["one ", "two ", "three", None]
    assert answer.chunks[-1]["finish_reason"] == "stop"
    assert [report.n for report in answer.progress] == [1, 2, 3]


def test_max_tokens_cuts_and_says_so(child):
    answer = child.run("llm", {"prompt": "a b c d", "max_tokens": 2})
    assert (answer.body.content, answer.body.finish_reason) == ("a b ", "length")
    assert answer.chunks == []


def test_the_option_tokens_makes_long_answers(spawn):
    child = spawn("synthetic")
    child.load(Model(name=NAME, options={"tokens": 7}))
    answer = child.run("llm", {"prompt": "a b c"})
    assert answer.body.content == "a b c a b c a "
    assert answer.result.usage["completion_tokens"] == 7


def test_a_stop_string_ends_the_answer_before_itself(child):
    answer = child.run("llm", {"prompt": "alpha beta gamma", "stop": ["ta"]}, stream=True)
    assert (answer.body.content, answer.body.finish_reason) == ("alpha be", "stop")
    assert "".join(chunk.get("delta", {}).get("content", "") for chunk in answer.chunks) == "alpha be"


@pytest.mark.parametrize(
    ("said", "token", "stops", "at"),
    [("", "abc", ["c"], 2), ("ab", "cd", ["bc"], 0), ("ab", "cd", ["zz"], None), ("", "abc", ["c", "b"], 1)],
)
def test_where_a_stop_string_begins(said, token, stops, at):
    assert _first_stop(said, token, stops) == at


@pytest.mark.parametrize(
    ("kind", "params", "field"),
    [
        ("llm", {"prompt": "x", "grammar": "root ::= x"}, "grammar"),
        ("llm", {"prompt": "x", "tools": [{}]}, "tools"),
        ("llm", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.content"),
        ("audio_tts", {"text": "x", "format": "mp3"}, "format"),
        ("image", {"prompt": "x", "format": "webp"}, "format"),
        ("video", {"prompt": "x"}, "format"),
    ],
)
def test_what_arithmetic_cannot_do_is_refused_by_name(child, kind, params, field):
    answer = child.run(kind, params)
    assert not answer.started
    assert (answer.fault.code, answer.fault.field) == ("unsupported", field)


def test_cancel_ends_a_slow_answer(spawn):
    child = spawn("synthetic")
    child.load(Model(name=NAME, options={"delay_ms": 5, "tokens": 100_000}))
    answer = child.begin("llm", {"prompt": "a b"}, stream=True)
    while not isinstance(child.receive(), Progress):
        pass
    child.send(Cancel(run=1))
    child.finish(answer)
    assert answer.fault.code == "cancelled"
    assert child.run("llm", {"prompt": "a", "max_tokens": 1}).body.content == "a"


# ---- the other kinds


def test_embeddings_have_length_one_and_repeat(child):
    first = child.run("embedding", {"input": ["a", "b"]}).body
    assert first == child.run("embedding", {"input": ["a", "b"]}).body
    assert (first.count, first.dimensions) == (2, 16)
    values = struct.unpack("<32f", first.vectors)
    assert math.hypot(*values[:16]) == pytest.approx(1, abs=1e-6)
    assert values[:16] != values[16:]
    assert child.run("embedding", {"input": ["b"]}).body.vectors == first.vectors[64:]
    assert child.run("embedding", {"input": [[1, 2]], "dimensions": 4}).body.dimensions == 4


def test_rerank_prefers_shared_words(child):
    body = child.run("rerank", {"query": "red car", "documents": ["blue", "a red car", "red"], "top_n": 2}).body
    assert [row["index"] for row in body.results] == [1, 2]
    assert body.results[0]["relevance_score"] == 1.0


def test_speech_is_heard_by_the_transcriber(child, tmp_path):
    speech = child.run("audio_tts", {"text": "hello world" * 3})
    data = speech.files[0].read_bytes()
    assert media.wav_seconds(data) == pytest.approx(speech.body.duration)
    file = speech.result.files[0]
    assert (file.size, file.sha256, file.mime) == (len(data), hashlib.sha256(data).hexdigest(), "audio/wav")
    heard = child.run("audio_stt", {"word_timestamps": True}, inputs={"audio": speech.files[0]}, stream=True)
    assert heard.body.duration == pytest.approx(speech.body.duration)
    assert len(heard.body.segments) == len(heard.chunks) == 2
    assert heard.body.segments[0].words[0].end == 1.0
    assert heard.body.text == "".join(segment.text for segment in heard.body.segments).strip()


def test_twice_the_speed_is_half_the_time(child):
    slow = child.run("audio_tts", {"text": "abcd", "format": "pcm"}).body.duration
    fast = child.run("audio_tts", {"text": "abcd", "format": "pcm", "speed": 2.0}).body.duration
    assert fast == pytest.approx(slow / 2)


def test_what_is_no_wav_is_the_callers_fault(child, tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"nothing to hear")
    answer = child.run("audio_stt", {}, inputs={"audio": path})
    assert (answer.fault.code, answer.fault.field) == ("invalid_input_file", "inputs.audio")


def test_pictures_repeat_by_seed_and_differ_by_prompt(child):
    asked = {"prompt": "x", "width": 32, "height": 32, "seed": 7, "n": 2}
    first = child.run("image", asked)
    assert first.body == work.ImageResult(width=32, height=32, format="png", seeds=[7, 8])
    pictures = [path.read_bytes() for path in first.files]
    assert pictures == [path.read_bytes() for path in child.run("image", asked).files]
    assert pictures[0] != pictures[1]
    assert pictures[1] == child.run("image", {**asked, "seed": 8, "n": 1}).files[0].read_bytes()
    assert pictures[0] != child.run("image", {**asked, "prompt": "y"}).files[0].read_bytes()


def test_a_start_image_changes_the_picture(child, tmp_path):
    start = tmp_path / "start.png"
    start.write_bytes(media.png(16, 16, b"abc", b"def"))
    asked = {"prompt": "x", "width": 32, "height": 32}
    plain = child.run("image", asked).files[0].read_bytes()
    assert plain != child.run("image", asked, inputs={"image": start}).files[0].read_bytes()


def test_a_film_has_the_asked_frames(child):
    asked = {"prompt": "x", "width": 32, "height": 16, "seconds": 0.5, "fps": 8, "format": "mp4"}
    answer = child.run("video", asked)
    assert (answer.body.frames, answer.body.codec) == (4, "png")
    assert answer.files[0].read_bytes().count(b"IHDR") == 4


def test_a_command_says_its_arguments_back(child):
    answer = child.run("command", {"args": {"b": 2, "a": "x"}})
    assert answer.body.output_tail == ["a=x", "b=2"]
    assert json.loads(answer.files[0].read_bytes()) == {"a": "x", "b": 2}
    assert "a=x" in [report.text for report in answer.progress]


# ---- the fixture


@pytest.mark.parametrize("number", range(7))
def test_the_fixture_answers_right(spawn, number):
    fixture = SyntheticEngine.fixture("")
    child = spawn("synthetic")
    child.load(fixture.model)
    case = fixture.cases[number]
    answer = child.run(case.kind, case.params, stream=case.stream)
    assert case.check(answer.body, answer.files) == ""


def test_the_checks_of_the_fixture_can_fail(tmp_path):
    cases = {case.kind: case.check for case in SyntheticEngine.fixture("").cases}
    wrong = tmp_path / "wrong"
    wrong.write_bytes(media.tone_wav([1.0], 1.0))
    assert cases["llm"](work.LlmResult(content="else"), [])
    assert cases["rerank"](work.RerankResult(results=[{"index": 0.0}, {"index": 1.0}]), [])
    assert cases["audio_tts"](work.AudioResult(sample_rate=1, duration=1.0, format="wav"), [wrong])
    assert cases["image"](None, [wrong])


def test_pretended_gpu_memory_is_told_to_the_simulated_reader(spawn):
    child = spawn("synthetic")
    child.load(Model(name=NAME, device="cpu", options={"gpu": "GPU-1", "vram_bytes": 3 * 2**30}))
    assert json.loads((child.folder / "vram.json").read_text()) == {"uuid": "GPU-1", "bytes": 3 * 2**30}


def test_gpu_memory_without_a_gpu_is_refused(spawn):
    fault = spawn("synthetic").load(Model(name=NAME, device="cpu", options={"vram_bytes": 1}))
    assert fault.code == "load_failed"
    assert fault.field == "options.gpu"
