"""Judges of the fixture's answers: the asked colour is in the middle, the asked shape is there, the rest is black.

The fixture paints a circle of radius 0.35 or a square of side 0.7 (of the picture's side) on black.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (255, 0, 0),
    "green": (0, 255, 0),
    "blue": (0, 0, 255),
    "yellow": (255, 255, 0),
    "white": (255, 255, 255),
}
BLACK = (0, 0, 0)
TOLERANCE = 48  # of 255: lossy formats and chroma subsampling blur a little


def wrong_picture(pixels: Any, colour: str, shape: str, size: tuple[int, int]) -> str:
    """What is wrong with a picture (height, width, 3) as a sentence, or "".

    Args:
        shape: "circle" or "square"; "" means that the colour fills everything.
        size: (width, height) that was asked for.
    """
    height, width = pixels.shape[:2]
    if (width, height) != size:
        return f"the picture is {width} x {height} instead of {size[0]} x {size[1]}"
    asked = COLOURS[colour]
    # 0.3 from the middle along both axes lies inside the square and outside the circle.
    expected = {
        "middle": (0.5, 0.5, asked),
        "corner": (0.03, 0.03, BLACK if shape else asked),
        "diagonal": (0.8, 0.8, BLACK if shape == "circle" else asked),
    }
    for place, (x, y, wanted) in expected.items():
        found = [int(value) for value in pixels[int(y * height), int(x * width)]]
        if max(abs(a - b) for a, b in zip(found, wanted, strict=True)) > TOLERANCE:
            return f"the {place} is {tuple(found)} instead of {wanted}"
    return ""


def wrong_file(path: Path, colour: str, shape: str, size: tuple[int, int], format: str) -> str:
    """What is wrong with a picture file as a sentence, or ""."""
    import numpy as np
    from PIL import Image

    with Image.open(path) as image:
        if image.format != format.upper():
            return f"the file is {image.format} instead of {format.upper()}"
        return wrong_picture(np.asarray(image.convert("RGB")), colour, shape, size)
