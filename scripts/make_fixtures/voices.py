"""Piper voices without training: one tone per phoneme, so that an FFT of the speech gives the phonemes back.

Phoneme number i sounds at 300 + 20 i Hz for six hops; the pad between phonemes, the begin and the end are silent.
length_scale stretches, noise_scale adds a little noise, as real Piper voices do.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from make_fixtures.graphs import FLOAT, INT64, Graph, port

RATE = 22_050  # samples per second
HOP = 256  # samples per frame
TEXT_PHONEMES = " abcdefghijklmnopqrstuvwxyz0123456789.,!?'-"
# What espeak-ng's voices emit, NFD; the same list as in real Piper voices.
ESPEAK_PHONEMES = (
    " !\"#'(),-.:;?Xabcdefghijklmnopqrstuvwxyz"
    "æçðøħŋœǀǁǂǃɐɑɒɓɔɕɖɗɘəɚɛɜɞɟɠɡɢɣɤɥɦɧɨɪɫɬɭɮɯɰɱɲɳɴɵɶɸɹɺɻɽɾʀʁʂʃʄʈʉʊʋʌʍʎʏʐʑʒʔʕʘʙʛʜʝʟʡʢʦʰʲ"
    # Combining marks as escapes: an editor that normalises text would reorder them.
    "ˈˌːˑ˞ˤ\u0303\u030a\u031d\u0327\u0329\u032a\u032f\u033a\u033bβεθχᵻⱱ0123456789"
)


def write_voice(path: Path, phonemes: str, phoneme_type: str) -> None:
    """Write NAME.onnx and NAME.onnx.json.

    Args:
        phonemes: one character per phoneme.
        phoneme_type: "text" (the text's own characters) or "espeak".
    """
    numbers = {"_": [0], "^": [1], "$": [2]}
    for phoneme in phonemes:
        numbers.setdefault(phoneme, [len(numbers)])
    _graph(len(numbers)).save(
        path,
        [
            port("input", INT64, ["batch", "phonemes"]),
            port("input_lengths", INT64, ["batch"]),
            port("scales", FLOAT, [3]),
        ],
        [port("output", FLOAT, ["batch", 1, 1, "time"])],
        name="tone_voice",
        producer="fixture",
    )
    config = {
        "audio": {"sample_rate": RATE, "quality": "x_low"},
        "espeak": {"voice": "en-us"},
        "phoneme_type": phoneme_type,
        "inference": {"noise_scale": 0.667, "length_scale": 1.0, "noise_w": 0.8},
        "phoneme_map": {},
        "phoneme_id_map": numbers,
        "num_symbols": len(numbers),
        "num_speakers": 1,
        "speaker_id_map": {},
        "piper_version": "1.0.0",
        "hop_length": HOP,
        "language": {"code": "en_US"},
    }
    path.with_name(path.name + ".json").write_text(json.dumps(config, ensure_ascii=False))


def _graph(count: int) -> Graph:
    """`count` phonemes; the first three are pad, begin and end."""
    graph = Graph()
    frames = np.full(count, 6.0)
    frames[:3] = 2.0, 3.0, 3.0
    loud = np.full(count, 0.5)
    loud[:3] = 0.0
    graph.constant("dur", frames, np.float32)
    graph.constant("amp", loud, np.float32)
    graph.constant("freq", [300 + 20 * number for number in range(count)], np.float32)
    for name, value in (("ax0", 0), ("i0", 0), ("i1s", 1)):
        graph.constant(name, value, np.int64)
    graph.constant("w", 2 * np.pi / RATE, np.float32)
    graph.constant("neg1", [-1], np.int64)
    for name, place in (("idx1", 1), ("idx0", 0)):  # length_scale and noise_scale in `scales`
        graph.constant(name, place, np.int64)
    for name, value in (("shape4", [1, 1, 1, -1]), ("ax1", [1]), ("axlen", [0]), ("zero1", [0])):
        graph.constant(name, value, np.int64)
    graph.constant("mx", 1.0, np.float32)
    _durations(graph)
    _samples(graph)
    return graph


def _durations(graph: Graph) -> None:
    """`fid`: the phoneme of each frame."""
    graph.op("Reshape", ["input", "neg1"], "ids_all")
    graph.op("Slice", ["ids_all", "zero1", "input_lengths", "axlen"], "ids")
    graph.op("Gather", ["scales", "idx1"], "ls")
    graph.op("Gather", ["scales", "idx0"], "ns")
    graph.op("Gather", ["dur", "ids"], "d0")
    graph.op("Mul", ["d0", "ls"], "d1")
    graph.op("Ceil", ["d1"], "d2")
    graph.op("Max", ["d2", "mx"], "d3")
    graph.op("Cast", ["d3"], "d", to=INT64)
    graph.op("CumSum", ["d", "ax0"], "ends")
    graph.op("ReduceSum", ["d"], "total", keepdims=0)
    graph.op("Range", ["i0", "total", "i1s"], "t")
    graph.op("Unsqueeze", ["t", "ax1"], "t2")
    graph.op("GreaterOrEqual", ["t2", "ends"], "ge")  # (frames, phonemes)
    graph.op("Cast", ["ge"], "gei", to=INT64)
    graph.op("ReduceSum", ["gei", "ax1"], "pi", keepdims=0)
    graph.op("Gather", ["ids", "pi"], "fid")


def _samples(graph: Graph) -> None:
    """`output`: a sine whose phase runs on through the phonemes, plus noise."""
    for name in ("freq", "amp"):
        graph.op("Gather", [name, "fid"], f"{name}_f")
        graph.op("Unsqueeze", [f"{name}_f", "ax1"], f"{name}_u")
        graph.constant(f"{name}_rep", [1, HOP], np.int64)
        graph.op("Tile", [f"{name}_u", f"{name}_rep"], f"{name}_t")
        graph.op("Reshape", [f"{name}_t", "neg1"], f"{name}_s")
    graph.op("Mul", ["freq_s", "w"], "dph")
    graph.op("CumSum", ["dph", "ax0"], "ph")
    graph.op("Sin", ["ph"], "s")
    graph.op("Mul", ["s", "amp_s"], "sa")
    graph.op("RandomNormalLike", ["sa"], "rn", scale=0.001, seed=1.0)
    graph.op("Mul", ["rn", "ns"], "rns")
    graph.op("Add", ["sa", "rns"], "a")
    graph.op("Reshape", ["a", "shape4"], "output")
