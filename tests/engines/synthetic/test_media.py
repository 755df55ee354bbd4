"""The files of the synthetic engine are read back by programs that know nothing of it."""

from __future__ import annotations

import io
import itertools
import wave

import pytest

from engines.synthetic import media

RED, BLUE = b"\xff\0\0", b"\0\0\xff"


def test_a_tone_is_a_wav_of_the_right_length():
    data = media.tone_wav([440.0, 880.0], 0.1)
    with wave.open(io.BytesIO(data)) as file:
        assert (file.getnchannels(), file.getsampwidth(), file.getframerate()) == (1, 2, media.SAMPLE_RATE)
        assert file.getnframes() == 2 * media.SAMPLE_RATE // 10
    assert media.wav_seconds(data) == pytest.approx(0.2)


def test_the_samples_cross_zero_as_often_as_the_note_says():
    samples = memoryview(media.tone_pcm([500.0], 1.0)).cast("h")
    crossings = sum(1 for left, right in itertools.pairwise(samples) if left < 0 <= right)
    assert crossings == pytest.approx(500, abs=2)


@pytest.mark.parametrize("data", [b"", b"RIFF", b"not a wav at all"])
def test_what_is_no_wav_is_told(data):
    with pytest.raises((wave.Error, EOFError)):
        media.wav_seconds(data)


@pytest.mark.engine
def test_a_picture_shows_its_rectangle():
    image = pytest.importorskip("PIL.Image")
    picture = image.open(io.BytesIO(media.png(40, 24, RED, BLUE)))
    assert (picture.size, picture.mode) == ((40, 24), "RGB")
    assert picture.getpixel((20, 12)) == (255, 0, 0)
    assert picture.getpixel((0, 0)) == (0, 0, 255)


@pytest.mark.engine
def test_a_film_decodes_frame_by_frame():
    av = pytest.importorskip("av")
    frames = [media.png(64, 48, bytes([number * 20, 0, 0]), BLUE) for number in range(7)]
    with av.open(io.BytesIO(media.mp4(frames, 64, 48, 12))) as film:
        stream = film.streams.video[0]
        assert (stream.width, stream.height, stream.frames, stream.average_rate) == (64, 48, 7, 12)
        decoded = [frame.to_ndarray(format="rgb24") for frame in film.decode(video=0)]
    assert [int(frame[24, 32, 0]) for frame in decoded] == [number * 20 for number in range(7)]
