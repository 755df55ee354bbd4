"""What images and videos share: sizes as "WxH"."""

from __future__ import annotations

import re
from typing import Any

from protocol.faults import refuse

_SIZE = re.compile(r"([1-9][0-9]{0,5})x([1-9][0-9]{0,5})\Z", re.ASCII)


def size_params(value: Any) -> dict[str, int]:
    """Width and height from OpenAI's `size`; "auto" or None leaves the defaults. Raises FaultError."""
    if value is None or value == "auto":
        return {}
    match = _SIZE.match(value) if isinstance(value, str) else None
    if match is None:
        raise refuse("invalid_parameter", 'size: Expected "WIDTHxHEIGHT" in pixels, such as "512x512".', "size")
    return {"width": int(match[1]), "height": int(match[2])}


SIZE_NAMES = {"width": "size", "height": "size"}
