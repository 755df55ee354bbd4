"""Events are the same however the stream is split; URLs of answers lead nowhere else; errors keep their words."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engines.server.calls import Call, Event, Origin, events, fault_of_error
from protocol.faults import FaultError

_STREAM = (
    "event: a\r\ndata: one\r\n\r\n: comment\ndata: x\rdata:  y\r\rdata\n\nid: 7\ndata: z\u2028é\n\ndata: cut".encode()
)
_EVENTS = [Event("a", "one"), Event("", "x\n y"), Event("", ""), Event("", "z\u2028é")]


@given(st.lists(st.integers(0, len(_STREAM)), max_size=12))
def test_any_split_gives_the_same_events(cuts):
    edges = [0, *sorted(cuts), len(_STREAM)]
    pieces = [_STREAM[left:right] for left, right in itertools.pairwise(edges)]
    assert list(events(pieces)) == _EVENTS


def test_an_endless_line_is_refused():
    with pytest.raises(FaultError, match="more than"):
        list(events(b"x" * 2**20 for _ in range(20)))


@pytest.mark.parametrize(
    ("url", "ours"),
    [
        ("data:image/png;base64,AA==", True),
        ("/file=x", True),
        ("file=x", True),
        ("http://app:7860/gradio_api/file=x", True),
        ("https://app:7860/x", False),
        ("http://app:7861/x", False),
        ("http://app:7860@evil/x", False),
        ("//evil/x", False),
        ("file:///etc/passwd", False),
        ("ftp://app:7860/x", False),
    ],
)
def test_which_urls_lead_back(url, ours):
    assert Call(Origin.at("http://app:7860")).is_ours(url) is ours


def test_inline_urls_need_no_server():
    call = Call(Origin.at("http://127.0.0.1:1"))
    assert call.fetch("data:text/plain;base64,YWI=") == b"ab"
    assert call.fetch("data:,a%20b") == b"a b"
    with pytest.raises(FaultError, match="not base64"):
        call.fetch("data:;base64,!!")
    with pytest.raises(FaultError, match="another server"):
        call.fetch("http://evil/x")


@pytest.mark.parametrize(
    "body", [b"", b"\xff\xfe", b"null", b"[1]", b'"x"', b'{"error": 5}', b'{"error": {"message": 3}}']
)
@pytest.mark.parametrize("status", [400, 404, 418, 500, 503])
def test_any_error_body_makes_a_fault(status, body):
    fault = fault_of_error(status, body)
    assert fault.message
    assert fault.detail == {"status": status}
