"""The real engine behind the real wire: what it says, what it refuses, how it ends."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import msgspec
import pytest

pytest.importorskip("piper", reason="piper-tts is not installed (extra tts)")
pytest.importorskip("soundfile", reason="soundfile is not installed (extra tts)")

from engines.piper import tones
from engines.piper.engine import ENGINE, tone_case
from engines.piper.phonemes import MAX_PHONEMES
from protocol import engine_wire as wire
from protocol import work
from tests.engines.piper.conftest import ESPEAK, TEXT

pytestmark = pytest.mark.engine

HELLO_IPA = "həlˈoʊ wˈɜːld"


def model(path: Path = TEXT, device: str = "cpu", **options: Any) -> wire.Model:
    return wire.Model(name="voice", files={"model": str(path)}, device=device, options={"threads": 1} | options)


@pytest.fixture
def child(spawn):
    started = spawn("piper")
    assert isinstance(started.load(model()), wire.Ready)
    return started


@pytest.fixture
def espeak(spawn):
    started = spawn("piper")
    assert isinstance(started.load(model(ESPEAK)), wire.Ready)
    return started


def heard(answer) -> str:
    assert answer.fault is None, answer.fault
    return tones.decode_file(answer.files[0], Path(f"{TEXT}.json"))


def test_ready_says_what_really_runs(spawn):
    ready = spawn("piper").load(model(slots=3, threads=1, voices={"alloy": "default"}))
    assert (ready.device, ready.compute_type, ready.slots) == ("cpu", "float32", 3)
    assert ready.limits == {
        "sample_rate": 22_050,
        "voices": ["default", "voice", "tone-text", "alloy"],
        "language": "en_US",
    }
    assert set(ready.versions) == {"piper-tts", "soundfile", "onnxruntime"}


@pytest.mark.parametrize("number", range(3))
def test_fixture_cases(child, number):
    case = ENGINE.fixture("").cases[number]
    answer = child.run(case.kind, {**case.params, "voice": "default"})
    assert case.check(answer.body, answer.files) == ""


@pytest.mark.parametrize("format_", work.AUDIO_MIME)
def test_every_format_at_every_speed(child, format_):
    text = "the quick brown fox, 0123456789!?'-."
    for speed in (0.25, 1.0, 2.0, 4.0):
        answer = child.run("audio_tts", {"text": text, "format": format_, "speed": speed})
        body, [file] = answer.body, answer.result.files
        assert (file.name, file.mime, body.format) == (f"speech.{format_}", work.AUDIO_MIME[format_], format_)
        assert answer.result.usage == {"characters": len(text), "audio_seconds": body.duration}
        if format_ == "pcm":
            import numpy as np

            samples = np.frombuffer(answer.files[0].read_bytes(), "<i2").astype(np.float32) / 32768
            assert len(samples) / body.sample_rate == pytest.approx(body.duration)
            ids = msgspec.json.decode(Path(f"{TEXT}.json").read_bytes())["phoneme_id_map"]
            assert tones.decode(samples, body.sample_rate, ids) == text
        else:
            assert heard(answer) == text, speed


@pytest.mark.parametrize("format_", work.AUDIO_MIME)
def test_what_is_streamed_is_the_file_as_it_grows(espeak, format_, tmp_path):
    """A listener who takes the pieces, and then the rest of the file, hears what the file says."""
    asked = {"text": "Hello world. " * 12, "format": format_}
    answer = espeak.run("audio_tts", asked, stream=True)
    whole = answer.files[0].read_bytes()
    pieces = [chunk["audio"] for chunk in answer.chunks]
    if format_ in ("wav", "flac"):
        assert pieces == [], "their beginning is written last"
        return
    assert len(pieces) > 1, "nothing came before the end"
    streamed = b"".join(pieces)
    assert len(streamed) > len(whole) / 2
    # An MP3's first frame is rewritten with the length at the end.
    start = 2000 if format_ == "mp3" else 0
    assert streamed[start:] == whole[start : len(streamed)]
    if format_ != "pcm":
        (tmp_path / "heard").write_bytes(streamed + whole[len(streamed) :])
        config = Path(f"{ESPEAK}.json")
        assert tones.decode_file(tmp_path / "heard", config) == tones.decode_file(answer.files[0], config)


def test_nothing_is_streamed_unasked(child):
    assert child.run("audio_tts", {"text": "hello", "format": "pcm"}).chunks == []


def test_speed_sets_the_length(child):
    lengths = [
        child.run("audio_tts", {"text": "hello world", "speed": speed}).body.duration for speed in (0.5, 1.0, 2.0)
    ]
    assert lengths[0] == pytest.approx(2 * lengths[1], rel=0.01)
    assert lengths[2] == pytest.approx(lengths[1] / 2, rel=0.15)  # frames are whole


def test_an_espeak_voice_speaks_phonemes(espeak):
    case = tone_case("hello world", "tone-espeak", HELLO_IPA)
    answer = espeak.run(case.kind, case.params)
    assert case.check(answer.body, answer.files) == ""


def test_each_sentence_is_progress(espeak):
    answer = espeak.run("audio_tts", {"text": "Hello world. How are you? Fine."})
    assert [(one.n, one.total, one.phase) for one in answer.progress] == [
        (1, 3, "sentence"),
        (2, 3, "sentence"),
        (3, 3, "sentence"),
    ]


def test_a_sentence_of_any_length_is_spoken_whole(child):
    """Piper alone fails on it: its memory grows with the square of the sentence."""
    text = ("hello world " * 60).strip()
    assert len(text) > 2 * MAX_PHONEMES
    answer = child.run("audio_tts", {"text": text, "speed": 4.0})
    assert heard(answer) == text
    assert len(answer.progress) == 3


def test_speakers(spawn, duo):
    child = spawn("piper")
    assert isinstance(child.load(model(duo, voices={"alloy": "high"})), wire.Ready)
    for voice, expected in (
        ("default", "ace"),
        ("low", "ace"),
        ("0", "ace"),
        ("high", "bdf"),
        ("1", "bdf"),
        ("alloy", "bdf"),
    ):
        assert heard(child.run("audio_tts", {"text": "ace", "voice": voice})) == expected, voice


def test_bad_requests_name_the_field_and_the_next_one_works(espeak):
    for params, field, reason in (
        ({"text": ""}, "text", ""),
        ({"text": " \n\t "}, "text", "nothing to say"),
        ({"text": "..."}, "text", "nothing in '...'"),
        ({"text": "[[ ]]"}, "text", "nothing in"),
        ({"text": "a\0b"}, "text", "NUL"),
        ({"text": "a" * 100_001}, "text", "100000"),
        ({"text": "hello", "voice": "nobody"}, "voice", "known: default, voice, tone-espeak"),
        ({"text": "hello", "voice": ""}, "voice", "known: default"),
        ({"text": "hello", "speed": 0}, "speed", ">= 0.25"),
        ({"text": "hello", "speed": 1e6}, "speed", "<= 4"),
        ({"text": "hello", "speed": float("nan")}, "speed", ""),
        ({"text": "hello", "speed": float("inf")}, "speed", ""),
        ({"text": "hello", "format": "aiff"}, "format", "aiff"),
        ({"text": "hello", "language": "de"}, "language", "speaks en_US"),
        ({"text": "hello", "pitch": 2}, "pitch", ""),
        ({}, "text", "missing"),
    ):
        answer = espeak.run("audio_tts", params)
        assert answer.fault is not None, params
        assert (answer.fault.code, answer.fault.field) == ("invalid_parameter", field), answer.fault
        assert reason in answer.fault.message, answer.fault
        assert not answer.started
        assert not list(answer.folder.iterdir())
    assert espeak.run("audio_tts", {"text": "hello"}).fault is None


def test_half_a_surrogate_pair_is_the_callers_fault(child):
    """msgpack cannot say it properly; a client that writes the three bytes anyway is answered, not cut off."""
    params = msgspec.Raw(b"\x81\xa4text\xa5ab\xed\xa0\x80")
    child._runs += 1
    child.send(wire.Validate(run=child._runs, kind="audio_tts", params=params))
    fault = child.receive().fault
    assert (fault.code, fault.owner) == ("invalid_parameter", "caller")
    assert heard(child.run("audio_tts", {"text": "hello"})) == "hello"


def test_unknown_signs_are_left_out(child):
    assert heard(child.run("audio_tts", {"text": "a\N{GRINNING FACE}b世c"})) == "abc"


def test_accents_are_taken_apart(child):
    assert heard(child.run("audio_tts", {"text": "é"})) == "e"  # NFD: e, and a mark that this voice has not


def test_cancel_and_the_instance_goes_on(child):
    case = ENGINE.fixture("").endless
    answer = child.begin(case.kind, case.params)
    while not isinstance(child.receive(), wire.Progress):
        pass
    child.send(wire.Cancel(run=1))
    child.finish(answer, run=1)
    assert answer.fault is not None
    assert answer.fault.code == "cancelled"
    assert heard(child.run("audio_tts", {"text": "hello"})) == "hello"


def test_two_slots_run_side_by_side(spawn):
    child = spawn("piper")
    assert child.load(model(slots=2)).slots == 2
    case = ENGINE.fixture("").endless
    first = child.begin(case.kind, case.params)
    while not isinstance(child.receive(), wire.Progress):
        pass
    assert heard(child.run("audio_tts", {"text": "second"})) == "second"
    child.send(wire.Cancel(run=1))
    assert child.finish(first, run=1).fault.code == "cancelled"


# ---- load


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"slots": 0}, "options.slots"),
        ({"threads": -1}, "options.threads"),
        ({"voices": {"alloy": "nobody"}}, "options.voices"),
        ({"voices": "alloy"}, "options.voices"),
        ({"speed": 1}, "options.speed"),
    ],
)
def test_load_options_are_checked(spawn, options, field):
    fault = spawn("piper").load(model(**options))
    assert (fault.code, fault.field) == ("load_failed", field)


def test_a_damaged_voice_leaves_the_process_alive(spawn, tmp_path):
    path = Path(shutil.copy(TEXT, tmp_path))
    shutil.copy(f"{TEXT}.json", tmp_path)
    path.write_bytes(path.read_bytes()[:1000])
    child = spawn("piper")
    fault = child.load(model(path))
    assert (fault.code, fault.field) == ("load_failed", "files.model")
    assert child.process.poll() is None


def test_an_unknown_espeak_voice_shows_at_the_load(spawn, tmp_path):
    shutil.copy(ESPEAK, tmp_path)
    config = msgspec.json.decode(Path(f"{ESPEAK}.json").read_bytes()) | {"espeak": {"voice": "tlh-QQ"}}
    (tmp_path / "tone-espeak.onnx.json").write_bytes(msgspec.json.encode(config))
    fault = spawn("piper").load(model(tmp_path / "tone-espeak.onnx"))
    assert (fault.code, fault.field) == ("load_failed", "files.model")
    assert "cannot speak" in fault.message


def test_missing_espeak_data_is_a_load_fault_not_the_end(spawn, tmp_path):
    child = spawn("piper")
    fault = child.load(model(ESPEAK, espeak_data=str(tmp_path)))
    assert (fault.code, fault.field) == ("load_failed", "options.espeak_data")
    assert child.process.poll() is None


def test_what_a_native_exit_looks_like_from_outside(spawn, tmp_path):
    """espeak-ng calls exit(1) when its data is of another version: no exception, no fault, just the end."""
    from tests.engines.conftest import Ended

    for name in ("phontab", "phondata", "phonindex", "intonations"):
        (tmp_path / name).write_bytes(bytes(64))
    child = spawn("piper")
    with pytest.raises(Ended) as caught:
        child.load(model(ESPEAK, espeak_data=str(tmp_path)))
    assert caught.value.returncode == 1
    assert "Wrong version of espeak-ng-data" in caught.value.stderr
    assert "Traceback" not in caught.value.stderr


def test_cuda_on_a_cpu_build_is_a_failed_load(spawn):
    answer = spawn("piper").load(model(device="cuda"))
    if isinstance(answer, wire.Ready):
        assert answer.device == "cuda:0"
    else:
        assert (answer.code, answer.field) == ("cpu_fallback", "device")


@pytest.mark.gpu
def test_on_a_gpu(spawn):
    import onnxruntime

    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        pytest.skip("onnxruntime is built without CUDA")
    child = spawn("piper")
    ready = child.load(model(device="cuda"))
    if not isinstance(ready, wire.Ready):
        pytest.skip(f"onnxruntime finds no GPU: {ready.message}")
    assert ready.device == "cuda:0"
    assert heard(child.run("audio_tts", {"text": "hello world"})) == "hello world"


# ---- probe, fixture


def test_probe_claims_the_libraries_and_the_licence():
    claims = ENGINE.probe("")
    assert set(claims.versions) == {"piper-tts", "soundfile", "onnxruntime"}
    assert claims.devices[0] == "cpu"
    assert ENGINE.licence.startswith("GPL-3.0-or-later")


def test_the_check_notices_wrong_audio(child):
    case = ENGINE.fixture("").cases[0]
    answer = child.run("audio_tts", {"text": "hello word"})
    assert "hello word" in case.check(answer.body, answer.files)


def test_what_the_fixture_calls_refused_is_refused(child):
    for kind, params in ENGINE.fixture("").refused:
        assert child.run(kind, params).fault.code == "invalid_parameter"


# ---- across engines


@pytest.mark.parametrize("text", ["hello world", "job 42 done."])
@pytest.mark.parametrize("format_", ["wav", "flac", "opus"])
def test_whisper_hears_what_piper_says(child, spawn, text, format_):
    pytest.importorskip("faster_whisper", reason="faster-whisper is not installed (extra stt)")
    ears = Path(__file__).parents[3] / "engines" / "whisper" / "fixture" / "whisper-tiny-test"
    listener = spawn("whisper")
    assert isinstance(
        listener.load(wire.Model(name="ears", files={"model": str(ears)}, device="cpu", options={"threads": 1})),
        wire.Ready,
    )
    spoken = child.run("audio_tts", {"text": text, "format": format_})
    answer = listener.run("audio_stt", {"language": "en"}, inputs={"audio": spoken.files[0]})
    assert answer.body.text == text
