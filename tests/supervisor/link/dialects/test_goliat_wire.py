"""What a dashboard says is read leniently, and what it is told has the shape of its contract."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given as forall
from hypothesis import strategies as st

from protocol.ids import is_safe_id
from supervisor.link.dialects import goliat_wire as words
from supervisor.link.dialects.goliat_wire import Given, Odd, Row, Slip

NESTED = {"id": "a1", "super_study_id": "s1", "split_index": 3, "config_url": "/c/1", "created_at": "2026"}
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
NAMES = ("assigned", "assignment", "id", "config", "config_url", "split_index", "super_study_id", "index", "status")


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ({"assigned": False}, None),
        ({}, None),
        ({"assigned": True, "assignment": NESTED}, Given(Slip(id="a1", study="s1", index=3), None, "/c/1")),
        ({"id": "a1", "config": "x.json", "config_url": "/c/1"}, Given(Slip(id="a1"), None, "/c/1")),
        (
            {"config": "http://h/c", "split_index": 2, "super_study_id": "s"},
            Given(Slip(id="s.2", study="s", index=2), None, "http://h/c"),
        ),
        ({"assignment": {"id": 7, "config": {"a": 1}}}, Given(Slip(id="7"), b'{"a":1}', "")),
        ({"id": "a", "config": "key: value"}, Given(Slip(id="a"), b"key: value", "")),
        ({"id": "a", "configUrl": "c", "splitIndex": 0}, Given(Slip(id="a", index=0), None, "c")),
    ],
)
def test_an_assignment_is_read_in_both_shapes(reply: object, expected: Given | None) -> None:
    assert words.given(reply) == expected


@pytest.mark.parametrize("reply", [None, [], "x", {"assigned": True}, {"id": "a"}, {"assignment": {"id": "a"}}])
def test_an_assignment_that_cannot_be_used_is_told(reply: object) -> None:
    with pytest.raises(Odd):
        words.given(reply)


def test_without_an_id_the_same_part_is_the_same_assignment() -> None:
    reply = {"config_url": "http://h/c", "config": 1, "split_index": 4}
    first, second = words.given(reply), words.given(dict(reply))
    assert first == second
    assert first is not None
    assert is_safe_id(first.slip.job)


def test_without_an_id_different_configs_are_different_assignments() -> None:
    replies = [{"config": {"n": 1}, "split_index": 0}, {"config": {"n": 2}, "split_index": 0}]
    replies += [{"config": "c.json", "config_url": f"http://h/{name}", "split_index": 0} for name in "ab"]
    replies.append({"config": {"n": 1}, "split_index": 1})
    assert len({found.slip.id for reply in replies if (found := words.given(reply)) is not None}) == 5


@forall(st.dictionaries(st.sampled_from(NAMES), JSON, max_size=6) | JSON)
def test_any_reply_is_read_or_odd(reply: object) -> None:
    for reading in (words.given, words.rows, words.row, lambda each: words.open_studies(each, "x")):
        for said in (reply, [reply]):
            try:
                reading(said)
            except Odd:
                pass


@forall(st.text(max_size=200))
def test_any_id_makes_a_job_id_that_may_stand_in_a_path(id_: str) -> None:
    slip = Slip(id=id_)
    assert is_safe_id(slip.job)
    assert Slip.read(slip.text()) == slip


@pytest.mark.parametrize(
    "text", ["", "x", "{}", '{"job": "j", "attempt": 1, "kind": "llm", "model": "m"}', "/v1/x/{name}"]
)
def test_a_slip_of_another_dialect_is_none(text: str) -> None:
    with pytest.raises(ValueError, match="no slip"):
        Slip.read(text)


def test_studies_that_may_have_something_to_do() -> None:
    def study(id_: str, name: str = "x", status: str = "RUNNING", *states: str) -> dict[str, object]:
        return {"id": id_, "name": name, "status": status, "assignments": [{"status": state} for state in states]}

    listed = [
        study("s1", "x", "RUNNING", "COMPLETED", "PENDING"),
        study("s2", "xy", "RUNNING", "PENDING"),
        study("s3", "x", "CANCELLED", "PENDING"),
        study("s4", "x", "RUNNING", "RUNNING"),
        {"id": "s5", "name": "x", "status": "PENDING"},
        7,
    ]
    assert words.open_studies(listed, "x") == ["s1", "s5"]


def test_rows_come_by_their_index_and_not_by_their_place() -> None:
    listed = [
        {"id": "b", "index": 2, "status": "PENDING", "splitConfig": "text"},
        {"id": "c", "index": 0, "status": "RUNNING", "workerId": "w1", "splitConfig": {"a": 1}},
        {"id": "d", "status": "PENDING"},
        {"id": "a", "index": 1, "status": "PENDING", "splitConfig": None},
    ]
    rows = words.rows(listed)
    assert rows == [
        Row("c", 0, "RUNNING", "w1", b'{"a":1}'),
        Row("a", 1, "PENDING", "", None),
        Row("b", 2, "PENDING", "", b"text"),
    ]
    assert [each.id for each in words.pending(rows)] == ["a", "b"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("hello", {"type": "status", "message": "hello", "log_type": "default", "timestamp": 1.0}),
        (
            "2026-01-01 WARNING: hot",
            {"type": "status", "message": "2026-01-01 WARNING: hot", "log_type": "warning", "timestamp": 1.0},
        ),
        (
            '{"type": "overall_progress", "current": 1, "total": 4}',
            {"type": "overall_progress", "current": 1, "total": 4},
        ),
        (
            '{"type": "status", "message": "m", "log_type": "success"}',
            {"type": "status", "message": "m", "log_type": "success", "timestamp": 1.0},
        ),
        (
            '{"type": "print", "message": "m"}',
            {"type": "status", "message": "m", "log_type": "verbose", "timestamp": 1.0},
        ),
    ],
)
def test_what_a_line_means(text: str, expected: dict[str, object]) -> None:
    assert words.said(text, 1.0) == expected


@pytest.mark.parametrize("kind", ["finished", "fatal_error", "memory_error", "log_batch", "", 7, None])
def test_a_line_cannot_say_how_the_study_ended(kind: object) -> None:
    text = msgspec.json.encode({"type": kind, "exit_code": 0}).decode()
    assert words.said(text, 1.0)["type"] == "status"


def test_a_long_line_is_cut() -> None:
    assert len(words.status("x" * 10_000, "info", 1.0)["message"]) == words.MAX_LINE_CHARS


@forall(st.text(max_size=50) | JSON.map(lambda value: msgspec.json.encode(value).decode()))
def test_any_line_can_be_told(text: str) -> None:
    message = words.said(text, 1.0)
    assert message["type"] in ("status", *words._STATES)
    words.state_of(message)
