"""Decode what the fixture voices say: each phoneme is a burst of a frequency of its own.

The voices (scripts/make_fixtures) play phoneme id n as a sine of 300 + 20 n Hz for 6 frames of 256 samples at
22,050 Hz, shorter or longer by the speed, with silence between phonemes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

_BASE_HZ, _STEP_HZ = 300.0, 20.0
_WINDOW_S = 0.004  # longer than a period of the lowest tone, shorter than the shortest gap (one frame: 11.6 ms)
_LOUD = 0.25  # of the loudest window
_SHORTEST_S = 0.010  # a burst lasts one frame at least; what is shorter is the ringing of an encoder
_SIZE = 2**16  # zero-padded, so the peak is found to a fraction of a hertz


def decode_file(path: Path, config: Path) -> str:
    """Return the phonemes in an audio file, by the id map of the voice's config."""
    import soundfile  # type: ignore[import-untyped]

    samples, rate = soundfile.read(path, dtype="float32")
    return decode(samples, rate, json.loads(config.read_bytes())["phoneme_id_map"])


def decode(samples: NDArray[np.float32], rate: int, ids: Mapping[str, Sequence[int]]) -> str:
    """Return the phonemes in mono samples; "\N{REPLACEMENT CHARACTER}" for a tone that no phoneme has."""
    phonemes = {number: phoneme for phoneme, numbers in ids.items() for number in numbers}
    found = (phonemes.get(_id(burst, rate), "\N{REPLACEMENT CHARACTER}") for burst in bursts(samples, rate))
    return "".join(found)


def bursts(samples: NDArray[np.float32], rate: int) -> Iterator[NDArray[np.float32]]:
    """Yield the loud stretches."""
    if not samples.size:
        return
    size = max(1, round(_WINDOW_S * rate))
    energy = np.convolve(np.square(samples, dtype=np.float64), np.ones(size) / size, mode="same")
    loud = np.sqrt(np.maximum(energy, 0)) > _LOUD * float(np.sqrt(max(energy.max(initial=0.0), 1e-12)))
    edges = np.flatnonzero(np.diff(np.concatenate(([False], loud, [False])).astype(np.int8)))
    for first, last in zip(edges[::2], edges[1::2], strict=True):
        if last - first >= _SHORTEST_S * rate:
            yield samples[first:last]


def _id(burst: NDArray[np.float32], rate: int) -> int:
    spectrum = np.abs(np.fft.rfft(burst * np.hanning(burst.size), _SIZE))
    hertz = float(np.argmax(spectrum)) * rate / _SIZE
    return round((hertz - _BASE_HZ) / _STEP_HZ)
