"""The image engine over the real wire."""

from __future__ import annotations

import io
import shutil
import signal
import struct
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engines.image.engine import ENGINE, FIXTURE
from engines.runtime.contract import Case
from protocol import engine_wire as wire
from protocol.engine_wire import Model
from protocol.faults import Fault

for _name in ("numpy", "onnxruntime", "tokenizers", "PIL"):
    pytest.importorskip(_name, reason="the image extra is not installed")

from engines.diffusion.checks import wrong_file  # noqa: E402

pytestmark = pytest.mark.engine
Spawn = Callable[[str], Any]
FIX = ENGINE.fixture("")
SMALL = {"width": 64, "height": 64, "steps": 3}


def started(spawn: Spawn, folder: Path = FIXTURE, **options: Any) -> Any:
    child = spawn("image")
    ready = child.load(Model(name="m", files={"model": str(folder)}, device="cpu", options=options))
    assert isinstance(ready, wire.Ready), ready
    return child


def blue_png(folder: Path) -> Path:
    from PIL import Image

    path = folder / "start"
    Image.new("RGB", (40, 30), (0, 0, 255)).save(path, "PNG")
    return path


def test_the_fixture_answers(spawn: Spawn) -> None:
    child = started(spawn)
    for case in FIX.cases:
        answer = child.run(case.kind, case.params)
        assert case.check(answer.body, answer.files) == ""
        assert answer.started


def test_files_are_named_counted_and_hashed(spawn: Spawn) -> None:
    child = started(spawn)
    answer = child.run("image", {"prompt": "red", "n": 3, "format": "webp", "seed": 5, **SMALL})
    assert [file.name for file in answer.result.files] == ["image-0.webp", "image-1.webp", "image-2.webp"]
    assert {file.mime for file in answer.result.files} == {"image/webp"}
    assert answer.body.seeds == [5, 6, 7]
    assert answer.result.usage == {"images": 3}


def test_progress_counts_every_step(spawn: Spawn) -> None:
    child = started(spawn)
    answer = child.run("image", {"prompt": "red", "n": 2, **SMALL})
    assert [(report.n, report.total) for report in answer.progress] == [(n, 8) for n in range(1, 9)]


def test_a_seed_repeats_its_picture_and_the_result_names_a_fresh_one(spawn: Spawn, tmp_path: Path) -> None:
    child = started(spawn)
    asked = {"prompt": "a circle", "width": 64, "height": 64, "steps": 2, "guidance": 1.0}
    first = child.run("image", asked)
    again = child.run("image", {**asked, "seed": first.body.seeds[0]})
    other = child.run("image", {**asked, "seed": first.body.seeds[0] + 1})
    digests = [answer.result.files[0].sha256 for answer in (first, again, other)]
    assert digests[0] == digests[1]
    assert digests[0] != digests[2]


def test_the_last_seed_wraps(spawn: Spawn) -> None:
    child = started(spawn)
    assert child.run("image", {"prompt": "red", "n": 2, "seed": 2**63 - 1, **SMALL}).body.seeds == [2**63 - 1, 0]


def test_only_the_transparent_places_of_a_mask_change(spawn: Spawn, tmp_path: Path) -> None:
    """The left half is made anew; the right half stays to the pixel."""
    import numpy as np
    from PIL import Image

    start, mask = tmp_path / "start.png", tmp_path / "mask.png"
    rows = np.zeros((128, 128, 3), np.uint8)
    rows[..., 2] = np.arange(128)[:, None] + 100
    Image.fromarray(rows).save(start)
    alpha = Image.new("RGBA", (128, 128), (0, 0, 0, 255))
    alpha.paste((0, 0, 0, 0), (0, 0, 64, 128))
    alpha.save(mask)
    child = started(spawn)
    asked = {"prompt": "red", "width": 128, "height": 128, "steps": 8, "seed": 3, "strength": 1.0}
    answer = child.run("image", asked, inputs={"image": start, "mask": mask})
    made = np.asarray(Image.open(answer.files[0]).convert("RGB"))
    assert np.array_equal(made[:, 64:], rows[:, 64:])
    left = made[:, :48].reshape(-1, 3).mean(axis=0)
    assert left[0] > left[2] + 60, f"the left half is not red: {left}"
    refused = child.run("image", {"prompt": "red", **SMALL}, inputs={"mask": mask})
    assert (refused.fault.code, refused.fault.field) == ("invalid_parameter", "mask")
    assert child.run("image", {"prompt": "red", **SMALL}, inputs={"image": start}).files


