"""The judges tell right pictures from wrong ones."""

from __future__ import annotations

from pathlib import Path

import pytest

np = pytest.importorskip("numpy", reason="the image extra is not installed")
checks = pytest.importorskip("engines.diffusion.checks")

SIDE = 64


def painted(shape: str, colour: tuple[int, int, int] = (255, 0, 0)) -> object:
    y, x = (np.mgrid[:SIDE, :SIDE] + 0.5) / SIDE - 0.5
    inside = {"circle": x**2 + y**2 < 0.35**2, "square": np.maximum(abs(x), abs(y)) < 0.35, "": x < 9}[shape]
    return np.where(inside[..., None], np.array(colour), 0).astype(np.uint8)


@pytest.mark.parametrize("shape", ["circle", "square", ""])
def test_right_pictures_pass_and_other_shapes_do_not(shape: str) -> None:
    pixels = painted(shape)
    for asked in ("circle", "square", ""):
        wrong = checks.wrong_picture(pixels, "red", asked, (SIDE, SIDE))
        assert (wrong == "") == (asked == shape)


def test_wrong_colours_sizes_and_black_are_told() -> None:
    assert "middle" in checks.wrong_picture(painted("circle"), "blue", "circle", (SIDE, SIDE))
    assert "64 x 64" in checks.wrong_picture(painted("circle"), "red", "circle", (SIDE, 128))
    assert "middle" in checks.wrong_picture(np.zeros((SIDE, SIDE, 3), np.uint8), "red", "circle", (SIDE, SIDE))


@pytest.mark.engine
def test_the_format_of_a_file_is_judged_by_its_content(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image", reason="the image extra is not installed")
    path = tmp_path / "image-0.png"
    image.fromarray(painted("circle")).save(path, "PNG")
    assert checks.wrong_file(path, "red", "circle", (SIDE, SIDE), "png") == ""
    assert "PNG" in checks.wrong_file(path, "red", "circle", (SIDE, SIDE), "webp")
