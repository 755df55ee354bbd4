"""What both engines share: load options, limits, refusals that need the model, cancel."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from engines.diffusion.base import SEEDS, DiffusionEngine, first_seed, later_seed
from engines.image.engine import ImageEngine
from engines.runtime.contract import CancelledRun, Job, Model, Ready
from protocol.faults import Fault, FaultError
from protocol.work import ImageParams

ROOT = Path(__file__).parents[3]


def load(folder: Path, **options: Any) -> tuple[DiffusionEngine, Ready]:
    for name in ("numpy", "onnxruntime", "tokenizers", "PIL"):
        pytest.importorskip(name, reason="the image extra is not installed")
    engine = ImageEngine()
    return engine, engine.load(Model(name="m", files={"model": str(folder)}, options=options), folder, lambda *_: None)


def failed_load(files: dict[str, str], **options: Any) -> Fault:
    with pytest.raises(FaultError) as caught:
        ImageEngine().load(Model(name="m", files=files, options=options), Path(), lambda *_: None)
    return caught.value.fault


@pytest.mark.parametrize("name", ["image", "video"])
def test_an_engine_greets_before_any_heavy_import(name: str) -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); import engines.{name}.engine; "
        "print([m for m in ('numpy', 'onnxruntime', 'tokenizers', 'PIL', 'av') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"


def test_seeds_are_kept_counted_and_repeatable() -> None:
    assert first_seed(0) == 0
    assert first_seed(5) == 5
    assert 0 <= first_seed(None) < 2**53
    assert [later_seed(SEEDS - 1, n) for n in range(2)] == [SEEDS - 1, 0]


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    fault = failed_load({"model": str(tmp_path / "nowhere")})
    assert (fault.code, fault.field) == ("load_failed", "files.model")
    assert "nowhere" in fault.message
    assert failed_load({}).field == "files.model"


def test_an_unknown_option_is_refused_before_the_model_is_opened() -> None:
    assert failed_load({}, max_frames=3).field == "options.max_frames"


@pytest.mark.engine
def test_limits_say_what_runs(folder: Path) -> None:
    _, ready = load(folder, max_pixels=4096, default_steps=3)
    assert (ready.device, ready.slots, ready.compute_type) == ("cpu", 1, "float32")
    assert ready.limits["max_pixels"] == 4096
    assert ready.limits["default_steps"] == 3
    assert ready.limits["prompt_tokens"] == 75
    assert ready.limits["start_image"] is True
    assert (ready.limits["scheduler"], ready.limits["sampler"]) == ("DDIMScheduler", "ddim")
    assert set(ready.limits["devices"].values()) == {"cpu"}
    assert set(ready.versions) == {"onnxruntime", "numpy", "tokenizers", "pillow"}


@pytest.mark.engine
def test_a_mapped_sampler_and_an_unused_safety_checker_are_admitted(folder: Path) -> None:
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "_class_name": "PNDMScheduler"}))
    path = folder / "model_index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "safety_checker": ["a", "b"]}))
    _, ready = load(folder)
    assert ready.limits["sampler"] == "ddim, the first-order form"
    assert ready.limits["safety_checker"] == "not run"


@pytest.mark.engine
def test_a_fixed_size_graph_serves_its_size_only(folder: Path) -> None:
    onnx = pytest.importorskip("onnx", reason="onnx (dev group) is not installed")
    path = folder / "unet" / "model.onnx"
    model = onnx.load(path)
    for value in (model.graph.input[0], model.graph.output[0]):
        height, width = list(value.type.tensor_type.shape.dim)[2:]
        height.dim_value, width.dim_value = 8, 16
    onnx.save(model, path)
    engine, _ = load(folder)
    engine.validate("image", ImageParams(prompt="red", width=128, height=64))
    with pytest.raises(FaultError, match="128 x 64") as caught:
        engine.validate("image", ImageParams(prompt="red", width=64, height=64))
    assert caught.value.fault.field == "width"


@pytest.mark.engine
def test_a_start_image_without_an_encoder_is_refused(folder: Path, tmp_path: Path) -> None:
    (folder / "vae_encoder" / "model.onnx").unlink()
    engine, ready = load(folder)
    assert ready.limits["start_image"] is False
    job = Job(
        "image", ImageParams(prompt="red", width=64, height=64), inputs={"image": tmp_path / "x"}, folder=tmp_path
    )
    with pytest.raises(FaultError) as caught:
        engine.run(job)
    assert (caught.value.fault.code, caught.value.fault.field) == ("unsupported", "image")


@pytest.mark.engine
def test_a_cancel_before_the_first_step_is_seen(folder: Path, tmp_path: Path) -> None:
    engine, _ = load(folder)
    job = Job("image", ImageParams(prompt="red", width=64, height=64), folder=tmp_path)
    engine.cancel(job)  # nothing runs yet: no effect, no error
    job.cancelled.set()
    with pytest.raises(CancelledRun):
        engine.run(job)
    assert job.files == []
