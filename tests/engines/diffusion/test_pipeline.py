"""The loop over real networks on onnxruntime: answers, repeatability, graph variants, broken models."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engines.runtime.contract import CancelledRun
from engines.runtime.ort import Terminator
from protocol.faults import Fault, FaultError

np = pytest.importorskip("numpy", reason="the image extra is not installed")
pytest.importorskip("onnxruntime", reason="the image extra is not installed")
pytest.importorskip("tokenizers", reason="the image extra is not installed")
pipelines = pytest.importorskip("engines.diffusion.pipeline")
from engines.diffusion.checks import wrong_picture  # noqa: E402
from engines.diffusion.schedulers import SAMPLERS, make_schedule  # noqa: E402

pytestmark = pytest.mark.engine


def load(folder: Path) -> Any:
    return pipelines.load_pipeline(folder, "cpu", 1, lambda *_: None)


def paint(
    pipeline: Any, prompt: str, *, negative: str = "", guidance: float = 1.0, seed: int = 0, steps: int = 6
) -> Any:
    schedule = make_schedule(pipeline.layout.scheduler, steps)
    steer = pipeline.embed(prompt, negative, guidance)
    return pipeline.decode(pipeline.denoise(steer, schedule, pipeline.noise(seed, 128, 128)))


def failed_load(folder: Path) -> Fault:
    with pytest.raises(FaultError) as caught:
        load(folder)
    assert caught.value.fault.code == "load_failed"
    return caught.value.fault


@pytest.mark.parametrize("guidance", [0.0, 1.0, 2.0, 7.5, 20.0])
@pytest.mark.parametrize(
    ("prompt", "colour", "shape"), [("a red circle", "red", "circle"), ("blue square", "blue", "square")]
)
def test_the_asked_colour_and_shape_appear(folder: Path, prompt: str, colour: str, shape: str, guidance: float) -> None:
    assert wrong_picture(paint(load(folder), prompt, guidance=guidance), colour, shape, (128, 128)) == ""


@pytest.mark.parametrize("steps", [1, 2, 50])
@pytest.mark.parametrize("name", list(SAMPLERS))
def test_every_sampler_paints_it(folder: Path, name: str, steps: int) -> None:
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "_class_name": name, "timestep_spacing": "leading"}))
    assert wrong_picture(paint(load(folder), "a red circle", steps=steps), "red", "circle", (128, 128)) == ""


def test_a_negative_prompt_pushes_away(folder: Path) -> None:
    pipeline = load(folder)
    plain = paint(pipeline, "white circle", guidance=1.5).astype(int)
    pushed = paint(pipeline, "white circle", negative="red circle", guidance=1.5).astype(int)
    assert plain[64, 64].tolist() == [255, 255, 255]
    assert pushed[64, 64].tolist() == [255, 255, 255]
    plain = paint(pipeline, "green", guidance=1.5)
    assert (paint(pipeline, "green", negative="green", guidance=7.0) == plain).all()


def test_one_seed_gives_one_picture_and_another_seed_another_noise(folder: Path) -> None:
    first, again = load(folder), load(folder)
    assert (first.noise(7, 64, 32) == again.noise(7, 64, 32)).all()
    assert first.noise(7, 64, 32).shape == (1, 4, 4, 8)
    assert (first.noise(7, 64, 32) != first.noise(8, 64, 32)).any()
    unfinished = make_schedule(first.layout.scheduler, 10)
    steer = first.embed("a circle", "", 1.0)
    answers = [pipeline.denoise(steer, unfinished, pipeline.noise(7, 64, 64)) for pipeline in (first, again)]
    assert (answers[0] == answers[1]).all()


def test_a_start_image_comes_through(folder: Path) -> None:
    pipeline = load(folder)
    blue = np.zeros((128, 128, 3), np.uint8)
    blue[..., 2] = 255
    start = pipeline.encode(blue)
    assert (pipeline.decode(start) == blue).all()
    steer = pipeline.embed("a circle", "", 1.0)
    schedule = make_schedule(pipeline.layout.scheduler, 10, strength=0.2)
    found = pipeline.decode(pipeline.denoise(steer, schedule, pipeline.noise(1, 128, 128), start=start))
    assert wrong_picture(found, "blue", "circle", (128, 128)) == ""
    without = paint(pipeline, "a circle", seed=1)
    assert wrong_picture(without, "blue", "circle", (128, 128)) != ""


def test_half_precision_fixed_batch_and_scalar_time(half: Path) -> None:
    pipeline = load(half)
    assert pipeline.compute_type == "float16"
    for guidance in (1.0, 4.0):
        assert wrong_picture(paint(pipeline, "a red circle", guidance=guidance), "red", "circle", (128, 128)) == ""


def test_steps_are_counted_and_progress_may_end_the_work(folder: Path) -> None:
    pipeline = load(folder)
    calls: list[int] = []

    def count() -> None:
        calls.append(1)
        if len(calls) == 3:
            raise CancelledRun

    with pytest.raises(CancelledRun):
        pipeline.denoise(
            pipeline.embed("red", "", 1.0),
            make_schedule(pipeline.layout.scheduler, 10),
            pipeline.noise(0, 64, 64),
            on_step=count,
        )
    assert len(calls) == 3


def test_a_terminator_ends_the_walk(folder: Path) -> None:
    pipeline, stop = load(folder), Terminator()
    begun, ended = threading.Event(), []

    def work() -> None:
        steer = pipeline.embed("red", "", 1.0)
        try:
            plan = make_schedule(pipeline.layout.scheduler, 500)
            pipeline.denoise(steer, plan, pipeline.noise(0, 1024, 1024), on_step=begun.set, stop=stop)
        except CancelledRun as error:
            ended.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    assert begun.wait(60)
    stop.terminate()
    thread.join(60)
    assert not thread.is_alive()
    assert len(ended) == 1


def test_the_load_reports_each_part(folder: Path) -> None:
    seen: list[tuple[int, int]] = []
    pipelines.load_pipeline(folder, "cpu", 1, lambda *part: seen.append(part))
    assert seen == [(n, 5) for n in range(1, 6)]


# ---- broken models


@pytest.mark.parametrize("part", ["text_encoder", "unet", "vae_decoder", "vae_encoder"])
@pytest.mark.parametrize("damage", ["empty", "cut", "noise", "zeros", "text"])
def test_a_broken_graph_is_a_clean_failed_load(folder: Path, part: str, damage: str) -> None:
    path = folder / part / "model.onnx"
    data = path.read_bytes()
    noise = np.random.default_rng(3).integers(0, 256, 3000, np.uint8).tobytes()
    path.write_bytes(
        {"empty": b"", "cut": data[: len(data) // 2], "noise": noise, "zeros": bytes(3000), "text": b"hello\n"}[damage]
    )
    assert part in failed_load(folder).message


@pytest.mark.parametrize("seed", range(12))
def test_flipped_bits_never_kill_the_process(folder: Path, seed: int) -> None:
    """There is no checksum inside an ONNX file: a flip fails the load or changes numbers, and that is all."""
    path = folder / "unet" / "model.onnx"
    data, random = bytearray(path.read_bytes()), np.random.default_rng(seed)
    for place in random.integers(0, len(data), 8):
        data[place] ^= 1 << int(random.integers(0, 8))
    path.write_bytes(bytes(data))
    code = ""
    try:
        load(folder)
    except FaultError as error:
        code = error.fault.code
    assert code in ("", "load_failed", "out_of_memory")


def edited(path: Path, edit: Callable[[Any], None]) -> None:
    onnx = pytest.importorskip("onnx", reason="onnx (dev group) is not installed")
    model = onnx.load(path)
    edit(model)
    onnx.save(model, path)


def test_a_unet_with_another_input_is_refused_by_name(folder: Path) -> None:
    def add(model: Any) -> None:
        extra = model.graph.input.add()
        extra.CopyFrom(model.graph.input[0])
        extra.name = "time_ids"

    edited(folder / "unet" / "model.onnx", add)
    assert "time_ids" in failed_load(folder).message


def test_a_unet_without_its_input_is_refused_by_name(folder: Path) -> None:
    def rename(model: Any) -> None:
        model.graph.input[1].name = "t"
        for node in model.graph.node:
            node.input[:] = ["t" if name == "timestep" else name for name in node.input]

    edited(folder / "unet" / "model.onnx", rename)
    assert "timestep" in failed_load(folder).message


def test_an_inpainting_unet_is_refused(folder: Path) -> None:
    onnx = pytest.importorskip("onnx", reason="onnx (dev group) is not installed")
    port, kind = onnx.helper.make_tensor_value_info, onnx.TensorProto
    inputs = [
        port("sample", kind.FLOAT, ["batch", 9, "height", "width"]),
        port("timestep", kind.FLOAT, ["steps"]),
        port("encoder_hidden_states", kind.FLOAT, ["batch", "sequence", 8]),
    ]
    outputs = [port("out_sample", kind.FLOAT, ["batch", 9, "height", "width"])]
    node = onnx.helper.make_node("Identity", ["sample"], ["out_sample"])
    opset = onnx.helper.make_opsetid("", 17)
    model = onnx.helper.make_model(onnx.helper.make_graph([node], "g", inputs, outputs), opset_imports=[opset])
    model.ir_version = 9
    onnx.save(model, folder / "unet" / "model.onnx")
    assert "9 channels" in failed_load(folder).message


def test_weights_that_are_no_numbers_fail_the_load(folder: Path) -> None:
    onnx = pytest.importorskip("onnx", reason="onnx (dev group) is not installed")

    def spoil(model: Any) -> None:
        for constant in model.graph.initializer:
            if constant.name == "signals":
                constant.CopyFrom(onnx.numpy_helper.from_array(np.full(1000, np.nan, np.float32), "signals"))

    edited(folder / "unet" / "model.onnx", spoil)
    assert "not numbers" in failed_load(folder).message


def test_networks_that_do_not_fit_together_fail_the_load(folder: Path) -> None:
    onnx = pytest.importorskip("onnx", reason="onnx (dev group) is not installed")

    def narrow(model: Any) -> None:
        table = onnx.numpy_helper.to_array(model.graph.initializer[0])
        model.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(table[:, :4].copy(), "E"))
        for output in model.graph.output:
            output.type.tensor_type.shape.dim[-1].dim_value = 4

    edited(folder / "text_encoder" / "model.onnx", narrow)
    assert "does not work" in failed_load(folder).message


def test_a_decoder_of_another_scale_fails_the_load(folder: Path) -> None:
    onnx = pytest.importorskip("onnx", reason="onnx (dev group) is not installed")

    def shrink(model: Any) -> None:
        for constant in model.graph.initializer:
            if constant.name == "sc":
                four = np.array([1, 1, 4, 4], np.float32)
                constant.CopyFrom(onnx.numpy_helper.from_array(four, "sc"))

    edited(folder / "vae_decoder" / "model.onnx", shrink)
    assert "VAE decoder answers" in failed_load(folder).message


_STARVED = """
import resource, sys
from pathlib import Path
from engines.diffusion.pipeline import load_pipeline
from engines.diffusion.schedulers import make_schedule
from protocol.faults import FaultError
pipeline = load_pipeline(Path(sys.argv[1]), "cpu", 1, lambda *_: None)
size = int(open("/proc/self/statm").read().split()[0]) * 4096
resource.setrlimit(resource.RLIMIT_AS, (size + 200 * 2**20,) * 2)
try:
    plan = make_schedule(pipeline.layout.scheduler, 1)
    pipeline.decode(pipeline.denoise(pipeline.embed("red", "", 1.0), plan, pipeline.noise(0, 4096, 4096)))
except FaultError as error:
    print(error.fault.code)
except MemoryError:
    print("out_of_memory")
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc and RLIMIT_AS")
def test_too_little_memory_is_a_typed_fault(folder: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    done = subprocess.run(
        [sys.executable, "-c", _STARVED, folder], env=environment, capture_output=True, text=True, timeout=60
    )
    assert (done.stdout.strip(), done.returncode) == ("out_of_memory", 0), done.stderr[-2000:]


def test_noise_between_two_seeds_stays_unit_noise(folder: Path) -> None:
    pipeline = load(folder)
    first, last = pipeline.noise(1, 256, 256), pipeline.noise(2, 256, 256)
    assert (pipelines.between(first, last, 0) == first).all()
    assert (pipelines.between(first, last, 1) == last).all()
    steps = [pipelines.between(first, last, share) for share in np.linspace(0, 1, 9)]
    assert all(abs(float(step.std()) - 1) < 0.03 for step in steps)
    distances = [float(np.abs(a - b).mean()) for a, b in itertools.pairwise(steps)]
    assert max(distances) / min(distances) < 1.05  # even steps: no jump in the clip
    assert (pipelines.between(first, first, 0.5) == first).all()
