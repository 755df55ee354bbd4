"""Pages of lists."""

from __future__ import annotations

import pytest
from starlette.datastructures import QueryParams

from coordinator.bodies import page_size
from coordinator.openai.listing import cursor, page
from protocol.faults import FaultError


def test_a_page_knows_whether_there_are_more() -> None:
    found = [{"id": name} for name in "abc"]
    assert page(found, 2) == {
        "object": "list",
        "data": found[:2],
        "first_id": "a",
        "last_id": "b",
        "has_more": True,
    }
    assert page(found, 3)["has_more"] is False
    assert page([], 3) == {"object": "list", "data": [], "first_id": None, "last_id": None, "has_more": False}


def test_queries() -> None:
    assert (page_size(QueryParams(""), 20, 100), cursor(QueryParams(""))) == (20, "")
    assert (page_size(QueryParams("limit=7"), 20, 100), cursor(QueryParams("after=x"))) == (7, "x")
    for text in ("limit=0", "limit=101", "limit=-1", "limit=²", "limit=", "limit=99999999999999999999"):
        with pytest.raises(FaultError):
            page_size(QueryParams(text), 20, 100)
    with pytest.raises(FaultError):
        cursor(QueryParams("after=" + "x" * 201))
