"""Decode an uploaded audio file to mono float32 with PyAV, or say what is wrong with it.

faster_whisper.decode_audio does the same for a file that is good; this one is for files from strangers:
- a list of demuxers, and no protocol: FFmpeg guesses the format from the content, and a playlist (HLS, ffconcat)
  that calls itself a WAV file would make it open local files and URLs;
- the length is checked while decoding, since a small compressed file may hold days of audio;
- samples that are not finite are refused: Whisper answers them with a text of NUL characters;
- one damaged packet costs this packet, not the rest of the file.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import av
import numpy as np
from av.audio.frame import AudioFrame
from av.audio.resampler import AudioResampler
from numpy.typing import NDArray

from protocol.faults import FaultError, refuse

Samples = NDArray[np.float32]

# Demuxers by FFmpeg's names: audio files, and the containers in which phones and browsers record.
FORMATS = "wav,w64,flac,ogg,mp3,aac,mov,mp4,matroska,webm,aiff,caf,amr,au,asf,ac3,eac3,mpegts,avi"

# A header may claim any rate; resampling 1 Hz to 16 kHz would make 16,000 samples of each one.
_LOWEST_RATE, _HIGHEST_RATE = 1_000, 768_000
_S16 = 32768.0


def decode(path: Path, rate: int, max_s: float, step: Callable[[float], None] = lambda _s: None) -> Samples:
    """Return the first audio track as mono float32 in [-1, 1) at `rate` Hz; empty when the track is.

    Args:
        max_s: longest audio taken, in seconds.
        step: called with the seconds decoded so far; may raise to stop.

    Raises:
        FaultError: `invalid_input_file`, field "audio", naming what is wrong.
    """
    try:
        with path.open("rb") as file, _open(file) as container:
            return _track(container, rate, max_s, step)
    except FileNotFoundError:
        raise _bad("the file is missing") from None
    except av.error.FFmpegError as error:
        raise _bad(f"it is damaged or not audio ({error.strerror or type(error).__name__})") from None
    except (MemoryError, OverflowError) as error:
        raise _bad(f"its header makes no sense ({type(error).__name__})") from None


def _open(file: Any) -> Any:
    options = {"format_whitelist": FORMATS, "protocol_whitelist": "none"}
    return av.open(file, mode="r", metadata_errors="ignore", options=options)


def _track(container: Any, rate: int, max_s: float, step: Callable[[float], None]) -> Samples:
    if not container.streams.audio:
        raise _bad("it holds no audio track")
    stream = container.streams.audio[0]
    if stream.codec_context is None:
        raise _bad("it is damaged or not audio (there is no decoder for its encoding)")
    if not _LOWEST_RATE <= stream.rate <= _HIGHEST_RATE:
        raise _bad(f"its sample rate of {stream.rate} Hz is not between {_LOWEST_RATE} and {_HIGHEST_RATE}")
    parts: list[NDArray[np.int16]] = []
    count, most = 0, math.floor(max_s * rate)
    for frame in _resampled(_frames(container, stream), rate):
        part = cast("NDArray[np.int16]", frame.to_ndarray()).reshape(-1)
        count += part.size
        if count > most:
            raise _bad(f"it is longer than the {max_s:g} s that this model takes (load option max_audio_s)")
        parts.append(part)
        step(count / rate)
    return _floats(parts, count)


def _floats(parts: list[NDArray[np.int16]], count: int) -> Samples:
    """Join and scale, giving up each part as it is copied: hours of audio are never held twice."""
    samples = np.empty(count, np.float32)
    at = 0
    parts.reverse()
    while parts:
        part = parts.pop()
        np.divide(part, _S16, out=samples[at : at + part.size])
        at += part.size
    return samples


def _frames(container: Any, stream: Any) -> Iterator[AudioFrame]:
    """Decode packet by packet, skipping damaged ones; refuses a file of which nothing can be decoded."""
    good = damaged = 0
    for packet in container.demux(stream):
        try:
            frames = packet.decode()
        except av.error.InvalidDataError:
            damaged += 1
            continue
        for frame in frames:
            good += 1
            _check_finite(frame)
            yield frame
    if damaged and not good:
        raise _bad("none of its packets can be decoded")


def _check_finite(frame: AudioFrame) -> None:
    if frame.format.name.startswith(("flt", "dbl")) and not np.isfinite(frame.to_ndarray()).all():
        raise _bad("it holds samples that are not finite numbers (NaN or infinity)")


def _resampled(frames: Iterator[AudioFrame], rate: int) -> Iterator[AudioFrame]:
    """Convert to mono s16 at `rate`; a stream that changes its format midway gets a new resampler."""
    resampler: AudioResampler | None = None
    form: tuple[str, str, int] | None = None
    for frame in frames:
        found = (frame.format.name, frame.layout.name, frame.sample_rate)
        if resampler is None or found != form:
            if resampler is not None:
                yield from resampler.resample(None)
            resampler, form = AudioResampler(format="s16", layout="mono", rate=rate), found
        frame.pts = None  # broken timestamps are common and mean nothing here
        yield from resampler.resample(frame)
    if resampler is not None:
        yield from resampler.resample(None)


def _bad(what: str) -> FaultError:
    return refuse("invalid_input_file", f"The audio cannot be read: {what}.", "audio")
