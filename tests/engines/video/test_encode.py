"""Frames to files: counts, codecs, colours, and what must not leave a file behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from engines.video.encode import CODECS, VideoWriter
from protocol.faults import FaultError

np = pytest.importorskip("numpy", reason="the video extra is not installed")
av = pytest.importorskip("av", reason="the video extra is not installed")

pytestmark = pytest.mark.engine


def frame(level: int, width: int = 64, height: int = 48) -> Any:
    return np.full((height, width, 3), level, np.uint8)


def decoded(path: Path) -> tuple[Any, list[Any]]:
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        about = (stream.codec_context.name, stream.codec_context.width, stream.codec_context.height)
        found = [(one.time, one.to_ndarray(format="rgb24")) for one in container.decode(stream)]
        return (*about, float(stream.average_rate)), found


@pytest.mark.parametrize("format", list(CODECS))
@pytest.mark.parametrize("count", [1, 2, 25, 61])
def test_every_frame_comes_back_in_order_and_on_time(tmp_path: Path, format: str, count: int) -> None:
    path = tmp_path / f"v.{format}"
    levels = [40 + 170 * index // count for index in range(count)]
    with VideoWriter(path, format, 64, 48, 25) as video:
        for level in levels:
            video.write(frame(level))
    about, found = decoded(path)
    assert about[:3] == (CODECS[format].name, 64, 48)
    assert count == 1 or about[3] == 25
    assert [round(time * 25) for time, _ in found] == list(range(count))
    assert all(abs(int(pixels[24, 32, 0]) - level) < 14 for (_, pixels), level in zip(found, levels, strict=True))


@pytest.mark.parametrize("fps", [1, 7, 30, 60])
@pytest.mark.parametrize("format", list(CODECS))
def test_the_rate_is_kept(tmp_path: Path, format: str, fps: int) -> None:
    path = tmp_path / "v"
    with VideoWriter(path, format, 16, 16, fps) as video:
        for index in range(fps * 2):
            video.write(frame(index, 16, 16))
    about, found = decoded(path)
    assert about[3] == pytest.approx(fps, rel=0.01)
    assert len(found) == fps * 2


@pytest.mark.parametrize("format", list(CODECS))
def test_colours_survive_the_way_to_yuv(tmp_path: Path, format: str) -> None:
    path = tmp_path / "v"
    pixels = np.zeros((64, 64, 3), np.uint8)
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)]
    for index, colour in enumerate(colours):
        pixels[:, index * 16 : index * 16 + 16] = colour
    with VideoWriter(path, format, 64, 64, 5) as video:
        video.write(pixels)
    _, found = decoded(path)
    for index, colour in enumerate(colours):
        assert np.abs(found[0][1][32, index * 16 + 8].astype(int) - colour).max() < 30


def test_an_mp4_begins_with_its_index(tmp_path: Path) -> None:
    path = tmp_path / "v"
    with VideoWriter(path, "mp4", 64, 48, 5) as video:
        for level in range(10):
            video.write(frame(level * 20))
    data = path.read_bytes()
    assert 0 < data.index(b"moov") < data.index(b"mdat")


@pytest.mark.parametrize("format", list(CODECS))
def test_no_frames_are_a_fault_not_an_empty_file(tmp_path: Path, format: str) -> None:
    path = tmp_path / "v"
    with pytest.raises(FaultError, match="no frame"), VideoWriter(path, format, 64, 48, 5):
        pass
    assert not path.exists()


def test_odd_sizes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FaultError, match="even"):
        VideoWriter(tmp_path / "v", "webm", 63, 48, 5)


def fail_after(video: VideoWriter) -> None:
    for level in range(50):
        video.write(frame(level))
    raise ZeroDivisionError


def test_an_error_on_the_way_leaves_no_file(tmp_path: Path) -> None:
    path = tmp_path / "v"
    with pytest.raises(ZeroDivisionError), VideoWriter(path, "webm", 64, 48, 5) as video:
        fail_after(video)
    assert not path.exists()


def test_a_folder_that_is_not_there_is_a_typed_fault(tmp_path: Path) -> None:
    with pytest.raises(FaultError) as caught, VideoWriter(tmp_path / "no" / "v", "webm", 64, 48, 5) as video:
        video.write(frame(9))
    assert caught.value.fault.code == "engine_failed"
    assert "libvpx-vp9" in caught.value.fault.message
