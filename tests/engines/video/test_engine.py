"""The video engine over the real wire."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engines.video.engine import ENGINE, FIXTURE, wrong_video
from protocol import engine_wire as wire
from protocol.engine_wire import Model
from protocol.faults import Fault
from protocol.work import VideoParams

for _name in ("numpy", "onnxruntime", "tokenizers", "PIL", "av"):
    pytest.importorskip(_name, reason="the video extra is not installed")

pytestmark = pytest.mark.engine
Spawn = Callable[[str], Any]
FIX = ENGINE.fixture("")
SMALL = {"width": 64, "height": 64, "steps": 2, "seconds": 0.5, "fps": 8}


def started(spawn: Spawn, **options: Any) -> Any:
    child = spawn("video")
    ready = child.load(Model(name="m", files={"model": str(FIXTURE)}, device="cpu", options=options))
    assert isinstance(ready, wire.Ready), ready
    return child


def test_the_fixture_answers(spawn: Spawn) -> None:
    child = started(spawn)
    for case in FIX.cases:
        answer = child.run(case.kind, case.params)
        assert case.check(answer.body, answer.files) == ""


def test_the_judge_tells_wrong_videos(spawn: Spawn) -> None:
    child = started(spawn)
    asked = {"prompt": "a red circle", **SMALL}
    answer = child.run("video", asked)
    params = VideoParams(**asked)
    assert wrong_video(answer.files[0], "red", "circle", params) == ""
    assert "middle" in wrong_video(answer.files[0], "blue", "circle", params)
    assert "frames" in wrong_video(answer.files[0], "red", "circle", VideoParams(**{**asked, "seconds": 1.0}))
    assert "vp9" in wrong_video(answer.files[0], "red", "circle", VideoParams(**{**asked, "format": "mp4"}))


def test_result_usage_and_progress(spawn: Spawn) -> None:
    child = started(spawn)
    answer = child.run("video", {"prompt": "red", "seed": 9, "format": "mp4", **SMALL})
    body = answer.body
    assert (body.width, body.height, body.frames, body.fps, body.format) == (64, 64, 4, 8, "mp4")
    assert (body.codec, body.seed) == ("h264", 9)
    assert [(file.name, file.mime) for file in answer.result.files] == [("video.mp4", "video/mp4")]
    assert answer.result.files[0].size == answer.files[0].stat().st_size
    assert answer.result.usage == {"frames": 4}
    assert [(report.n, report.total) for report in answer.progress] == [(n, 12) for n in range(1, 13)]


def test_a_seed_repeats_its_clip(spawn: Spawn) -> None:
    child = started(spawn)
    asked = {"prompt": "a circle", "seed": 3, "guidance": 1.0, "format": "mp4", **SMALL}
    first, again = (child.run("video", asked).result.files[0].sha256 for _ in range(2))
    assert first == again


def test_a_start_image_leads_the_clip(spawn: Spawn, tmp_path: Path) -> None:
    from PIL import Image

    Image.new("RGB", (64, 64), (0, 0, 255)).save(tmp_path / "start", "PNG")
    child = started(spawn)
    asked = {"prompt": "a circle", "width": 128, "height": 128, "steps": 10, "strength": 0.3, "seed": 1, "seconds": 0.5}
    answer = child.run("video", asked, inputs={"image": tmp_path / "start"})
    assert wrong_video(answer.files[0], "blue", "circle", VideoParams(**asked)) == ""
    # Strength rises to 0.3 over six frames: 1, 1, 1, 2, 2, 3 steps of ten, and one for each frame.
    assert len(answer.progress) == 10 + 6
    without = child.run("video", asked)
    assert wrong_video(without.files[0], "blue", "circle", VideoParams(**asked)) != ""


@pytest.mark.parametrize(
    ("params", "code", "field"),
    [
        ({"prompt": "red " * 76}, "context_length_exceeded", "prompt"),
        ({"prompt": "red", "width": 4096, "height": 4096}, "invalid_parameter", "width"),
        ({"prompt": "red", "seconds": 100, "fps": 30}, "invalid_parameter", "seconds"),
        ({"prompt": "red", "width": 63}, "invalid_parameter", "width"),
        ({"prompt": "red", "height": 0}, "invalid_parameter", "height"),
        ({"prompt": "red", "seconds": 0.001, "fps": 1}, "invalid_parameter", "seconds"),
        ({"prompt": "red", "seconds": 0}, "invalid_parameter", "seconds"),
        ({"prompt": "red", "fps": -5}, "invalid_parameter", "fps"),
        ({"prompt": "red", "format": "avi"}, "invalid_parameter", "format"),
    ],
)
def test_bad_requests_are_refused_by_name_and_the_next_works(
    spawn: Spawn, params: dict[str, Any], code: str, field: str
) -> None:
    child = started(spawn)
    refused = child.run("video", params)
    assert (refused.fault.code, refused.fault.field, refused.started) == (code, field, False)
    assert child.run("video", {"prompt": "red", **SMALL}).result is not None


def test_a_broken_start_image_is_the_callers_fault(spawn: Spawn, tmp_path: Path) -> None:
    (tmp_path / "start").write_bytes(b"GIF89a")
    refused = started(spawn).run("video", {"prompt": "red", **SMALL}, inputs={"image": tmp_path / "start"})
    assert (refused.fault.code, refused.fault.field) == ("invalid_input_file", "image")
    assert list(refused.folder.iterdir()) == []


def test_max_frames_is_an_option_of_video(spawn: Spawn) -> None:
    child = started(spawn, max_frames=3)
    assert child.run("video", {"prompt": "red", **SMALL}).fault.field == "seconds"


def test_cancel_ends_a_long_clip_leaves_no_file_and_the_next_works(spawn: Spawn) -> None:
    child = started(spawn)
    assert FIX.endless is not None
    answer = child.begin("video", FIX.endless.params)
    while not isinstance(child.receive(), wire.Progress):
        pass
    began = time.monotonic()
    child.send(wire.Cancel(run=1))
    assert child.finish(answer, 1).fault.code == "cancelled"
    assert time.monotonic() - began < 15
    assert list(answer.folder.iterdir()) == []
    assert child.run("video", {"prompt": "red", **SMALL}).result is not None


def test_probe_names_pyav_and_finds_our_encoders() -> None:
    claims = ENGINE.probe("")
    assert "av" in claims.versions
    assert claims.notes == ()


@pytest.mark.gpu
def test_the_fixture_answers_on_a_gpu(spawn: Spawn) -> None:
    if not Path("/dev/nvidiactl").exists():
        pytest.skip("there is no NVIDIA GPU")
    child = spawn("video")
    ready = child.load(Model(name="m", files={"model": str(FIXTURE)}, device="cuda"))
    assert not isinstance(ready, Fault), ready
    for case in FIX.cases:
        answer = child.run(case.kind, case.params)
        assert case.check(answer.body, answer.files) == ""
