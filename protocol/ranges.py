"""Limits on what a request may hold, and the checks that a type with a range cannot express.

The checks raise ValueError("field: sentence"), which `work.parse_params` turns into a fault.
"""

from __future__ import annotations

import math
from typing import Any

MAX_TEXT_CHARS = 2_000_000
MAX_MESSAGES = 4096
MAX_STOP = 16
MAX_BATCH = 2048
MAX_AUDIO_BYTES = 100 * 2**20
MAX_IMAGE_BYTES = 20 * 2**20
MAX_SIDE = 4096
MIN_SIDE = 16
MAX_PIXELS = 4096 * 4096
MAX_VIDEO_FRAMES = 3600
MAX_INPUT_BYTES: dict[str, int] = {"audio": MAX_AUDIO_BYTES, "image": MAX_IMAGE_BYTES, "mask": MAX_IMAGE_BYTES}


def finite(params: object, *names: str) -> None:
    """Refuse NaN and infinities, which pass every comparison that a range makes."""
    for name in names:
        value = getattr(params, name)
        if value is not None and not math.isfinite(value):
            raise ValueError(f"{name}: expected a finite number")


def multiple_of_8(width: int, height: int) -> None:
    """Latent diffusion works on 8 x 8 blocks of pixels."""
    for name, value in (("width", width), ("height", height)):
        if value % 8:
            raise ValueError(f"{name}: {value} is not a multiple of 8")
    if width * height > MAX_PIXELS:
        raise ValueError(f"width: {width} x {height} exceeds {MAX_PIXELS} pixels")


def embedding_input(value: Any) -> None:
    """msgspec cannot tell two array types apart in one union, so the batch is judged here."""
    if not isinstance(value, list) or not 1 <= len(value) <= MAX_BATCH:
        raise ValueError(f"input: expected a list of 1 to {MAX_BATCH} texts or token lists")
    texts = all(isinstance(item, str) for item in value)
    tokens = all(
        isinstance(item, list) and item and all(type(token) is int and 0 <= token < 2**31 for token in item)
        for item in value
    )
    if not texts and not tokens:
        raise ValueError("input: expected texts only, or non-empty lists of token ids only")
    if texts and any(not item for item in value):
        raise ValueError("input: an empty text has no embedding")
    if texts and sum(len(item) for item in value) > MAX_TEXT_CHARS:
        raise ValueError(f"input: the batch exceeds {MAX_TEXT_CHARS} characters")
