"""Identifiers. Nothing here reads a clock or a random source: callers hand both in.

Job ids are opaque strings of at most 128 bytes; ours sort by time of creation.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from typing import Any

import msgspec

MAX_ID_BYTES = 128
RANDOM_BYTES = 10
_CROCKFORD = "0123456789abcdefghjkmnpqrstvwxyz"
# Ids become folder names and URL parts, so a dot alone or a slash must be impossible.
_SAFE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.:-]{0,127}\Z")


def new_id(prefix: str, now_ms: int, random: bytes) -> str:
    """Return `prefix_` plus 26 base-32 characters: 48 bits of time, 80 bits of randomness.

    Args:
        prefix: short word such as "job"; part of the id, so people see what it names.
        now_ms: milliseconds since the epoch.
        random: exactly `RANDOM_BYTES` random bytes.
    """
    if len(random) != RANDOM_BYTES:
        raise ValueError(f"need {RANDOM_BYTES} random bytes, got {len(random)}")
    number = (now_ms & (2**48 - 1)) << 80 | int.from_bytes(random, "big")
    digits = [_CROCKFORD[number >> shift & 31] for shift in range(125, -5, -5)]
    return f"{prefix}_{''.join(digits)}"


def is_safe_id(text: str) -> bool:
    """Whether `text` may stand as an id on our wires, as a folder name and in a URL path."""
    return _SAFE.match(text) is not None


def model_revision(file_digests: Mapping[str, str], config: Mapping[str, Any]) -> str:
    """Return the revision of a model: sha256 hex over its files by role and its load config.

    Args:
        file_digests: role -> sha256 hex of the file.
        config: everything of the load config that changes what is loaded; JSON-able.
    """
    canonical = msgspec.json.encode([sorted(file_digests.items()), dict(config)], order="deterministic")
    return hashlib.sha256(canonical).hexdigest()
