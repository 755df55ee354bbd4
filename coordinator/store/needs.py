"""What a job needs of its worker beside the model, as one text: jobs that need the same stand in one line.

The queue is walked per (model, needs), so jobs that no free worker may take are never walked over by those that may.
GPU memory goes in rounded up to whole GiB, which keeps the lines few; the exact number is compared job by job.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Set
from functools import lru_cache

import msgspec

MAX_NEEDS_BYTES = 1000  # an index entry of PostgreSQL holds 2700 bytes; the names of model and tenant are in it, too
NO_LIMIT_GB = 1e9

Labels = frozenset[tuple[str, str]]
_Needs = tuple[int, tuple[tuple[str, str], ...]]
_read = msgspec.json.Decoder(_Needs).decode


def needs_of(labels: Mapping[str, str], vram_gb: float) -> str:
    """The text; "" for a job that any worker with its model may take."""
    if not labels and vram_gb <= 0:
        return ""
    return msgspec.json.encode((math.ceil(vram_gb), tuple(sorted(labels.items())))).decode()


@lru_cache(maxsize=4096)
def asked_labels(needs: str) -> Labels:
    """The labels that the text asks for."""
    return frozenset(_read(needs)[1]) if needs else frozenset()


@lru_cache(maxsize=4096)
def _whole_gb(needs: str) -> int:
    return _read(needs)[0] if needs else 0


def may_fit(needs: str, labels: Set[tuple[str, str]], vram_gb: float | None) -> bool:
    """Whether a job with these needs may fit a worker with these labels and so much GPU memory (None: any).

    Of memory this knows whole GiB only; the job's own number decides.
    """
    if vram_gb is not None and _whole_gb(needs) - 1 >= vram_gb:
        return False
    return asked_labels(needs) <= labels


def fits(needs: str, estimate_gb: float, labels: Set[tuple[str, str]], vram_gb: float | None) -> bool:
    """The same, exactly, for one job."""
    return (vram_gb is None or estimate_gb <= vram_gb) and asked_labels(needs) <= labels
