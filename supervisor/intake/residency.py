"""Residency: what a load of a model is going to take of a GPU, from the best source there is. Pure."""

from __future__ import annotations

import msgspec

from supervisor.intake.placement import CONTEXT_BYTES

GIB = 2**30
# Weights are stored a little larger in memory: alignment, dequantised norms, graph buffers.
FILE_FACTOR = 1.1
# Keys and values of one token in an 8 B model with grouped queries: 32 layers x 2 x 1024 values x 2 bytes.
KV_BYTES_PER_TOKEN = 128 * 1024
DEFAULT_TOKENS = 4096


class Need(msgspec.Struct, frozen=True):
    """What a load will take of each of its devices.

    Attributes:
        source: "operator", "learned", "estimated" or "none". An estimate may delay a load, never refuse it.
    """

    bytes: int
    source: str


def need_of(*, told: int, learned: int | None, file_bytes: int, kv_tokens: int) -> Need:
    """What a load will take, from the best source there is.

    Args:
        told: the operator's `vram_gb` in bytes; 0 when not given.
        learned: peak seen earlier with these files, this configuration and this device; None when never seen.
        file_bytes: size of all its files; 0 when it has none, then nothing is claimed.
        kv_tokens: tokens of context that it keeps (all slots together); 0 for engines without.
    """
    if told > 0:
        return Need(told, "operator")
    if learned is not None:
        return Need(learned, "learned")
    if file_bytes <= 0:
        return Need(0, "none")
    return Need(int(file_bytes * FILE_FACTOR) + kv_tokens * KV_BYTES_PER_TOKEN + CONTEXT_BYTES, "estimated")


# ---- words


def gib(count: int) -> str:
    """Bytes for people."""
    return f"{count / GIB:.1f} GiB"


def short(uuid: str) -> str:
    """A GPU's UUID as people can tell it from another."""
    return uuid if len(uuid) <= 12 else f"{uuid[:12]}…"
