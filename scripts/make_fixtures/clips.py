"""Make the audio clips that the whisper engine ships: `python scripts/make_fixtures/clips.py OUT`.

    digits.flac          "three one four" by espeak-ng (the program must be on PATH)
    hello-tones.flac     "hello world" by piper's fixture voice tone-text
    silence-10min.flac   for runs that take long

Needs piper-tts and soundfile. The clips are ours to give away: the words are not protected, the voices leave no
claim on their output.
"""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

VOICE = Path(__file__).parents[2] / "engines" / "piper" / "fixture" / "tone-text.onnx"
RATE = 16_000  # Hz; what Whisper works at
SILENCE_RATE = 8_000


def main(out: Path) -> None:
    """Write the clips into `out`."""
    out.mkdir(parents=True, exist_ok=True)
    _write(out / "digits.flac", _spoken("three one four"), RATE)
    _write(out / "hello-tones.flac", _tones("hello world"), RATE)
    _write(out / "silence-10min.flac", np.zeros(600 * SILENCE_RATE, np.float32), SILENCE_RATE)


def _spoken(text: str) -> Any:
    argv = ["espeak-ng", "--stdin", "--stdout", "-v", "en-us", "-s", "150"]
    done = subprocess.run(argv, input=text.encode(), capture_output=True, check=True)
    samples, rate = soundfile.read(io.BytesIO(done.stdout), dtype="float32")
    return _resampled(samples, rate)


def _tones(text: str) -> Any:
    from piper import PiperVoice
    from piper.config import SynthesisConfig

    voice = PiperVoice.load(VOICE)
    chunk = next(iter(voice.synthesize(text, SynthesisConfig(noise_scale=0.0))))
    return _resampled(chunk.audio_float_array * 0.5, chunk.sample_rate)


def _resampled(samples: Any, rate: int) -> Any:
    """Linear interpolation: the fixture model was trained on clips made in this way."""
    at = np.arange(int(len(samples) * RATE / rate)) * rate / RATE
    return np.interp(at, np.arange(len(samples)), samples)


def _write(path: Path, samples: Any, rate: int) -> None:
    soundfile.write(path, samples, rate, format="FLAC", subtype="PCM_16")
    print(f"{path}: {path.stat().st_size} bytes, {len(samples) / rate:.2f} s")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
