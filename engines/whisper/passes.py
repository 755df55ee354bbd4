"""One pass of a loaded Whisper model over one audio: the library's own loop, with our eyes in it.

faster-whisper has neither a progress callback nor a way to stop, and one request's `chunk_length` stays in the
shared feature extractor for all later ones. So each run gets a shallow copy of the model (the weights are shared)
with its own feature extractor, and a proxy in front of the native model that is asked before every native call.
Written against faster-whisper 1.2.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from faster_whisper import WhisperModel  # type: ignore[import-untyped]
from faster_whisper.feature_extractor import FeatureExtractor  # type: ignore[import-untyped]
from numpy.typing import NDArray

# 5 minutes of audio at a time: the windowed frames of it take 48 MB; of 4 hours at once they would take 2.3 GB.
_BLOCK_FRAMES = 30_000

Step = Callable[[float], None]


class Pass(WhisperModel):  # type: ignore[misc]  # faster-whisper has no types
    """The model for one run.

    Args:
        model: the loaded model; not changed.
        step: called before each native call with the seconds of audio that are done; may raise to stop.
    """

    def __init__(self, model: WhisperModel, step: Step) -> None:
        self.__dict__.update(model.__dict__)
        self.feature_extractor = BlockExtractor(model.feature_extractor)
        self.model = _Watched(model.model, self._before)
        self._step = step
        self._seek = 0  # in frames, as the library counts
        self._window: int | None = None

    def _before(self, call: str) -> None:
        """The library does not tell where it is when it skips a silent window; then the window's size does."""
        if call == "encode":
            if self._window is not None:
                self._seek += self._window
            self._window = self.feature_extractor.nb_max_frames
        self._step(self._seek / self.frames_per_second)

    def begin(self) -> None:
        """Forget the encodes of language detection: the first window starts at 0."""
        self._seek, self._window = 0, None

    def _split_segments_by_timestamps(self, **given: Any) -> Any:
        split = super()._split_segments_by_timestamps(**given)
        self._seek, self._window = split[1], 0
        return split


class _Watched:
    """The native model; `before` is called, and may raise, before each call that takes long."""

    def __init__(self, model: Any, before: Callable[[str], None]) -> None:
        self._model, self._before = model, before

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._model, name)
        if name not in ("encode", "generate", "align", "detect_language"):
            return found

        def watched(*args: Any, **kwargs: Any) -> Any:
            self._before(name)
            return found(*args, **kwargs)

        return watched


class BlockExtractor(FeatureExtractor):  # type: ignore[misc]
    """Computes the same log-mel spectrogram as its base, in blocks, so memory does not grow with the audio."""

    def __init__(self, like: FeatureExtractor) -> None:
        self.__dict__.update(like.__dict__)

    def __call__(
        self, waveform: NDArray[np.float32], padding: int = 160, chunk_length: int | None = None
    ) -> NDArray[np.float32]:
        """Return the spectrogram, shape (mels, frames). Arguments as in the base class."""
        if chunk_length is not None:
            self.n_samples = chunk_length * self.sampling_rate
            self.nb_max_frames = self.n_samples // self.hop_length
        half = self.n_fft // 2
        padded = np.pad(np.pad(waveform, (0, padding)), half, mode="reflect")
        frames = (padded.size - self.n_fft) // self.hop_length  # the last one is dropped, as in the base
        mel = np.empty((self.mel_filters.shape[0], frames), np.float32)
        for first in range(0, frames, _BLOCK_FRAMES):
            last = min(first + _BLOCK_FRAMES, frames)
            mel[:, first:last] = self._block(padded, first, last)
        np.maximum(mel, mel.max() - 8.0, out=mel)
        mel += 4.0
        mel /= 4.0
        return mel

    def _block(self, padded: NDArray[np.float32], first: int, last: int) -> NDArray[np.float32]:
        window = np.hanning(self.n_fft + 1)[:-1].astype(np.float32)
        part = padded[first * self.hop_length : (last - 1) * self.hop_length + self.n_fft]
        views = np.lib.stride_tricks.sliding_window_view(part, self.n_fft)[:: self.hop_length]
        power = np.abs(np.fft.rfft(views * window, axis=-1).astype(np.complex64)) ** 2
        mel: NDArray[np.float32] = self.mel_filters @ power.T
        return np.log10(np.clip(mel, 1e-10, None))