def test_a_start_image_gives_its_colour(spawn: Spawn, tmp_path: Path) -> None:
    child = started(spawn)
    asked = {"prompt": "a circle", "width": 128, "height": 128, "steps": 10, "strength": 0.2, "seed": 1}
    answer = child.run("image", asked, inputs={"image": blue_png(tmp_path)})
    assert wrong_file(answer.files[0], "blue", "circle", (128, 128), "png") == ""
    assert len(answer.progress) == 3  # two of ten steps, and the decoding
    without = child.run("image", asked)
    assert wrong_file(without.files[0], "blue", "circle", (128, 128), "png") != ""


@pytest.mark.parametrize(
    ("params", "code", "field"),
    [
        ({"prompt": "red " * 76}, "context_length_exceeded", "prompt"),
        ({"prompt": "red", "negative_prompt": "red " * 76}, "context_length_exceeded", "negative_prompt"),
        ({"prompt": "red", "width": 4096, "height": 4096}, "invalid_parameter", "width"),
        ({"prompt": "red", "negative_prompt": "blue", "guidance": 1}, "invalid_parameter", "negative_prompt"),
        ({"prompt": "red", "width": 100}, "invalid_parameter", "width"),
        ({"prompt": "red", "width": 8}, "invalid_parameter", "width"),
        ({"prompt": "red", "width": 10**9}, "invalid_parameter", "width"),
        ({"prompt": "red", "steps": 0}, "invalid_parameter", "steps"),
        ({"prompt": "red", "steps": 10**6}, "invalid_parameter", "steps"),
        ({"prompt": "red", "n": 0}, "invalid_parameter", "n"),
        ({"prompt": "red", "guidance": float("nan")}, "invalid_parameter", "guidance"),
        ({"prompt": "red", "strength": 0}, "invalid_parameter", "strength"),
        ({"prompt": "red", "seed": -1}, "invalid_parameter", "seed"),
        ({"prompt": "red", "format": "gif"}, "invalid_parameter", "format"),
        ({"prompt": ""}, "invalid_parameter", "prompt"),
        ({"prompt": "red", "sampler": "ddim"}, "invalid_parameter", "sampler"),
    ],
)
def test_bad_requests_are_refused_by_name_and_the_next_works(
    spawn: Spawn, params: dict[str, Any], code: str, field: str
) -> None:
    child = started(spawn)
    refused = child.run("image", params)
    assert (refused.fault.code, refused.fault.field, refused.started) == (code, field, False)
    assert child.run("image", {"prompt": "red", **SMALL}).result is not None


def png_bomb() -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(50_000 * 3 + 1))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def cut_jpeg() -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.effect_noise((200, 200), 90).save(buffer, "JPEG")
    return buffer.getvalue()[:2000]


@pytest.mark.parametrize("make", [png_bomb, cut_jpeg, bytes, lambda: b"no picture at all"])
def test_bad_start_images_are_the_callers_fault_and_the_next_works(
    spawn: Spawn, tmp_path: Path, make: Callable[[], bytes]
) -> None:
    child = started(spawn)
    path = tmp_path / "start.png"
    path.write_bytes(make())
    refused = child.run("image", {"prompt": "red", **SMALL}, inputs={"image": path})
    assert (refused.fault.code, refused.fault.field) == ("invalid_input_file", "image")
    assert child.run("image", {"prompt": "red", **SMALL}).result is not None


def load_fault(spawn: Spawn, folder: Path, **model: Any) -> Fault:
    fault = spawn("image").load(Model(name="m", files={"model": str(folder)}, **model))
    assert isinstance(fault, Fault)
    return fault


