"""What counts, whose it is, and how it is shown: without a store."""

from __future__ import annotations

import csv
import io

import pytest

from coordinator.records import JobRecord
from coordinator.usage import report as usage
from protocol.faults import FaultError

DAY = 20_000  # 2024-10-04
ROW = dict.fromkeys(usage.AMOUNTS, 0) | {"day": DAY, "tenant": "t", "key_id": "k", "worker": "w", "kind": "llm"}
ROW |= {"model": "m", "succeeded": 2, "failed": 1, "tokens_in": 7, "audio_ms": 1500, "gpu_ms": 2500}


def job(**fields: object) -> JobRecord:
    base = {"id": "j", "kind": "llm", "model": "m", "state": "succeeded", "tenant": "t", "attempt": 1}
    return JobRecord(**{**base, "created_ms": 0, "params": b"", **fields})  # type: ignore[arg-type]


def test_amounts_are_whole_and_bounded() -> None:
    used = {"audio_seconds": 0.0004, "prompt_tokens": 1e300, "images": -3.0, "frames": float("nan")}
    found = usage.amounts(job(usage=used, started_ms=100, finished_ms=350))
    assert (found["succeeded"], found["failed"], found["cancelled"]) == (1, 0, 0)
    assert (found["audio_ms"], found["tokens_in"], found["images"], found["frames"]) == (0, usage.MOST, 0, 0)
    assert (found["busy_ms"], found["gpu_ms"]) == (250, 250)
    assert all(type(value) is int for value in found.values())


def test_a_job_that_never_started_held_nothing() -> None:
    assert usage.amounts(job(state="cancelled", finished_ms=9))["busy_ms"] == 0


def test_a_late_word_makes_the_sum_what_it_would_have_been() -> None:
    before = job(state="cancelled", started_ms=0, finished_ms=100)
    after = job(state="cancelled", started_ms=0, finished_ms=100, usage={"compute_ms": 30.0, "images": 2.0})
    first, late, whole = usage.amounts(before), usage.late_amounts(after), usage.amounts(after)
    assert {name: first[name] + late[name] for name in first} == whole


def test_rows_of_one_owner_are_one_and_in_order() -> None:
    owners = [usage.whose(job(tenant=name), DAY * usage.DAY_MS + 5) for name in ("b", "a", "b")]
    rows = usage.added_up((owner, usage.amounts(job())) for owner in owners)
    assert [(row["day"], row["tenant"], row["succeeded"]) for row in rows] == [(DAY, "a", 1), (DAY, "b", 2)]


def test_a_row_is_shown_in_seconds_and_days() -> None:
    shown = usage.shown(ROW, ("day", "key"))
    assert shown["day"] == "2024-10-04"
    assert shown["key"] == "k"
    assert (shown["jobs"], shown["audio_s"], shown["gpu_s"], shown["tokens_in"]) == (3, 1.5, 2.5, 7)
    assert list(shown) == ["day", "key", *usage.SHOWN]


@pytest.mark.parametrize("name", ["=1+2", "+x", "-x", "@SUM(A1)", "\tx", "\rx"])
def test_no_cell_of_the_csv_is_a_formula(name: str) -> None:
    found = usage.report([ROW | {"worker": name, "model": 'a"b,c\nd'}], (DAY, DAY), ("worker", "model"))
    header, line = csv.reader(io.StringIO(usage.as_csv(found), newline=""))
    assert header == ["worker", "model", *usage.SHOWN]
    assert line[:3] == [f"'{name}", 'a"b,c\nd', "3"]


def test_without_days_it_is_the_last_thirty() -> None:
    assert usage.span("", "", DAY * usage.DAY_MS) == (DAY - 29, DAY)
    assert usage.span("2024-10-01", "2024-10-01", 0) == (DAY - 3, DAY - 3)


@pytest.mark.parametrize(
    ("begin", "end", "field"),
    [
        ("2024-13-01", "", "from"),
        ("", "20241001", "to"),
        ("2024-10-02", "2024-10-01", "from"),
        ("1000-01-01", "", "from"),
    ],
)
def test_what_is_no_span_is_refused(begin: str, end: str, field: str) -> None:
    with pytest.raises(FaultError) as caught:
        usage.span(begin, end, DAY * usage.DAY_MS)
    assert caught.value.fault.field == field


def test_groups_are_known_names_each_once() -> None:
    assert usage.groups("worker, day,worker") == ("worker", "day")
    assert usage.groups("") == ()
    with pytest.raises(FaultError, match="'prompt' is none of"):
        usage.groups("prompt")
