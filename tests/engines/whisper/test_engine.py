"""The real engine behind the real wire: answers, bad requests, cancel, load faults."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import msgspec
import pytest

pytest.importorskip("faster_whisper", reason="faster-whisper is not installed (extra stt)")

from engines.whisper.engine import ENGINE
from protocol import engine_wire as wire
from protocol import work
from tests.engines.whisper.conftest import FIXTURE, MODEL, wav

pytestmark = pytest.mark.engine

DIGITS = {"audio": FIXTURE / "digits.flac"}
HELLO = {"audio": FIXTURE / "hello-tones.flac"}
SILENCE = {"audio": FIXTURE / "silence-10min.flac"}


def model(folder: Path = MODEL, *, device: str = "cpu", **options: Any) -> wire.Model:
    return wire.Model(name="tiny", files={"model": str(folder)}, device=device, options={"threads": 1} | options)


@pytest.fixture
def child(spawn):
    started = spawn("whisper")
    assert isinstance(started.load(model()), wire.Ready)
    return started


def test_ready_says_what_really_runs(spawn):
    ready = spawn("whisper").load(model(slots=2, threads=1, max_audio_s=60))
    assert ready.device == "cpu"
    # The file holds int8_float16, which a CPU cannot compute; the library converts it with a mere warning.
    assert ready.compute_type == "int8_float32"
    assert ready.slots == 2
    assert ready.limits["max_audio_s"] == 60
    assert ready.limits["vocabulary"] == 1765
    assert ready.limits["compute_type_asked"] == "default"
    assert ready.versions["faster-whisper"].startswith("1.2")


@pytest.mark.parametrize("number", range(2))
def test_fixture_cases(child, number):
    case = ENGINE.fixture("").cases[number]
    answer = child.run(case.kind, case.params, inputs=case.inputs, stream=case.stream)
    assert case.check(answer.body, answer.files) == ""


def test_segments_carry_every_field_and_words_have_times(child):
    answer = child.run("audio_stt", {"word_timestamps": True}, inputs=DIGITS)
    body = answer.body
    assert (body.text, body.language, body.task) == ("three one four", "en", "transcribe")
    assert body.duration == pytest.approx(1.42, abs=0.01)
    assert answer.result.usage == {"audio_seconds": body.duration}
    [segment] = body.segments
    assert (segment.id, segment.text, segment.seek, segment.temperature) == (0, " three one four", 0, 0.0)
    assert 0 <= segment.start < segment.end <= 1.5
    assert segment.tokens
    assert -1 < segment.avg_logprob < 0
    assert 0 < segment.compression_ratio < 2
    assert 0 <= segment.no_speech_prob < 0.1
    assert [word.word.strip() for word in segment.words] == ["three", "one", "four"]
    assert all(word.start < word.end and word.probability > 0.9 for word in segment.words)


def digits_every(seconds: float, times: int, path: Path) -> Path:
    """Write the digits again and again."""
    import numpy as np

    from engines.whisper.audio import decode

    clip = decode(DIGITS["audio"], 16_000, 60)
    one = np.pad(clip, (0, int(seconds * 16_000) - len(clip)))
    path.write_bytes(wav((np.tile(one, times) * 32767).astype("<i2").tobytes()))
    return path


def test_a_stream_is_one_chunk_per_finished_segment(child, tmp_path):
    long = digits_every(1.5, 8, tmp_path / "long.wav")
    answer = child.run("audio_stt", {"chunk_length_s": 2}, inputs={"audio": long}, stream=True)
    streamed = [msgspec.convert(chunk, work.SttChunk).segment for chunk in answer.chunks]
    assert streamed == answer.body.segments
    assert len(streamed) > 1
    assert [segment.id for segment in streamed] == list(range(len(streamed)))
    assert streamed[0].text == " three one four"
    assert answer.body.text == "".join(segment.text for segment in streamed).strip()


def test_progress_follows_the_windows_to_the_end(child, tmp_path):
    long = digits_every(15, 12, tmp_path / "long.wav")
    answer = child.run("audio_stt", {}, inputs={"audio": long})
    windows = [one for one in answer.progress if one.phase == "window"]
    counts = [one.n for one in windows]
    assert counts == sorted(set(counts))
    assert counts[-1] == windows[-1].total == 18_000
    assert any(2_000 < n < 16_000 for n in counts)


def test_options_of_a_request(child):
    for params in (
        {"prompt": []},
        {"prompt": ""},
        {"beam_size": 1},
        {"beam_size": 16},
        {"language": "en"},
        {"chunk_length_s": 30},
        {"temperature": 0.01},
    ):
        answer = child.run("audio_stt", params, inputs=DIGITS)
        assert answer.body.text == "three one four", params
    for prompt in ("one two three", [111, 110, 101], [264, 32, 111, 1764], "ünï \N{GRINNING FACE}" * 1000, [111] * 448):
        # The fixture was never taught to go on from a prompt, so only that it takes one is known.
        assert child.run("audio_stt", {"prompt": prompt}, inputs=DIGITS).fault is None
    # One short window length changes nothing for those who come later.
    child.run("audio_stt", {"chunk_length_s": 1}, inputs=DIGITS)
    assert child.run("audio_stt", {}, inputs=DIGITS).body.text == "three one four"


def test_vad_drops_silence_and_keeps_the_times_of_the_whole(child, tmp_path):
    silent = child.run("audio_stt", {"vad": True}, inputs=SILENCE)
    assert (silent.body.text, silent.body.segments, silent.body.duration) == ("", [], 600.0)
    from engines.whisper.audio import decode

    path = tmp_path / "late.wav"
    late = bytes(16_000 * 2 * 20) + (decode(DIGITS["audio"], 16_000, 60) * 32767).astype("<i2").tobytes()
    path.write_bytes(wav(late))
    heard = child.run("audio_stt", {"vad": True}, inputs={"audio": path})
    assert heard.body.text == "three one four"
    assert heard.body.segments[0].start > 19


def test_bad_requests_name_the_field_and_the_next_one_works(child):
    """Each of these would end the process, loop for ever or take minutes if the library saw it."""
    for params, field, reason in (
        ({"prompt": [999_999]}, "prompt", "token id 999999 is not below 1765"),
        ({"prompt": [1765]}, "prompt", "token id 1765"),
        ({"prompt": [111, 257]}, "prompt", "token id 257 is a control token"),
        ({"prompt": [-1]}, "prompt", ">= 0"),
        ({"prompt": [1] * 449}, "prompt", "length <= 448"),
        ({"chunk_length_s": 0}, "chunk_length_s", ">= 1"),
        ({"chunk_length_s": 31}, "chunk_length_s", "<= 30"),
        ({"beam_size": 100_000}, "beam_size", "<= 16"),
        ({"beam_size": 0}, "beam_size", ">= 1"),
        ({"temperature": float("nan")}, "temperature", ""),
        ({"temperature": 1.5}, "temperature", "<= 1"),
        ({"task": "translate"}, "task", "English-only"),
        ({"task": "sing"}, "task", "sing"),
        ({"language": "de"}, "language", "English-only"),
        ({"language": "English"}, "language", ""),
        ({"no_such": 1}, "no_such", ""),
    ):
        answer = child.run("audio_stt", params, inputs=DIGITS)
        assert answer.fault is not None, params
        assert (answer.fault.code, str(answer.fault.field).split("[")[0]) == ("invalid_parameter", field), params
        assert reason in answer.fault.message, answer.fault
        assert not answer.started
    assert child.run("audio_stt", {}, inputs=DIGITS).body.text == "three one four"


def test_bad_audio_is_the_callers_fault_and_the_next_request_works(child, tmp_path):
    for number, (data, reason) in enumerate(
        (
            (b"", "damaged or not audio"),
            (b"just text", "damaged or not audio"),
            (bytes(100_000), "damaged or not audio"),
            (wav(channels=65_535), "damaged or not audio"),
            (wav(b"\xff\xff\xff\x7f" * 1000, bits=32, code=3), "not finite"),
        )
    ):
        path = tmp_path / f"bad{number}"
        path.write_bytes(data)
        answer = child.run("audio_stt", {}, inputs={"audio": path})
        assert (answer.fault.code, answer.fault.field) == ("invalid_input_file", "audio")
        assert reason in answer.fault.message
        assert answer.fault.owner == "caller"
    missing = child.run("audio_stt", {})
    assert (missing.fault.code, missing.fault.field) == ("invalid_input_file", "audio")
    empty = tmp_path / "header-only.wav"
    empty.write_bytes(wav(b""))
    for vad in (False, True):
        answer = child.run("audio_stt", {"vad": vad}, inputs={"audio": empty})
        assert (answer.body.text, answer.body.duration, answer.body.segments) == ("", 0.0, [])
    assert child.run("audio_stt", {}, inputs=HELLO).body.text == "hello world"


def test_audio_beyond_the_limit_is_refused(spawn):
    short = spawn("whisper")
    assert isinstance(short.load(model(max_audio_s=30)), wire.Ready)
    answer = short.run("audio_stt", {}, inputs=SILENCE)
    assert (answer.fault.code, answer.fault.field) == ("invalid_input_file", "audio")
    assert "30 s" in answer.fault.message
    assert short.run("audio_stt", {}, inputs=DIGITS).body.text == "three one four"


def test_cancel_between_windows_and_the_instance_goes_on(child):
    case = ENGINE.fixture("").endless
    answer = child.begin(case.kind, case.params, inputs=case.inputs)
    while not (isinstance(message := child.receive(), wire.Progress) and message.phase == "window"):
        pass
    child.send(wire.Cancel(run=1))
    child.finish(answer, run=1)
    assert answer.fault is not None
    assert answer.fault.code == "cancelled"
    assert child.run("audio_stt", {}, inputs=DIGITS).body.text == "three one four"


def test_two_slots_run_side_by_side(spawn):
    two = spawn("whisper")
    assert two.load(model(slots=2, threads=1)).slots == 2
    long = ENGINE.fixture("").endless
    first = two.begin(long.kind, long.params, inputs=long.inputs)
    while not isinstance(message := two.receive(), wire.Progress) or message.phase != "window":
        pass
    second = two.run("audio_stt", {}, inputs=DIGITS)  # ends while the first still runs
    assert second.body.text == "three one four"
    two.send(wire.Cancel(run=1))
    assert two.finish(first, run=1).fault.code == "cancelled"


# ---- load


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"compute_type": "float16"}, "options.compute_type"),
        ({"compute_type": "bogus"}, "options.compute_type"),
        ({"compute_typ": "int8"}, "options.compute_typ"),
        ({"slots": 0}, "options.slots"),
        ({"threads": "many"}, "options.threads"),
        ({"max_audio_s": 0}, "options.max_audio_s"),
    ],
)
def test_load_options_are_checked(spawn, options, field):
    fault = spawn("whisper").load(model(**options))
    assert (fault.code, fault.field) == ("load_failed", field)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("model.bin", b""),
        ("model.bin", bytes(1000)),
        ("model.bin", None),
        ("config.json", b"{"),
        ("tokenizer.json", b"{}"),
        ("tokenizer.json", None),
        ("vocabulary.json", b"["),
        ("preprocessor_config.json", b'{"feature_size": 128}'),
    ],
)
def test_a_damaged_model_is_a_load_fault_that_speaks_of_the_model(spawn, tmp_path, name, damage):
    folder = Path(shutil.copytree(MODEL, tmp_path / "model"))
    if damage is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(damage)
    fault = spawn("whisper").load(model(folder))
    assert (fault.code, fault.field) == ("load_failed", "files.model")
    assert str(folder) in fault.message or "mels" in fault.message


def test_a_cut_model_file_is_a_load_fault(spawn, tmp_path):
    folder = Path(shutil.copytree(MODEL, tmp_path / "model"))
    whole = (folder / "model.bin").read_bytes()
    (folder / "model.bin").write_bytes(whole[: len(whole) // 2])
    child = spawn("whisper")
    assert child.load(model(folder)).code == "load_failed"
    assert child.process.poll() is None


def test_a_tokenizer_of_a_larger_model_is_refused(spawn, tmp_path):
    folder = Path(shutil.copytree(MODEL, tmp_path / "model"))
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["beyond"] = 50_000
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    fault = spawn("whisper").load(model(folder))
    assert fault.code == "load_failed"
    assert "token 50000" in fault.message


def test_a_missing_model_and_an_unknown_device(spawn, tmp_path):
    child = spawn("whisper")
    assert child.load(model(tmp_path / "none")).field == "files.model"
    other = spawn("whisper")
    assert other.load(model(device="tpu")).field == "device"


def test_cuda_is_cuda_or_a_failed_load(spawn):
    answer = spawn("whisper").load(model(device="cuda"))
    if isinstance(answer, wire.Ready):
        assert answer.device == "cuda:0"
    else:
        assert (answer.code, answer.field) == ("load_failed", "device")
        assert "CUDA" in answer.message


@pytest.mark.gpu
def test_on_a_gpu(spawn):
    import ctranslate2

    if not ctranslate2.get_cuda_device_count():
        pytest.skip("CTranslate2 sees no GPU")
    child = spawn("whisper")
    ready = child.load(model(device="cuda"))
    assert isinstance(ready, wire.Ready), ready
    assert ready.device == "cuda:0"
    assert child.run("audio_stt", {}, inputs=DIGITS).body.text == "three one four"


# ---- languages


def test_a_multilingual_model_detects_and_translates(spawn, multilingual):
    """Random weights: what it hears is noise, but the roads of language and task are the real ones."""
    child = spawn("whisper")
    ready = child.load(model(multilingual))
    assert ready.limits["multilingual"] is True
    detected = child.run("audio_stt", {"temperature": 0.2}, inputs=DIGITS).body
    assert detected.language in ("en", "de", "fr")
    assert 0.3 < detected.language_probability <= 1
    given = child.run("audio_stt", {"language": "de", "temperature": 0.2}, inputs=DIGITS).body
    assert (given.language, given.language_probability) == ("de", 1.0)
    translated = child.run("audio_stt", {"task": "translate", "language": "fr", "temperature": 0.2}, inputs=DIGITS)
    assert translated.body.task == "translate"
    refused = child.run("audio_stt", {"language": "xx"}, inputs=DIGITS)
    assert (refused.fault.code, refused.fault.field) == ("invalid_parameter", "language")
    not_trained = child.run("audio_stt", {"language": "ja"}, inputs=DIGITS)  # a code, but no token of this model
    assert not_trained.fault.field == "language"


# ---- probe, fixture


def test_probe_claims_the_libraries_and_the_cpu():
    claims = ENGINE.probe("")
    assert set(claims.versions) == {"faster-whisper", "ctranslate2", "av"}
    assert claims.devices[0] == "cpu"


def test_the_check_notices_a_wrong_answer():
    case = ENGINE.fixture("").cases[0]
    assert "three one four" in case.check(work.SttResult(text="two", language="en", duration=1.0), [])


def test_what_the_fixture_calls_refused_is_refused(child):
    for kind, params in ENGINE.fixture("").refused:
        assert child.run(kind, params, inputs=DIGITS).fault.code == "invalid_parameter"
