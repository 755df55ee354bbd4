"""The model folder: what is missing or broken is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from protocol.faults import FaultError

pytest.importorskip("numpy", reason="the image extra is not installed")
layout = pytest.importorskip("engines.diffusion.layout")


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def refusal(folder: Path) -> str:
    with pytest.raises(FaultError) as caught:
        layout.read_layout(folder)
    assert caught.value.fault.code == "load_failed"
    assert caught.value.fault.field == "files.model"
    return caught.value.fault.message


def test_the_shipped_folder_is_read(folder: Path) -> None:
    found = layout.read_layout(folder)
    assert found.pipeline == "OnnxStableDiffusionPipeline"
    assert found.unet == folder / "unet" / "model.onnx"
    assert (found.scaling, found.shift, found.safety_checker) == (1.0, 0.0, False)
    assert found.vae_encoder is not None


@pytest.mark.parametrize(
    "name",
    [
        "model_index.json",
        "scheduler/scheduler_config.json",
        "text_encoder/model.onnx",
        "unet/model.onnx",
        "vae_decoder/model.onnx",
    ],
)
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    assert str(folder / name) in refusal(folder)


def test_a_missing_tokenizer_is_named(folder: Path) -> None:
    (folder / "tokenizer").rename(folder / "elsewhere")
    assert str(folder / "tokenizer") in refusal(folder)


def test_a_file_instead_of_the_folder_is_refused(folder: Path) -> None:
    assert "model_index.json" in refusal(folder / "model_index.json")


def test_another_pipeline_is_refused_and_the_known_are_named(folder: Path) -> None:
    edit(folder / "model_index.json", _class_name="StableDiffusionXLPipeline")
    assert "OnnxStableDiffusionPipeline" in refusal(folder)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"null"])
def test_a_broken_json_file_is_named(folder: Path, content: bytes) -> None:
    (folder / "model_index.json").write_bytes(content)
    assert "model_index.json" in refusal(folder)


def test_an_endless_json_file_is_not_read(folder: Path) -> None:
    with (folder / "model_index.json").open("wb") as file:
        file.truncate(65 * 2**20)
    assert "exceeds" in refusal(folder)


@pytest.mark.parametrize("value", [0, "1", float("nan"), [1]])
def test_a_wrong_scaling_factor_is_refused(folder: Path, value: Any) -> None:
    edit(folder / "vae_decoder" / "config.json", scaling_factor=value)
    assert "config.json" in refusal(folder)


def test_without_a_vae_config_stable_diffusions_scaling_holds(folder: Path) -> None:
    (folder / "vae_decoder" / "config.json").unlink()
    assert layout.read_layout(folder).scaling == layout.SD_SCALING


def test_the_vae_folder_may_hold_the_config(folder: Path) -> None:
    (folder / "vae").mkdir()
    (folder / "vae_decoder" / "config.json").rename(folder / "vae" / "config.json")
    edit(folder / "vae" / "config.json", scaling_factor=0.13, shift_factor=0.5)
    found = layout.read_layout(folder)
    assert (found.scaling, found.shift) == (0.13, 0.5)


def test_a_safety_checker_is_noticed(folder: Path) -> None:
    edit(folder / "model_index.json", safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"])
    assert layout.read_layout(folder).safety_checker


def test_a_model_without_encoder_is_complete(folder: Path) -> None:
    (folder / "vae_encoder" / "model.onnx").unlink()
    assert layout.read_layout(folder).vae_encoder is None
