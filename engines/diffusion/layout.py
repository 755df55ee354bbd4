"""The diffusers ONNX folder, checked before anything heavy is opened.

    model_index.json                   which pipeline this is
    scheduler/scheduler_config.json    how noise was added in training
    tokenizer/                         tokenizer.json, or vocab.json + merges.txt (CLIP's BPE)
    text_encoder/model.onnx            token ids -> embeddings
    unet/model.onnx                    noisy latent, time, embeddings -> noise
    vae_decoder/model.onnx             latent -> pixels
    vae_encoder/model.onnx             pixels -> latent; only for start images, may be missing
    vae_decoder/config.json            scaling_factor, shift_factor; may be missing (or vae/config.json)

Standard library and msgspec only, except that the scheduler's maths is numpy.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import msgspec

from engines.diffusion.schedulers import SchedulerConfig, parse_config
from protocol.faults import FaultError, refuse

SD_SCALING = 0.18215  # of Stable Diffusion 1 and 2, whose ONNX exports carry no VAE config
LATENT_FACTOR = 8  # pixels per latent cell along one side
_FIELD = "files.model"
_JSON_BYTES = 64 * 2**20  # vocabularies are a few MB; more is not a configuration file

# One text encoder, a four-channel latent, no extra conditions: what the loop in pipeline.py computes.
PIPELINES = (
    "OnnxStableDiffusionPipeline",
    "OnnxStableDiffusionImg2ImgPipeline",
    "ORTStableDiffusionPipeline",
    "ORTStableDiffusionImg2ImgPipeline",
    "StableDiffusionPipeline",
    "StableDiffusionImg2ImgPipeline",
)


class Layout(msgspec.Struct, frozen=True, kw_only=True):
    """A folder that was found complete.

    Attributes:
        vae_encoder: None when the model cannot begin from an image.
        scaling, shift: pixels' latent = (raw latent - shift) * scaling.
        safety_checker: the model names one; this engine does not run it and says so.
    """

    folder: Path
    pipeline: str
    scheduler: SchedulerConfig
    text_encoder: Path
    unet: Path
    vae_decoder: Path
    vae_encoder: Path | None
    tokenizer: Path
    scaling: float
    shift: float
    safety_checker: bool


def read_layout(folder: Path) -> Layout:
    """Check the folder and read its small files.

    Raises:
        FaultError: `load_failed`, naming the missing or broken file, or the pipeline that is not served.
    """
    if not folder.is_dir():
        raise _bad(f"{folder} is not a folder; give the folder that holds model_index.json.")
    index = read_json(folder / "model_index.json")
    pipeline = str(index.get("_class_name", ""))
    if pipeline not in PIPELINES:
        raise _bad(f"Pipeline {pipeline!r} is not served; known are {', '.join(PIPELINES)}.")
    tokenizer = folder / "tokenizer"
    if not tokenizer.is_dir():
        raise _bad(f"{tokenizer} is missing.")
    scaling, shift = _vae_numbers(folder)
    encoder = folder / "vae_encoder" / "model.onnx"
    return Layout(
        folder=folder,
        pipeline=pipeline,
        scheduler=parse_config(read_json(folder / "scheduler" / "scheduler_config.json")),
        text_encoder=_graph(folder, "text_encoder"),
        unet=_graph(folder, "unet"),
        vae_decoder=_graph(folder, "vae_decoder"),
        vae_encoder=encoder if encoder.is_file() else None,
        tokenizer=tokenizer,
        scaling=scaling,
        shift=shift,
        safety_checker=any(index.get("safety_checker") or ()),
    )


def read_json(path: Path) -> dict[str, Any]:
    """Read a small JSON object. Raises FaultError `load_failed`, naming the file."""
    try:
        if path.stat().st_size > _JSON_BYTES:
            raise _bad(f"{path} exceeds {_JSON_BYTES} bytes.")
        value = msgspec.json.decode(path.read_bytes())
    except FileNotFoundError:
        raise _bad(f"{path} is missing.") from None
    except OSError as error:
        raise _bad(f"{path} cannot be read: {error.strerror}.") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise _bad(f"{path} is not JSON: {error}.") from None
    if not isinstance(value, dict):
        raise _bad(f"{path} does not hold a JSON object.")
    return value


def _graph(folder: Path, name: str) -> Path:
    path = folder / name / "model.onnx"
    if not path.is_file():
        raise _bad(f"{path} is missing.")
    return path


def _vae_numbers(folder: Path) -> tuple[float, float]:
    for name in ("vae_decoder", "vae"):
        path = folder / name / "config.json"
        if path.is_file():
            config = read_json(path)
            return (
                _number(path, config, "scaling_factor", SD_SCALING, nonzero=True),
                _number(path, config, "shift_factor", 0.0),
            )
    return SD_SCALING, 0.0


def _number(path: Path, config: dict[str, Any], name: str, default: float, *, nonzero: bool = False) -> float:
    value = config.get(name)
    if value is None:
        return default
    if not isinstance(value, int | float) or not math.isfinite(value) or (nonzero and not value):
        raise _bad(f"{path}: {name} is not a usable number.")
    return float(value)


def _bad(sentence: str) -> FaultError:
    return refuse("load_failed", sentence, _FIELD)
