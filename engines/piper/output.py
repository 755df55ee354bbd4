"""Write speech into an audio file, piece by piece."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import soundfile  # type: ignore[import-untyped]
from numpy.typing import NDArray

# format -> (libsndfile's container, its encoding)
_ENCODINGS: dict[str, tuple[str, str]] = {
    "wav": ("WAV", "PCM_16"),
    "flac": ("FLAC", "PCM_16"),
    "ogg": ("OGG", "VORBIS"),
    "opus": ("OGG", "OPUS"),
    "mp3": ("MP3", "MPEG_LAYER_III"),
    "pcm": ("RAW", "PCM_16"),
}

# Sample rates in Hz that an encoding takes, where it does not take all. Piper's voices have 16,000 or 22,050.
_RATES: dict[str, tuple[int, ...]] = {
    "opus": (8_000, 12_000, 16_000, 24_000, 48_000),
    "mp3": (8_000, 11_025, 12_000, 16_000, 22_050, 24_000, 32_000, 44_100, 48_000),
}

# What is written of these stays as it is, but for the first frame of MP3, whose rewritten form holds only the length.
_FRONT_TO_BACK = frozenset({"ogg", "opus", "mp3", "pcm"})

# libsndfile's Vorbis encoder keeps a whole write on its stack and overflows it with minutes of audio.
_BLOCK = 16_384


class Output:
    """One file being written; `with` closes it. `rate` in Hz, `seconds` written so far.

    `streams`: whether `fresh` may be used.
    """

    def __init__(self, path: Path, format_: str, rate: int) -> None:
        self._from = rate
        self.rate = next((fit for fit in _RATES.get(format_, (rate,)) if fit >= rate), 48_000)
        container, encoding = _ENCODINGS[format_]
        self._path, self._told = path, 0
        self.streams = format_ in _FRONT_TO_BACK
        self._samples = 0
        self._file: Any = soundfile.SoundFile(
            path, "w", samplerate=self.rate, channels=1, format=container, subtype=encoding, endian=_endian(format_)
        )

    @property
    def seconds(self) -> float:
        return self._samples / self.rate

    def write(self, samples: NDArray[np.float32]) -> None:
        """Append mono samples in [-1, 1]."""
        fitted = resample(samples, self._from, self.rate)
        self._samples += fitted.size
        for at in range(0, fitted.size, _BLOCK):
            self._file.write(np.clip(fitted[at : at + _BLOCK], -1.0, 1.0))

    def fresh(self) -> bytes:
        """What came to the file since the last call. Encoders keep some samples back, so it may be nothing."""
        self._file.flush()
        with self._path.open("rb") as file:
            file.seek(self._told)
            data = file.read()
        self._told += len(data)
        return data

    def __enter__(self) -> Output:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


def _endian(format_: str) -> str:
    return "LITTLE" if format_ == "pcm" else "FILE"


def resample(samples: NDArray[np.float32], before: int, after: int) -> NDArray[np.float32]:
    """Change the sample rate by way of the spectrum: exact for a piece that begins and ends in silence."""
    if before == after or not samples.size:
        return samples
    size = max(1, round(samples.size * after / before))
    spectrum = np.fft.rfft(samples)
    kept = min(spectrum.size, size // 2 + 1)
    return np.asarray(np.fft.irfft(spectrum[:kept], size) * (size / samples.size), np.float32)
