"""Placement: on which devices a model may lie. Pure.

A model lies whole on one device, or, where its engine can split tensors, in shares on several: then the fewest
devices are taken, and each gets a share in proportion to its room, on top of what every process takes of a device
for itself. Nothing here asks what is loaded: these are the places that an empty box would have, and the scheduler
picks among them by what is free, whom it would have to end, and who works there already.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import msgspec

# CUDA's context and its libraries' workspaces, before the first weight.
CONTEXT_BYTES = 400 * 2**20
# A box has at most 16 GPUs; beyond this many a split is slower than another box.
MOST_SHARES = 8


class Space(msgspec.Struct, frozen=True, kw_only=True):
    """One device, empty.

    Attributes:
        room_bytes: what an empty device has for models: its size without the margin.
        speed: relative to the box's slowest; only orders places that are equal otherwise.
    """

    uuid: str
    room_bytes: int
    speed: float = 1.0


Place = Mapping[str, int]
"""Device -> bytes that the model takes there."""


def places(
    need_bytes: int, spaces: Sequence[Space], *, split: bool = False, allowed: Sequence[str] = (), elastic: bool = False
) -> tuple[Place, ...]:
    """Every place that could hold a model on an empty box; empty when none could.

    Args:
        need_bytes: what it takes of one device when it lies there whole.
        split: whether its engine can lie on several; then it does when it must.
        allowed: its devices by UUID; empty means any.
        elastic: the need is a mere estimate: a device that is smaller is taken whole instead of refused.
    """
    usable = [space for space in spaces if not allowed or space.uuid in allowed]
    whole = tuple({space.uuid: need_bytes} for space in usable if need_bytes <= space.room_bytes)
    if whole or not usable:
        return whole
    if split and (shares := _split(need_bytes, usable)):
        return shares
    if elastic:
        largest = max(usable, key=lambda space: space.room_bytes)
        return ({largest.uuid: largest.room_bytes},)
    return ()


def _split(need_bytes: int, spaces: Sequence[Space]) -> tuple[Place, ...]:
    """All places on the fewest devices."""
    for count in range(2, min(MOST_SHARES, len(spaces)) + 1):
        found = [shares for chosen in itertools.combinations(spaces, count) if (shares := _shares(need_bytes, chosen))]
        if found:
            # One box's GPUs mostly are alike, and then all sets are: the first few are enough to choose from.
            return tuple(found[:MOST_SHARES])
    return ()


def _shares(need_bytes: int, spaces: Sequence[Space]) -> dict[str, int]:
    """In proportion to the room; {} when these devices cannot hold it."""
    weights = max(0, need_bytes - CONTEXT_BYTES)
    rooms = {space.uuid: space.room_bytes - CONTEXT_BYTES for space in spaces}
    total = sum(rooms.values())
    if min(rooms.values()) <= 0 or weights > total:
        return {}
    return {uuid: CONTEXT_BYTES + -(-weights * room // total) for uuid, room in rooms.items()}


def never_fits(name: str, need_bytes: int, rooms: Mapping[str, int], margin_bytes: int) -> str:
    """The sentence for a model that no device here could hold. `rooms`: device -> what it has for models when empty."""
    largest = max(rooms.values(), default=0) + margin_bytes
    kept = f" ({_gib(margin_bytes)} of it stay free)" if margin_bytes else ""
    return f"{name} needs {_gib(need_bytes)} of GPU memory, and the largest GPU it may use has {_gib(largest)}{kept}"


def job_too_large(
    estimate_bytes: int, *, threshold_bytes: int = 0, rooms: Mapping[str, int] | None = None, split: bool = False
) -> str:
    """Why a job's own estimate (`vram_gb_estimate`) speaks against taking it; "" when nothing does.

    Args:
        estimate_bytes: what the job says it may need; 0 says nothing.
        threshold_bytes: the worker's `vram_threshold_gb`, the most that one job may need; 0 sets none. A threshold
            beyond what the box measures is clamped to it.
        rooms: device of the job's model -> what it has for models when empty; None or empty when not measured.
        split: whether the model may lie on all of them together.
    """
    if estimate_bytes <= 0:
        return ""
    if threshold_bytes and estimate_bytes > threshold_bytes:
        return (
            f"The job may need {_gib(estimate_bytes)} of GPU memory and this worker takes jobs up to "
            f"{_gib(threshold_bytes)} (vram_threshold_gb)."
        )
    if rooms:
        most = sum(rooms.values()) if split else max(rooms.values())
        if estimate_bytes > most:
            return f"The job may need {_gib(estimate_bytes)} of GPU memory and the model's GPU has {_gib(most)}."
    return ""


def _gib(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"
