"""Every format holds the sound that was written, whole, at a rate it can have."""

from __future__ import annotations

from pathlib import Path

import pytest

np = pytest.importorskip("numpy")
soundfile = pytest.importorskip("soundfile", reason="soundfile is not installed (extra tts)")

from engines.piper.output import Output, resample  # noqa: E402
from protocol.work import AUDIO_MIME  # noqa: E402

pytestmark = pytest.mark.engine
RATE = 22_050
MAGIC = {"wav": b"RIFF", "flac": b"fLaC", "ogg": b"OggS", "opus": b"OggS"}


def tone(seconds: float, rate: int = RATE, hertz: float = 440):
    return (0.5 * np.sin(np.arange(int(seconds * rate)) * 2 * np.pi * hertz / rate)).astype(np.float32)


def loudest_hertz(samples, rate: int) -> float:
    return float(np.argmax(np.abs(np.fft.rfft(samples)))) * rate / len(samples)


def read(path: Path, format_: str):
    if format_ == "pcm":
        return np.frombuffer(path.read_bytes(), "<i2") / 32768, RATE
    return soundfile.read(path)


@pytest.mark.parametrize("format_", AUDIO_MIME)
def test_pieces_become_one_sound(tmp_path, format_):
    path = tmp_path / "out"
    with Output(path, format_, RATE) as output:
        for _ in range(4):
            output.write(tone(0.5))
    assert output.seconds == pytest.approx(2.0, abs=0.001)
    assert path.read_bytes().startswith(MAGIC.get(format_, b""))
    samples, rate = read(path, format_)
    assert len(samples) / rate == pytest.approx(2.0, abs=0.1)
    assert loudest_hertz(samples, rate) == pytest.approx(440, abs=2)
    assert np.abs(samples).max() == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize(("format_", "before", "after"), [("opus", 22_050, 24_000), ("opus", 16_000, 16_000)])
@pytest.mark.parametrize("seconds", [0.3])
def test_opus_gets_a_rate_it_knows(tmp_path, format_, before, after, seconds):
    with Output(tmp_path / "out", format_, before) as output:
        output.write(tone(seconds, before))
    assert output.rate == after
    assert output.seconds == pytest.approx(seconds, abs=0.001)


def test_odd_rates_of_voices_fit_every_format(tmp_path):
    for format_ in AUDIO_MIME:
        for rate in (7_000, 17_000, 96_000):
            with Output(tmp_path / f"{format_}{rate}", format_, rate) as output:
                output.write(tone(0.2, rate))
            assert output.seconds == pytest.approx(0.2, abs=0.002)


def test_minutes_of_vorbis_do_not_overflow_the_encoders_stack(tmp_path):
    with Output(tmp_path / "out", "ogg", RATE) as output:
        output.write(tone(180))
    assert soundfile.info(tmp_path / "out").duration == pytest.approx(180, abs=0.1)


def test_samples_beyond_one_are_cut_not_wrapped(tmp_path):
    with Output(tmp_path / "out", "wav", RATE) as output:
        output.write(np.full(1000, 1.5, np.float32))
    samples, _ = soundfile.read(tmp_path / "out")
    assert samples.min() > 0.99


@pytest.mark.parametrize(("before", "after"), [(22_050, 24_000), (22_050, 48_000), (96_000, 48_000)])
def test_resampling_keeps_pitch_and_length(before, after):
    changed = resample(tone(1, before), before, after)
    assert changed.dtype == np.float32
    assert len(changed) == after
    assert loudest_hertz(changed, after) == pytest.approx(440, abs=1)
    assert np.abs(changed[100:-100]).max() == pytest.approx(0.5, abs=0.02)


def test_nothing_stays_nothing():
    assert resample(np.zeros(0, np.float32), 22_050, 48_000).size == 0
