"""How this process is locked down, as the launcher found by trying."""

from __future__ import annotations

import functools
import os

import msgspec

_VERDICTS = "BULKHEAD_SANDBOX"  # set by engines/launch.py


@functools.cache
def verdicts() -> dict[str, str]:
    """Layer -> verdict; empty without a sandbox. Taken out of the environment, so that no program inherits it."""
    text = os.environ.pop(_VERDICTS, "")
    return msgspec.json.decode(text, type=dict[str, str]) if text else {}
