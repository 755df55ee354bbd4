from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engines.llm.text import TextStream


def pieces(stops: list[str], parts: list[bytes]) -> list[str]:
    stream = TextStream(stops)
    return [*(stream.feed(part) for part in parts), stream.feed(b"", final=True)]


def test_split_characters_wait_for_their_end() -> None:
    assert pieces([], [b"a\xe2", b"\x98", b"\x83b"]) == ["a", "", "\u2603b", ""]


def test_unfinished_characters_come_out_as_replacement() -> None:
    assert pieces([], [b"a\xe2\x98"]) == ["a", "\ufffd"]


def test_the_beginning_of_a_stop_string_is_held_back() -> None:
    assert pieces(["stop"], [b"a s", b"t", b"ay"]) == ["a ", "", "stay", ""]


def test_text_ends_before_the_stop_string() -> None:
    assert pieces(["stop"], [b"a st", b"op b", b"c"]) == ["a ", "", "", ""]


def test_the_first_of_several_stops_counts() -> None:
    assert pieces(["zz", "b"], [b"abzz"]) == ["a", ""]


def test_held_back_text_comes_out_at_the_end() -> None:
    assert pieces(["xyz"], [b"axy"]) == ["a", "xy"]


@given(st.text(max_size=60), st.lists(st.text(min_size=1, max_size=4), max_size=3), st.data())
def test_any_split_gives_the_text_before_the_first_stop(text: str, stops: list[str], data: st.DataObject) -> None:
    raw, parts = text.encode(), []
    while raw:
        size = data.draw(st.integers(1, len(raw)))
        parts.append(raw[:size])
        raw = raw[size:]
    ends = [at for stop in stops if (at := text.find(stop)) >= 0]
    found = "".join(pieces(stops, parts))
    # A shorter stop may be seen before a longer one that begins earlier is whole.
    assert text.startswith(found)
    assert found == text if not ends else len(found) >= min(ends)
    assert not any(stop in found for stop in stops)


@pytest.mark.parametrize("final", [True, False])
def test_nothing_comes_after_a_stop(final: bool) -> None:
    stream = TextStream(["."])
    assert stream.feed(b"a.b") == "a"
    assert stream.stopped
    assert stream.feed(b"c", final=final) == ""
