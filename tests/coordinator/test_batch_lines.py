"""Lines of a batch: reading them in pieces, and what is said of each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from coordinator import batch_lines
from coordinator.batch_lines import parse_line, planned, read_lines, written, wrong_lines
from coordinator.records import JobRecord
from coordinator.store.shelf import BatchItem
from protocol.faults import Fault, FaultError

CHAT = "/v1/chat/completions"
BODY = {"model": "m", "messages": [{"role": "user", "content": "x"}]}


def raw(**more: Any) -> bytes:
    return json.dumps({"custom_id": "c", "method": "POST", "url": CHAT, "body": BODY, **more}).encode()


def all_lines(path: Path, count: int) -> list[bytes]:
    found: list[bytes] = []
    offset = 0
    while True:
        lines, offset = read_lines(lambda: path.open("rb"), offset, count)
        if not lines:
            return found
        found += lines


@pytest.mark.parametrize("count", [1, 2, 3, 100])
@pytest.mark.parametrize("text", [b"a\nb\n\nc", b"a\r\nb\nc\n", b"\n\na\nb\nc\n\n \n"])
def test_lines_come_in_pieces_of_any_size(tmp_path: Path, count: int, text: bytes) -> None:
    path = tmp_path / "in"
    path.write_bytes(text)
    assert all_lines(path, count) == [b"a", b"b", b"c"]


def test_blank_lines_are_no_end(tmp_path: Path) -> None:
    path = tmp_path / "in"
    path.write_bytes(b"a\n" + b"\n" * 1000 + b"b")
    assert all_lines(path, 1) == [b"a", b"b"]


def test_a_line_without_an_end_costs_its_limit_at_most(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_lines, "LINE_BYTES", 10)
    path = tmp_path / "in"
    path.write_bytes(b"x" * 95 + b"\nshort\n" + b"y" * 50)
    found = all_lines(path, 100)
    assert [len(line) for line in found] == [11, 5, 11]
    with pytest.raises(FaultError, match="exceeds"):
        parse_line(found[0], CHAT)


def test_pages_are_bounded_in_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_lines, "LINE_BYTES", 10)
    path = tmp_path / "in"
    path.write_bytes(b"12345\n" * 10)
    lines, offset = read_lines(lambda: path.open("rb"), 0, 100)
    assert (len(lines), offset) == (2, 12)


def test_custom_ids_are_unique_over_all_pages() -> None:
    seen: set[str] = set()
    assert list(wrong_lines([raw()], 0, CHAT, seen)) == []
    [(number, fault)] = wrong_lines([raw(custom_id="d"), raw()], 1, CHAT, seen)
    assert (number, fault.field) == (3, "custom_id")


@pytest.mark.parametrize("body", [{"stream": True}, {"n": 2}, {"colour": 1}])
def test_bodies_are_judged_as_their_route_does(body: dict[str, Any]) -> None:
    with pytest.raises(FaultError) as refused:
        planned(CHAT, {**BODY, **body})
    assert refused.value.fault.field == next(iter(body))


def job(state: Any, **more: Any) -> JobRecord:
    return JobRecord(
        id="job_1", kind="llm", model="m", state=state, tenant="t", attempt=1, created_ms=0, params=b"", **more
    )


@pytest.mark.parametrize(
    ("item", "record", "end", "good", "status", "code"),
    [
        (None, None, "expired", False, None, "batch_expired"),
        (None, None, "cancelled", False, None, "batch_cancelled"),
        (BatchItem(0, "job_1"), None, "completed", False, 500, "internal"),
        (BatchItem(0, fault=Fault("unsupported", "n: No.", "n")), None, "completed", False, 400, "unsupported"),
        (BatchItem(0, "job_1"), job("succeeded", result=b"\x80"), "completed", True, 200, None),
        (BatchItem(0, "job_1"), job("succeeded", result=b"\x80"), "cancelled", True, 200, None),
        (BatchItem(0, "job_1"), job("succeeded", result=b"\xc1"), "completed", False, 500, "engine_protocol"),
        (
            BatchItem(0, "job_1"),
            job("failed", fault=Fault("deadline_exceeded", "Late.")),
            "expired",
            False,
            None,
            "batch_expired",
        ),
        (
            BatchItem(0, "job_1"),
            job("failed", fault=Fault("deadline_exceeded", "Late.")),
            "completed",
            False,
            504,
            "deadline_exceeded",
        ),
        (BatchItem(0, "job_1"), job("running"), "cancelled", False, None, "batch_cancelled"),
        (
            BatchItem(0, "job_1"),
            job("failed", fault=Fault("invalid_parameter", "max_tokens: No.", "max_tokens")),
            "cancelled",
            False,
            400,
            "invalid_parameter",
        ),
    ],
)
def test_what_is_said_of_a_line(item: Any, record: Any, end: Any, good: bool, status: int | None, code: Any) -> None:
    line = written("batch_x", CHAT, 7, raw(), item, record, end)
    value = json.loads(line.data)
    assert (line.good, value["custom_id"], value["id"]) == (good, "c", "batch_req_x_7")
    assert line.data.endswith(b"\n")
    if status is None:
        assert (value["response"], value["error"]["code"]) == (None, code)
        return
    assert value["error"] is None
    assert value["response"]["status_code"] == status
    assert value["response"]["body"].get("error", {}).get("code") == code
