"""Where a reader goes on."""

from __future__ import annotations

import pytest
import trio

from supervisor.control.exchange import KEEP_ALIVE_S, Refused, Request
from supervisor.control.follow import Cursor, cursor, numbered, or_quiet, wanted


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("0", Cursor(0)),
        ("7", Cursor(7)),
        ("ab-7", Cursor(7)),
        ("ab-10", Cursor(10)),
        ("ab-11", Cursor(0, lost=True)),  # not given yet, so not by us
        ("11", Cursor(0, lost=True)),
        ("cd-7", Cursor(0, lost=True)),
        ("cd-0", Cursor(0, lost=True)),
    ],
)
def test_an_id(text, found):
    assert cursor(text, 10, "ab") == found


@pytest.mark.parametrize("text", ["", "-1", "x", "ab-", "AB-1", "ab-1-2", "1.5", "٣", "9" * 19, "ab-1\n", " 1"])
def test_no_id(text):
    with pytest.raises(Refused, match="since must be an id") as refusal:
        cursor(text, 10, "ab")
    assert refusal.value.status == 400


def test_the_query_goes_before_the_header():
    request = Request("GET", "/", headers={"last-event-id": "ab-3"})
    assert wanted(request, "") == "ab-3"
    assert wanted(request, "ab-4") == "ab-4"
    assert wanted(Request("GET", "/"), "") == ""


def test_a_piece():
    assert numbered("tick", {"a": 1}, 4, "ab") == b'id: ab-4\nevent: tick\ndata: {"a":1}\n\n'


async def test_a_stream_is_not_quiet_for_ever(autojump_clock):
    before = trio.current_time()
    soon, never = trio.sleep(1), trio.sleep_forever()  # noqa: ASYNC105 - awaited there
    assert await or_quiet(soon) is True
    assert await or_quiet(never) is False
    assert trio.current_time() - before == 1 + KEEP_ALIVE_S
