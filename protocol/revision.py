"""Revisions of the two wires and how peers agree on one.

Fields are only ever added, and unknown fields are ignored; a new tag or enum value needs a revision.
Each side states the lowest and the highest it speaks; the highest common one is used.

Link: 1 is the first; 2 has `order` and `order_done`.
"""

from __future__ import annotations

import msgspec

LINK_SUBPROTOCOL = "bulkhead.v1"


class Span(msgspec.Struct, frozen=True):
    """An inclusive span of revisions."""

    low: int
    high: int


ENGINE_WIRE = Span(1, 1)
LINK_WIRE = Span(1, 2)
ORDERS = 2  # from this link revision on


def agree(ours: Span, theirs: Span) -> int | None:
    """Return the highest common revision, or None when there is none."""
    best = min(ours.high, theirs.high)
    return best if best >= max(ours.low, theirs.low) else None
