"""What jobs used, added up: which amounts there are, whose they are, and how they are shown and exported.

An ended job is counted once, in the transaction that ends it: one row per day (UTC), tenant, key, worker, kind and
model. So the sums outlive the jobs, which are deleted after their retention. All amounts are whole numbers
(milliseconds, tokens), so that sums do not depend on the order in which they were made.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, date, datetime, timedelta
from typing import Any

from coordinator.records import JobRecord
from protocol.faults import refuse

DAY_MS = 86_400_000
MOST = 10**12  # of one amount of one job: what a hostile worker says must not overflow a sum
DIMENSIONS = ("day", "tenant", "key_id", "worker", "kind", "model")
OUTCOMES = ("succeeded", "failed", "cancelled")
# Column -> the key of a result's usage, and how much of the column one of it is.
_MEASURED: dict[str, tuple[str, int]] = {
    "tokens_in": ("prompt_tokens", 1),
    "tokens_out": ("completion_tokens", 1),
    "tokens_cached": ("cached_tokens", 1),
    "audio_ms": ("audio_seconds", 1000),
    "images": ("images", 1),
    "frames": ("frames", 1),
    "characters": ("characters", 1),
    "documents": ("documents", 1),
}
# The other way round: a result's key -> its column and how much of that one is.
_COLUMN = {key: (column, scale) for column, (key, scale) in _MEASURED.items()} | {"compute_ms": ("gpu_ms", 1)}
AMOUNTS = (*OUTCOMES, *_MEASURED, "gpu_ms", "busy_ms")
GROUPS = {name.removesuffix("_id"): name for name in ("tenant", "key_id", "worker", "model", "day", "kind")}
SHOWN = ("jobs", *OUTCOMES, *(name.replace("_ms", "_s") for name in AMOUNTS[len(OUTCOMES) :]))
MAX_DAYS = 3660
_EPOCH = date(1970, 1, 1)
_FORMULA = ("=", "+", "-", "@", "\t", "\r")

Whose = tuple[int, str, str, str, str, str]  # the values of DIMENSIONS


def amounts(record: JobRecord) -> dict[str, int]:
    """What an ended job counts for.

    `busy_ms` is how long its last attempt held a slot, from its accept to its end, as the coordinator saw it; `gpu_ms`
    is the worker's `compute_ms`, and where the worker said none (a job that failed says none), the same as `busy_ms`.
    Both count jobs that share an engine one by one. Attempts before the last were counted when they ended, for the
    workers that had them: see `attempt_amounts`.
    """
    return dict.fromkeys(AMOUNTS, 0) | counted(record)


def counted(record: JobRecord) -> dict[str, int]:
    """`amounts` without those that are 0: thousands of jobs may end in a second."""
    busy = _busy_ms(record)
    found = {record.state: 1, "busy_ms": busy, "gpu_ms": busy}
    for key, value in record.usage.items():
        if (measured := _COLUMN.get(key)) is not None:
            found[measured[0]] = _whole(value * measured[1])
    return found


def attempt_amounts(began_ms: int | None, ended_ms: int) -> dict[str, int]:
    """What an attempt counts for that failed and whose job is tried again: its time, and no job.

    It says nothing of what it used, so `gpu_ms` is what the coordinator saw.
    """
    busy = min(MOST, max(0, ended_ms - began_ms)) if began_ms is not None else 0
    return {"busy_ms": busy, "gpu_ms": busy} if busy else {}


def late_amounts(record: JobRecord) -> dict[str, int]:
    """What a cancelled job counts for besides, when its worker says later what it had used."""
    found = counted(record)
    late = {name: found.get(name, 0) for name in (*_MEASURED, "gpu_ms")}
    return dict.fromkeys(AMOUNTS, 0) | late | {"gpu_ms": late["gpu_ms"] - found["busy_ms"]}


def added_up(used: Iterable[tuple[Whose, Mapping[str, int]]]) -> list[dict[str, Any]]:
    """One row per owner, in the order of the owners: whoever writes rows writes them in one order."""
    sums: dict[Whose, dict[str, int]] = {}
    for whose, amount in used:
        if (known := sums.get(whose)) is None:
            known = sums[whose] = dict.fromkeys(AMOUNTS, 0)
        for name, value in amount.items():
            known[name] += value
    return [dict(zip(DIMENSIONS, whose, strict=True)) | sums[whose] for whose in sorted(sums)]


def whose(record: JobRecord, now_ms: int) -> Whose:
    """Who a job is counted for, today."""
    return (now_ms // DAY_MS, record.tenant, record.key_id, record.worker, record.kind, record.model)


def _busy_ms(record: JobRecord) -> int:
    if record.started_ms is None or record.finished_ms is None:
        return 0
    return min(MOST, max(0, record.finished_ms - record.started_ms))


def _whole(value: float) -> int:
    return min(MOST, max(0, round(value))) if math.isfinite(value) else 0


# ---- asking -------------------------------------------------------------------------------------------------


def day_of(text: str, field: str) -> int:
    """YYYY-MM-DD as days since the epoch. Raises FaultError(invalid_parameter)."""
    try:
        if len(text) != len("2026-01-31"):
            raise ValueError
        return (date.fromisoformat(text) - _EPOCH).days
    except ValueError:
        raise refuse("invalid_parameter", f"{field}: Expected a day such as 2026-01-31 (UTC).", field) from None


def span(begin: str, end: str, now_ms: int) -> tuple[int, int]:
    """First day and last day, both counted; without them, the last 30 days. Raises FaultError(invalid_parameter)."""
    today = now_ms // DAY_MS
    last = day_of(end, "to") if end else today
    first = day_of(begin, "from") if begin else last - 29
    if not first <= last < first + MAX_DAYS:
        raise refuse("invalid_parameter", f"from: Expected a day before `to`, at most {MAX_DAYS} days.", "from")
    return first, last


def groups(text: str) -> tuple[str, ...]:
    """`group_by` as names of GROUPS, each once. Raises FaultError(invalid_parameter)."""
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    if wrong := [name for name in names if name not in GROUPS]:
        expected = ", ".join(GROUPS)
        raise refuse("invalid_parameter", f"group_by: {wrong[0]!r} is none of {expected}.", "group_by")
    return names


def day_text(day: int) -> str:
    """Days since the epoch as YYYY-MM-DD."""
    return (_EPOCH + timedelta(days=day)).isoformat()


# ---- showing ------------------------------------------------------------------------------------------------


def shown(row: Mapping[str, Any], group_by: Sequence[str]) -> dict[str, Any]:
    """A row of sums as an answer has it: seconds instead of milliseconds, days as text."""
    found: dict[str, Any] = {name: row[GROUPS[name]] for name in group_by}
    if "day" in found:
        found["day"] = day_text(found["day"])
    found["jobs"] = sum(row[name] for name in OUTCOMES)
    for name in AMOUNTS:
        found[name.replace("_ms", "_s")] = row[name] / 1000 if name.endswith("_ms") else row[name]
    return found


def report(rows: Sequence[Mapping[str, Any]], days: tuple[int, int], group_by: Sequence[str]) -> dict[str, Any]:
    """The answer of GET /v1/usage."""
    return {
        "object": "list",
        "from": day_text(days[0]),
        "to": day_text(days[1]),
        "group_by": list(group_by),
        "data": [shown(row, group_by) for row in rows],
    }


def as_csv(found: Mapping[str, Any]) -> str:
    """A report as RFC 4180 text with a header line."""
    out = io.StringIO()
    writer = csv.writer(out)
    names = [*found["group_by"], *SHOWN]
    writer.writerow(names)
    writer.writerows([_cell(row[name]) for name in names] for row in found["data"])
    return out.getvalue()


def _cell(value: object) -> object:
    """A cell that no spreadsheet takes for a formula: names of models and workers are other people's text."""
    return f"'{value}" if isinstance(value, str) and value.startswith(_FORMULA) else value


def file_name(found: Mapping[str, Any], now_s: float) -> str:
    """Of a download."""
    made = datetime.fromtimestamp(now_s, UTC).strftime("%Y%m%d")
    return f"usage-{found['from']}-{found['to']}-made-{made}.csv"
