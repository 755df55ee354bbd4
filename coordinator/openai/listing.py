"""What lists of files, batches and videos share: the query of a page, and its shape."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from starlette.datastructures import QueryParams

from coordinator.bodies import MAX_NAME_CHARS
from protocol.faults import refuse


def cursor(query: QueryParams) -> str:
    """The query's `after`: an id, or "". Raises FaultError(invalid_parameter)."""
    text = query.get("after", "")
    if len(text) > MAX_NAME_CHARS:
        raise refuse("invalid_parameter", "after: Expected an id.", "after")
    return text


def oldest_first(query: QueryParams) -> bool:
    """The query's `order`: "desc" is what a list comes in. Raises FaultError(invalid_parameter)."""
    order = query.get("order", "desc")
    if order not in ("asc", "desc"):
        raise refuse("invalid_parameter", "order: Expected asc or desc.", "order")
    return order == "asc"


def page(found: Sequence[dict[str, Any]], limit: int) -> dict[str, Any]:
    """A list object of up to `limit` of what was found; one more than that shows that there are more."""
    data = found[:limit]
    return {
        "object": "list",
        "data": data,
        "first_id": data[0]["id"] if data else None,
        "last_id": data[-1]["id"] if data else None,
        "has_more": len(found) > limit,
    }
