"""What lists of files and of batches share: the query of a page, and its shape."""

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
