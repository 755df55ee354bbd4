"""The decoder reads back what was played, and nothing else."""

from __future__ import annotations

import pytest

np = pytest.importorskip("numpy")

from engines.piper import tones  # noqa: E402

RATE = 22_050
IDS = {"_": [0], "^": [1], "$": [2], " ": [3], "a": [4], "b": [5], "z": [29], "ɪ": [170]}


def play(text: str, *, frames: int = 6, gap: int = 2, rate: int = RATE):
    parts = [np.zeros(3 * 256)]
    for letter in text:
        hertz = 300 + 20 * IDS[letter][0]
        count = int(frames * 256 * rate / RATE)
        parts += [0.5 * np.sin(np.arange(count) * 2 * np.pi * hertz / rate), np.zeros(int(gap * 256 * rate / RATE))]
    return np.concatenate(parts).astype(np.float32)


@pytest.mark.parametrize("text", ["a", "ab", "aa", "a b", "za zɪ ab"])
@pytest.mark.parametrize(("frames", "gap"), [(6, 2), (24, 8), (3, 1), (2, 1)])
def test_reads_back(text, frames, gap):
    assert tones.decode(play(text, frames=frames, gap=gap), RATE, IDS) == text


@pytest.mark.parametrize("rate", [16_000, 24_000, 48_000])
def test_reads_back_at_other_rates(rate):
    assert tones.decode(play("ab z", rate=rate), rate, IDS) == "ab z"


@pytest.mark.parametrize("samples", [np.zeros(0, np.float32), np.zeros(5000, np.float32)])
def test_silence_says_nothing(samples):
    assert tones.decode(samples, RATE, IDS) == ""


def test_a_foreign_tone_is_marked():
    alphabet = {letter: number for letter, number in IDS.items() if letter != "b"}
    assert tones.decode(play("aba"), RATE, alphabet) == "a\N{REPLACEMENT CHARACTER}a"


def test_noise_is_not_text():
    noise = np.random.default_rng(1).standard_normal(RATE).astype(np.float32)
    assert tones.decode(noise, RATE, IDS) not in ("a", "ab", "a b")
