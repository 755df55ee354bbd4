"""Between rows of a store and the structs that the rest of the coordinator sees."""

from __future__ import annotations

import hashlib
from typing import Any, Protocol

import msgspec

from coordinator.records import JobRecord, JobState, StoredFile, StoredInput, Submission
from coordinator.store.base import Failing, Outcome
from coordinator.store.needs import needs_of
from protocol.faults import Fault, refuse

_pack = msgspec.msgpack.encode
# Made once: a decoder that is made per call costs more than the whole row.
_files = msgspec.msgpack.Decoder(tuple[StoredFile, ...]).decode
_inputs = msgspec.msgpack.Decoder(tuple[StoredInput, ...]).decode
_usage = msgspec.msgpack.Decoder(dict[str, float]).decode
_labels = msgspec.msgpack.Decoder(dict[str, str]).decode
_fault = msgspec.msgpack.Decoder(Fault).decode


class Row(Protocol):
    """A row by its columns' names, of whichever database."""

    def __getitem__(self, name: str, /) -> Any:
        """The value of a column."""


FORGOTTEN = b""  # the fingerprint of a job whose content was deleted
# Columns of a listing: no params, no result, which may be megabytes.
LIGHT = (
    "id, kind, model, state, tenant, attempt, created_ms, key_id, tries, started_ms, finished_ms, files, usage, fault, "
    "inputs, stream, streamed, worker, priority, deadline_at_ms, labels, vram_gb_estimate, max_attempts, traceparent, "
    "idempotency_key, alone, run_after_ms, needs, lot, dead"
)


# Tags of turns (`sql_turns`) from here on are those of jobs that start later: no turn yet, only the step to it.
LATER = 2**62
_TURN = 1000  # of a job that costs 1, for a tenant with the weight 1


def turn_step(cost: float = 1.0, weight: float = 1.0) -> int:
    """How far a job stands behind the one before it of the same tenant."""
    return max(1, round(_TURN * min(max(cost, 0.001), 86_400.0) / min(max(weight, 0.001), 1000.0)))


def _fingerprint(submission: Submission) -> bytes:
    """What makes two submissions the same request."""
    files = [(file.name, file.sha256) for file in submission.inputs]
    return hashlib.sha256(
        _pack([submission.kind, submission.asked or submission.model, submission.params, files])
    ).digest()


def same_request(row: Row, submission: Submission) -> JobRecord:
    """The job that a used idempotency key names. Raises FaultError(conflict) for another request, and for a job whose
    content was deleted: nobody can tell any more whether it was this request, and there is no answer to give."""
    if row["fingerprint"] == FORGOTTEN:
        raise refuse(
            "conflict",
            f"This idempotency key was used before: its job {row['id']} is {row['state']}, and its content was "
            "deleted, as this tenant keeps none; use a new key to run it again.",
            "idempotency_key",
        )
    if row["fingerprint"] != _fingerprint(submission):
        raise refuse(
            "conflict",
            "This idempotency key was used with another request; use a new key for a new request.",
            "idempotency_key",
        )
    return record(row)


def columns(job_id: str, submission: Submission, now: int, origin: str) -> dict[str, Any]:
    """Column -> value of a new row; `origin` is the coordinator that its client asked."""
    return {
        "id": job_id,
        "tenant": submission.tenant,
        "key_id": submission.key_id,
        "idempotency_key": submission.idempotency_key,
        "fingerprint": _fingerprint(submission),
        "kind": submission.kind,
        "model": submission.model,
        "max_attempts": submission.max_attempts,
        "priority": submission.priority,
        "run_after_ms": submission.run_after_ms if submission.run_after_ms > now else 0,
        "deadline_at_ms": max(now, submission.run_after_ms) + submission.deadline_ms if submission.deadline_ms else 0,
        "created_ms": now,
        "stream": int(submission.stream),
        "vram_gb_estimate": submission.vram_gb_estimate,
        "traceparent": submission.traceparent,
        "attended": int(submission.attended),
        "origin": origin,
        "labels": _pack(submission.labels),
        "needs": needs_of(submission.labels, submission.vram_gb_estimate),
        "lot": submission.lot,
        "params": submission.params,
        "inputs": _pack(submission.inputs),
    }


def failing(row: Row, *, streamed: bool) -> Failing:
    """What decides about a running row whose attempt failed, `streamed` or not."""
    return Failing(
        tries=row["tries"],
        max_attempts=row["max_attempts"],
        streamed=bool(row["streamed"] or streamed),
        deadline_at_ms=row["deadline_at_ms"],
        crashes=row["crashes"],
        spared=row["spared"],
    )


def succeeded(running: JobRecord, outcome: Outcome, now: int) -> JobRecord:
    """A running row after its success, as it would be read."""
    return msgspec.structs.replace(
        running,
        state="succeeded",
        result=outcome.result,
        files=outcome.files,
        usage=outcome.usage,
        finished_ms=now,
        fault=None,
    )


def files_of(column: Any) -> tuple[StoredFile, ...]:
    """What stands in the column `files`."""
    return _files(column) if column else ()


def record(row: Row, *, light: bool = False) -> JobRecord:
    """The row as others see it; `light` rows have only the columns of `LIGHT`."""
    state: JobState = "queued" if row["state"] == "offered" else row["state"]
    return JobRecord(
        id=row["id"],
        kind=row["kind"],
        model=row["model"],
        state=state,
        tenant=row["tenant"],
        attempt=row["attempt"],
        created_ms=row["created_ms"],
        params=b"" if light else row["params"],
        key_id=row["key_id"],
        tries=row["tries"],
        started_ms=row["started_ms"],
        finished_ms=row["finished_ms"],
        result=None if light else row["result"],
        files=files_of(row["files"]),
        usage=_usage(row["usage"]) if row["usage"] else {},
        # A job that waits for its next try has had a fault, but is not at fault yet.
        fault=_fault(row["fault"]) if state in ("failed", "cancelled") and row["fault"] else None,
        inputs=_inputs(row["inputs"]),
        stream=bool(row["stream"]),
        streamed=bool(row["streamed"]),
        worker=row["worker"],
        priority=row["priority"],
        deadline_at_ms=row["deadline_at_ms"],
        labels=_labels(row["labels"]),
        vram_gb_estimate=row["vram_gb_estimate"],
        max_attempts=row["max_attempts"],
        traceparent=row["traceparent"],
        idempotency_key=row["idempotency_key"],
        alone=bool(row["alone"]),
        run_after_ms=row["run_after_ms"],
        needs=row["needs"],
        lot=row["lot"],
        dead=bool(row["dead"]),
        origin="" if light else row["origin"],
        gateway="" if light else row["gateway"],
    )
