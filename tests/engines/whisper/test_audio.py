"""Files from strangers: each is decoded, or refused with the reason."""

from __future__ import annotations

import io
import random
import struct
from pathlib import Path

import pytest

np = pytest.importorskip("numpy")
pytest.importorskip("av", reason="PyAV is not installed (extra stt)")
pytest.importorskip("faster_whisper", reason="faster-whisper is not installed (extra stt)")

from engines.runtime.contract import CancelledRun  # noqa: E402
from engines.whisper import audio  # noqa: E402
from protocol.faults import FaultError  # noqa: E402
from tests.engines.whisper.conftest import FIXTURE, wav  # noqa: E402

pytestmark = pytest.mark.engine


def floats(*values: float) -> bytes:
    return wav(np.array(values * 4000, np.float32).tobytes(), bits=32, code=3)


NOISE = random.Random(1).randbytes(5000)
BAD = {
    "empty": (b"", "damaged or not audio"),
    "text": (b"this is a text, not a sound\n" * 100, "damaged or not audio"),
    "zeros": (bytes(100_000), "damaged or not audio"),
    "random": (NOISE, "damaged or not audio"),
    "bad RIFF": (b"RIFX" + wav()[4:], "damaged or not audio"),
    "cut within the header": (wav()[:20], "damaged or not audio"),
    "rate 0": (wav(rate=0), "damaged or not audio"),
    "rate 1": (wav(rate=1), "sample rate of 1 Hz"),
    "rate 1 MHz": (wav(rate=1_000_000), "sample rate of 1000000 Hz"),
    "rate 2^31": (wav(rate=2**31), "damaged or not audio"),
    "0 channels": (wav(channels=0), "damaged or not audio"),
    "65535 channels": (wav(channels=65_535), "damaged or not audio"),
    "0 bits": (wav(bits=0), "damaged or not audio"),
    "NaN": (floats(0.5, float("nan")), "not finite"),
    "infinity": (floats(0.5, float("-inf")), "not finite"),
    "ffconcat": (b"ffconcat version 1.0\nfile 'SOUND'\n", "damaged or not audio"),
    "HLS": (b"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\nSOUND\n#EXT-X-ENDLIST\n", "damaged or not audio"),
    "picture": (b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + b"IHDR" + bytes(2000), "damaged or not audio"),
}


@pytest.fixture
def put(tmp_path: Path):
    def write(data: bytes) -> Path:
        path = tmp_path / "audio"
        path.write_bytes(data)
        return path

    return write


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_the_callers_fault(put, tmp_path, name):
    data, reason = BAD[name]
    sound = tmp_path / "sound.wav"
    sound.write_bytes(wav())
    with pytest.raises(FaultError) as caught:
        audio.decode(put(data.replace(b"SOUND", bytes(sound))), 16_000, 3600)
    fault = caught.value.fault
    assert (fault.code, fault.field) == ("invalid_input_file", "audio")
    assert reason in fault.message


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FaultError, match="the file is missing"):
        audio.decode(tmp_path / "none", 16_000, 3600)


def test_a_header_without_sound_is_silence_of_length_0(put):
    assert audio.decode(put(wav(b"")), 16_000, 3600).shape == (0,)


def test_half_a_file_is_half_the_sound(put):
    assert len(audio.decode(put(wav()[: 44 + 16_000]), 16_000, 3600)) == 8_000


@pytest.mark.parametrize(("rate", "channels"), [(8_000, 1), (44_100, 2), (48_000, 6)])
def test_any_rate_and_channel_count_becomes_mono(put, rate, channels):
    tone = np.sin(np.arange(rate) * 2 * np.pi * 440 / rate) * 16_000
    data = np.repeat(tone.astype("<i2")[:, None], channels, axis=1).tobytes()
    samples = audio.decode(put(wav(data, rate=rate, channels=channels)), 16_000, 3600)
    assert samples.dtype == np.float32
    assert len(samples) == pytest.approx(16_000, abs=64)
    assert np.argmax(np.abs(np.fft.rfft(samples, 16_000))) == pytest.approx(440, abs=1)


def test_agrees_with_the_librarys_own_decoder():
    import faster_whisper

    path = FIXTURE / "digits.flac"
    ours, theirs = audio.decode(path, 16_000, 3600), faster_whisper.decode_audio(str(path))
    assert np.array_equal(ours, theirs)


@pytest.mark.parametrize("codec", ["mp3", "ogg", "webm"])
def test_compressed_audio(put, codec):
    import av

    place = io.BytesIO()
    with av.open(place, "w", format=codec) as container:
        stream = container.add_stream({"mp3": "libmp3lame", "ogg": "libopus", "webm": "libopus"}[codec], rate=48_000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 48_000), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 48_000
        resampler = av.AudioResampler(format=stream.format.name, layout="stereo", rate=48_000)
        for part in [*resampler.resample(frame), *resampler.resample(None)]:
            container.mux(stream.encode(part))
        container.mux(stream.encode(None))
    assert len(audio.decode(put(place.getvalue()), 16_000, 3600)) == pytest.approx(16_000, rel=0.1)


def test_a_small_file_with_long_silence_is_refused_at_the_limit():
    clip = FIXTURE / "silence-10min.flac"
    assert clip.stat().st_size < 20_000
    with pytest.raises(FaultError, match=r"longer than the 60 s .*max_audio_s"):
        audio.decode(clip, 16_000, 60)


def test_one_damaged_packet_costs_only_itself(put):
    good = (FIXTURE / "digits.flac").read_bytes()
    middle = len(good) // 2
    damaged = good[:middle] + bytes(200) + good[middle + 200 :]
    whole = len(audio.decode(put(good), 16_000, 3600))
    assert whole * 0.5 < len(audio.decode(put(damaged), 16_000, 3600)) <= whole


def test_decoding_can_be_stopped():
    heard = []

    def step(seconds: float) -> None:
        heard.append(seconds)
        if seconds > 30:
            raise CancelledRun

    with pytest.raises(CancelledRun):
        audio.decode(FIXTURE / "silence-10min.flac", 16_000, 3600, step)
    assert 30 < heard[-1] < 35