@pytest.mark.parametrize("size", [0, 100, 9000])
def test_a_cut_model_is_a_clean_failed_load(spawn: Spawn, tmp_path: Path, size: int) -> None:
    folder = Path(shutil.copytree(FIXTURE, tmp_path / "model"))
    path = folder / "unet" / "model.onnx"
    path.write_bytes(path.read_bytes()[:size])
    fault = load_fault(spawn, folder)
    assert fault.code == "load_failed"
    assert "unet" in fault.message


def test_unknown_options_and_missing_files_are_named(spawn: Spawn, tmp_path: Path) -> None:
    assert load_fault(spawn, FIXTURE, options={"step": 1}).field == "options.step"
    assert "model_index.json" in load_fault(spawn, tmp_path).message
    assert str(tmp_path / "no") in load_fault(spawn, tmp_path / "no").message


def test_cuda_without_a_gpu_is_a_failed_load(spawn: Spawn) -> None:
    child = spawn("image")
    answer = child.load(Model(name="m", files={"model": str(FIXTURE)}, device="cuda"))
    if isinstance(answer, wire.Ready):
        assert answer.device.startswith("cuda")
    else:
        assert answer.code in ("cpu_fallback", "load_failed")


def begin_and_wait(child: Any, case: Case, wanted: type) -> Any:
    """Begin a run and wait for its first message of a type."""
    answer = child.begin(case.kind, case.params)
    while not isinstance(child.receive(), wanted):
        pass
    return answer


def test_cancel_ends_a_long_run_and_the_next_works(spawn: Spawn) -> None:
    child = started(spawn)
    assert FIX.endless is not None
    answer = begin_and_wait(child, FIX.endless, wire.Progress)
    began = time.monotonic()
    child.send(wire.Cancel(run=1))
    assert child.finish(answer, 1).fault.code == "cancelled"
    assert time.monotonic() - began < 15
    assert child.run("image", {"prompt": "red", **SMALL}).result is not None


HANGS = Case(kind="image", params={"prompt": "red", "width": 64, "height": 256, "steps": 2}, check=lambda *_: "")


def test_cancel_ends_a_hanging_network_and_the_next_works(spawn: Spawn, hanging: Path) -> None:
    """An endless ONNX loop: no step ever ends; only RunOptions.terminate, between its rounds, gets it back."""
    child = started(spawn, hanging)
    assert child.run("image", {"prompt": "red", **SMALL}).result is not None
    answer = begin_and_wait(child, HANGS, wire.Started)
    with pytest.raises(TimeoutError):
        child.receive(0.5)
    child.send(wire.Cancel(run=2))
    assert child.finish(answer, 2).fault.code == "cancelled"
    assert child.run("image", {"prompt": "red", **SMALL}).result is not None


def test_a_hanging_network_still_answers_pings_and_dies_of_sigterm(spawn: Spawn, hanging: Path) -> None:
    child = started(spawn, hanging)
    begin_and_wait(child, HANGS, wire.Started)
    child.send(wire.Ping(n=7))
    assert child.receive() == wire.Pong(n=7)
    child.process.terminate()
    assert child.process.wait(60) == -signal.SIGTERM


def test_probe_names_versions_and_devices() -> None:
    claims = ENGINE.probe("")
    assert "cpu" in claims.devices
    assert set(claims.versions) == {"onnxruntime", "numpy", "tokenizers", "pillow"}


@pytest.mark.gpu
def test_the_fixture_answers_on_a_gpu(spawn: Spawn) -> None:
    if not Path("/dev/nvidiactl").exists():
        pytest.skip("there is no NVIDIA GPU")
    child = spawn("image")
    ready = child.load(Model(name="m", files={"model": str(FIXTURE)}, device="cuda"))
    assert isinstance(ready, wire.Ready), ready
    assert set(ready.limits["devices"].values()) == {"cuda:0"}
    for case in FIX.cases:
        answer = child.run(case.kind, case.params)
        assert case.check(answer.body, answer.files) == ""
