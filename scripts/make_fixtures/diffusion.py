"""tiny-sd-onnx: a text-to-image model in the diffusers ONNX layout that paints what its prompt names.

No training: the unet is the exact denoiser of the one picture that the prompt describes. With x0 that picture and a_t
the share of signal left at step t, it answers eps = (x_t - sqrt(a_t) x0) / sqrt(1 - a_t), so that any correct sampler
walks from any noise to x0, and a wrong one does not. Words it knows: colours, "circle", "square". A shape without a
colour takes the colour that x_t shows inside the shape, so that a start image matters: its colour comes through.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from onnx import helper
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

from make_fixtures.graphs import BOOL, FLOAT, HALF, INT32, INT64, Graph, node, port
from make_fixtures.hang import ROUNDS

TOKENS = 77  # positions, as in CLIP
WIDTH = 8  # of an embedding: red, green, blue, "is a colour", "circle", "square", two unused
COLOURS = {
    "red": (1, -1, -1),
    "green": (-1, 1, -1),
    "blue": (-1, -1, 1),
    "white": (1, 1, 1),
    "black": (-1, -1, -1),
    "yellow": (1, 1, -1),
    "cyan": (-1, 1, 1),
    "magenta": (1, -1, 1),
}
SHAPES = {"circle": 4, "square": 5}  # word -> place in the embedding
FILLERS = "a an the of on photo image with background and".split()
RADIUS = 0.35  # of the circle, and half the side of the square; the picture's side is 1
_END_OF_WORD = "</w>"
HANG_CELLS = 16  # the hanging variant hangs above this latent height: 128 pixels

_SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "epsilon",
    "clip_sample": False,
    "set_alpha_to_one": True,
    "steps_offset": 1,
}
_INDEX = {
    "_class_name": "OnnxStableDiffusionPipeline",
    "_diffusers_version": "0.30.0",
    "safety_checker": [None, None],
    "feature_extractor": [None, None],
    "scheduler": ["diffusers", "DDIMScheduler"],
    "text_encoder": ["diffusers", "OnnxRuntimeModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "OnnxRuntimeModel"],
    "vae_decoder": ["diffusers", "OnnxRuntimeModel"],
    "vae_encoder": ["diffusers", "OnnxRuntimeModel"],
}
# Not Stable Diffusion's 0.18215, so that a loop that does not read this file paints something else.
_VAE = {"_class_name": "AutoencoderKL", "latent_channels": 4, "scaling_factor": 1.0}


def write_tiny_sd(folder: Path, *, half: bool = False, hang: bool = False) -> None:
    """Write the model folder.

    Args:
        half: float16 networks with 64-bit ids, a scalar integer time and a fixed batch of one, as GPU exports have.
        hang: the unet never returns for pictures higher than 128 pixels.
    """
    vocabulary = write_tokenizer(folder / "tokenizer")
    _write_json(folder / "model_index.json", _INDEX)
    _write_json(folder / "scheduler" / "scheduler_config.json", _SCHEDULER)
    _write_json(folder / "vae_decoder" / "config.json", _VAE)
    _text_encoder(folder / "text_encoder" / "model.onnx", vocabulary, half)
    _unet(folder / "unet" / "model.onnx", half, hang)
    _vae_decoder(folder / "vae_decoder" / "model.onnx")
    _vae_encoder(folder / "vae_encoder" / "model.onnx")


def write_tokenizer(folder: Path) -> dict[str, int]:
    """A CLIP-style byte pair tokenizer that knows our words as one token each; returns its vocabulary."""
    vocabulary, merges = _byte_pairs([*COLOURS, *SHAPES, *FILLERS])
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, end_of_word_suffix=_END_OF_WORD, unk_token="<|endoftext|>")
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    split = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(split), "removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.add_special_tokens(["<|startoftext|>", "<|endoftext|>"])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    tokenizer.model.save(str(folder))
    names = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    _write_json(
        folder / "tokenizer_config.json", {"model_max_length": TOKENS, **names, "tokenizer_class": "CLIPTokenizer"}
    )
    return vocabulary


def _byte_pairs(words: list[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """A vocabulary in CLIP's order and merges that make each word one token; tokenizers' trainer is not repeatable."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges: list[tuple[str, str]] = []
    for word in words:
        parts = [*word[:-1], word[-1] + _END_OF_WORD]
        for pair in merges:  # what earlier words taught, in their order of rank
            parts = _merged(parts, pair)
        while len(parts) > 1:
            merges.append((parts[0], parts[1]))
            parts = _merged(parts, merges[-1])
    tokens = [*letters, *(letter + _END_OF_WORD for letter in letters), *("".join(pair) for pair in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    return {token: number for number, token in enumerate(dict.fromkeys(tokens))}, merges


def _merged(parts: list[str], pair: tuple[str, str]) -> list[str]:
    found: list[str] = []
    for part in parts:
        if found and (found[-1], part) == pair:
            found[-1] += part
        else:
            found.append(part)
    return found


def _text_encoder(path: Path, vocabulary: dict[str, int], half: bool) -> None:
    table = np.zeros((len(vocabulary), WIDTH), np.float16 if half else np.float32)
    for word, colour in COLOURS.items():
        table[vocabulary[word + _END_OF_WORD], :4] = (*colour, 1)
    for word, place in SHAPES.items():
        table[vocabulary[word + _END_OF_WORD], place] = 1
    kind = HALF if half else FLOAT
    graph = Graph()
    graph.constant("E", table)
    graph.constant("ax1", [1], np.int64)
    graph.op("Gather", ["E", "input_ids"], "last_hidden_state")
    graph.op("ReduceSum", ["last_hidden_state", "ax1"], "pooler_output", keepdims=0)
    graph.save(
        path,
        [port("input_ids", INT64 if half else INT32, ["batch", "sequence"])],
        [
            port("last_hidden_state", kind, ["batch", "sequence", WIDTH]),
            port("pooler_output", kind, ["batch", WIDTH]),
        ],
    )


def _unet(path: Path, half: bool, hang: bool) -> None:
    kind, batch = (HALF, 1) if half else (FLOAT, "batch")
    graph = Graph()
    graph.op("Cast", ["sample"], "x", to=FLOAT)
    graph.op("Cast", ["encoder_hidden_states"], "text", to=FLOAT)
    for name, value in (("one", 1.0), ("zero", 0.0), ("half", 0.5), ("radius", RADIUS), ("radius2", RADIUS**2)):
        graph.constant(name, value, np.float32)
    for name, value in (("i0", 0), ("i1", 1), ("i2", 2), ("i3", 3)):
        graph.constant(name, value, np.int64)
    graph.constant("planes", [-1, 1, 1, 1], np.int64)
    graph.constant("rows", [-1, 1], np.int64)
    graph.constant("colours", [-1, 3, 1, 1], np.int64)
    graph.constant("axis1", [1], np.int64)
    graph.constant("axes_hw", [2, 3], np.int64)
    _prompt_features(graph)
    _masks(graph)
    _signal_shares(graph)
    _clean_picture(graph)
    graph.op("Mul", ["x0", "signal"], "signal_part")
    graph.op("Sub", ["x", "signal_part"], "noise_part")
    graph.op("Div", ["noise_part", "noise"], "eps")
    last = _hang(graph) if hang else "eps"
    graph.op("Cast", [last], "out_sample", to=kind)
    latent = [batch, 4, "height", "width"]
    graph.save(
        path,
        [
            port("sample", kind, latent),
            port("timestep", INT64, []) if half else port("timestep", FLOAT, ["steps"]),
            port("encoder_hidden_states", kind, [batch, "sequence", WIDTH]),
        ],
        [port("out_sample", kind, latent)],
    )


def _prompt_features(graph: Graph) -> None:
    """Sums of the word embeddings, each (batch, 1, 1, 1): rgb (three channels), named, circle, square."""
    graph.op("ReduceSum", ["text", "axis1"], "f", keepdims=0)
    places = {"rgb": (0, 3), "named": (3, 4), "circle": (4, 5), "square": (5, 6)}
    for name, (first, end) in places.items():
        graph.constant(f"{name}_from", [first], np.int64)
        graph.constant(f"{name}_to", [end], np.int64)
        graph.op("Slice", ["f", f"{name}_from", f"{name}_to", "axis1"], f"{name}_2d")
        raw = graph.op("Reshape", [f"{name}_2d", "colours" if name == "rgb" else "planes"], f"{name}_sum")
        if name != "rgb":
            graph.op("Min", [raw, "one"], name)


def _masks(graph: Graph) -> None:
    """`mask` (batch, 1, height, width): 1 inside the asked shape, everywhere when none is asked."""
    graph.op("Shape", ["x"], "shape")
    for name, index, form in (("Y", "i2", "rows"), ("X", "i3", "columns")):
        graph.op("Gather", ["shape", index], f"{name}_cells")
        graph.op("Range", ["i0", f"{name}_cells", "i1"], f"{name}_range")
        graph.op("Cast", [f"{name}_range"], f"{name}_float", to=FLOAT)
        graph.op("Cast", [f"{name}_cells"], f"{name}_side", to=FLOAT)
        graph.op("Add", [f"{name}_float", "half"], f"{name}_mid")
        graph.op("Div", [f"{name}_mid", f"{name}_side"], f"{name}_unit")
        graph.op("Sub", [f"{name}_unit", "half"], f"{name}_flat")
        if form == "columns":
            graph.constant("columns", [1, -1], np.int64)
        graph.op("Reshape", [f"{name}_flat", form], name)  # -0.5 … 0.5 from the middle
    graph.op("Mul", ["X", "X"], "X2")
    graph.op("Mul", ["Y", "Y"], "Y2")
    graph.op("Add", ["X2", "Y2"], "R2")
    graph.op("Less", ["R2", "radius2"], "in_circle")
    graph.op("Abs", ["X"], "X_abs")
    graph.op("Abs", ["Y"], "Y_abs")
    graph.op("Max", ["X_abs", "Y_abs"], "reach")
    graph.op("Less", ["reach", "radius"], "in_square")
    for name in ("circle", "square"):
        graph.op("Cast", [f"in_{name}"], f"{name}_inside", to=FLOAT)
        graph.op("Sub", ["one", f"{name}_inside"], f"{name}_outside")
        graph.op("Mul", [name, f"{name}_outside"], f"{name}_cut")
    graph.op("Max", ["circle_cut", "square_cut"], "cut")
    graph.op("Sub", ["one", "cut"], "mask")


def _signal_shares(graph: Graph) -> None:
    """`signal` = sqrt(a_t) and `noise` = sqrt(1 - a_t) of the scheduler's own betas."""
    start, end = _SCHEDULER["beta_start"], _SCHEDULER["beta_end"]
    betas = np.linspace(float(start) ** 0.5, float(end) ** 0.5, 1000) ** 2  # type: ignore[arg-type]
    shares = np.cumprod(1 - betas)
    graph.constant("signals", np.sqrt(shares), np.float32)
    graph.constant("noises", np.sqrt(1 - shares), np.float32)
    graph.op("Cast", ["timestep"], "time_float", to=FLOAT)
    graph.op("Round", ["time_float"], "time_whole")
    graph.op("Cast", ["time_whole"], "time", to=INT64)
    for name in ("signal", "noise"):
        graph.op("Gather", [f"{name}s", "time"], f"{name}_flat")
        graph.op("Reshape", [f"{name}_flat", "planes"], name)


def _clean_picture(graph: Graph) -> None:
    """`x0` (batch, 4, height, width): the colour inside the mask, black outside, the fourth channel 0."""
    graph.op("Max", ["circle", "square"], "shaped")
    graph.op("Sub", ["one", "named"], "unnamed")
    graph.op("Mul", ["shaped", "unnamed"], "borrow")
    graph.constant("c0", [0], np.int64)
    graph.constant("c1", [1], np.int64)
    graph.constant("c3", [3], np.int64)
    # The mean colour of x_t inside the mask; noise averages out over its cells.
    graph.op("Slice", ["x", "c0", "c3", "axis1"], "x_rgb")
    graph.op("Mul", ["x_rgb", "mask"], "x_inside")
    graph.op("ReduceSum", ["x_inside", "axes_hw"], "x_sum", keepdims=1)
    graph.op("ReduceSum", ["mask", "axes_hw"], "cells", keepdims=1)
    graph.op("Max", ["cells", "one"], "cells_some")
    graph.op("Div", ["x_sum", "cells_some"], "x_mean")
    graph.op("Div", ["x_mean", "signal"], "seen")
    graph.op("Mul", ["seen", "borrow"], "borrowed")
    graph.op("Add", ["rgb_sum", "borrowed"], "rgb")
    graph.op("Mul", ["rgb", "mask"], "inside")
    graph.op("Sub", ["mask", "one"], "outside")
    graph.op("Add", ["inside", "outside"], "x0_rgb")
    graph.op("Slice", ["x0_rgb", "c0", "c1", "axis1"], "x0_first")
    graph.op("Mul", ["x0_first", "zero"], "x0_fourth")
    graph.op("Concat", ["x0_rgb", "x0_fourth"], "x0", axis=1)


def _hang(graph: Graph) -> str:
    """An endless loop for high pictures; for others it makes no round and changes nothing."""
    body = helper.make_graph(
        [node("Identity", ["go_on"], ["go_on_still"]), node("Add", ["v", "v"], ["v_next"])],
        "body",
        [port("i", INT64, []), port("go_on", BOOL, []), port("v", FLOAT, [])],
        [port("go_on_still", BOOL, []), port("v_next", FLOAT, [])],
    )
    graph.constant("hang_cells", HANG_CELLS, np.int64)
    graph.constant("rounds_many", ROUNDS, np.int64)
    graph.constant("true", True)
    graph.op("Greater", ["Y_cells", "hang_cells"], "is_high")
    graph.op("Where", ["is_high", "rounds_many", "i0"], "rounds")
    graph.op("Loop", ["rounds", "true", "zero"], "nothing", body=body)
    return graph.op("Add", ["eps", "nothing"], "eps_late")


def _vae_decoder(path: Path) -> None:
    """The first three channels, each cell as 8 x 8 pixels."""
    graph = Graph()
    graph.constant("W", np.eye(3, 4)[:, :, None, None], np.float32)
    graph.constant("sc", [1, 1, 8, 8], np.float32)
    graph.op("Conv", ["latent_sample", "W"], "c")
    graph.op(
        "Resize",
        ["c", "", "sc"],
        "sample",
        mode="nearest",
        nearest_mode="floor",
        coordinate_transformation_mode="asymmetric",
    )
    graph.save(
        path,
        [port("latent_sample", FLOAT, ["batch", 4, "h", "w"])],
        [port("sample", FLOAT, ["batch", 3, "H", "W"])],
    )


def _vae_encoder(path: Path) -> None:
    """The mean of each 8 x 8 block, and a fourth channel of 0: the decoder's inverse."""
    graph = Graph()
    graph.constant("W", np.eye(4, 3)[:, :, None, None], np.float32)
    graph.op("AveragePool", ["sample"], "blocks", kernel_shape=[8, 8], strides=[8, 8])
    graph.op("Conv", ["blocks", "W"], "latent_sample")
    graph.save(
        path,
        [port("sample", FLOAT, ["batch", 3, "H", "W"])],
        [port("latent_sample", FLOAT, ["batch", 4, "h", "w"])],
    )


def _write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=1) + "\n")
