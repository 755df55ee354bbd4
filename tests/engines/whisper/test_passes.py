"""The library's loop with our eyes in it: same answers, progress, cancel, no traces of other runs."""

from __future__ import annotations

import warnings

import pytest

np = pytest.importorskip("numpy")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    faster_whisper = pytest.importorskip("faster_whisper", reason="faster-whisper is not installed (extra stt)")

from engines.runtime.contract import CancelledRun  # noqa: E402
from engines.whisper import passes  # noqa: E402
from tests.engines.whisper.conftest import FIXTURE, MODEL  # noqa: E402

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def model():
    return faster_whisper.WhisperModel(str(MODEL), device="cpu", cpu_threads=1)


@pytest.fixture(scope="module")
def digits():
    return faster_whisper.decode_audio(str(FIXTURE / "digits.flac"))


def nothing(_seconds: float) -> None:
    pass


@pytest.mark.parametrize("length", [0, 1, 159, 16_000, 16_001, 16_000 * 33 + 7])
def test_blocks_give_the_same_spectrogram(model, monkeypatch, length):
    monkeypatch.setattr(passes, "_BLOCK_FRAMES", 1000)
    samples = (np.random.default_rng(1).standard_normal(length) * 0.1).astype(np.float32)
    ours, theirs = passes.BlockExtractor(model.feature_extractor)(samples), model.feature_extractor(samples)
    assert ours.shape == theirs.shape
    assert ours.dtype == theirs.dtype == np.float32
    assert np.allclose(ours, theirs, atol=2e-5)


def test_same_answer_as_the_bare_library(model, digits):
    audio = np.tile(np.concatenate([digits, np.zeros(16_000 * 8, np.float32)]), 5)
    bare = [(one.text, one.start, one.end) for one in model.transcribe(audio, word_timestamps=True)[0]]
    ours = passes.Pass(model, nothing).transcribe(audio, word_timestamps=True)[0]
    assert [(one.text, one.start, one.end) for one in ours] == bare
    assert "three one four" in bare[0][0]


def test_chunk_length_does_not_leak_into_later_runs(model, digits):
    for _ in passes.Pass(model, nothing).transcribe(digits, chunk_length=1)[0]:
        pass
    assert model.feature_extractor.nb_max_frames == 3000
    [heard] = passes.Pass(model, nothing).transcribe(digits)[0]
    assert heard.text == " three one four"


@pytest.mark.parametrize("words", [False, True])
def test_steps_follow_the_audio_through_speech_and_silence(model, digits, words):
    """The library tells nothing of silent windows; the position is still right after them."""
    silence = np.zeros(16_000 * 60, np.float32)
    audio = np.concatenate([silence, digits, silence])
    seen: list[float] = []
    one = passes.Pass(model, seen.append)
    found, _ = one.transcribe(audio, word_timestamps=words)
    one.begin()
    segments = list(found)
    assert [segment.text for segment in segments] == [" three one four"]
    assert seen == sorted(seen)
    assert seen[0] == 0.0
    assert {30.0, 60.0} <= set(seen)
    assert 85 < seen[-1] < len(audio) / 16_000


def test_a_step_that_raises_ends_the_run_before_the_next_native_call(model):
    calls = []

    def step(seconds: float) -> None:
        calls.append(seconds)
        if len(calls) == 5:
            raise CancelledRun

    one = passes.Pass(model, step)
    found, _ = one.transcribe(np.zeros(16_000 * 60, np.float32), chunk_length=1)
    with pytest.raises(CancelledRun):
        list(found)
    assert len(calls) == 5
