"""From a submission to an HTTP answer: wait for the end, and cancel when the client leaves.

A job of a synchronous route lives as long as its client listens. The exception is a request that brought an
idempotency key: its client means to come back for the answer, so the job goes on without it.

Nobody waits in silence for a model that loads. After `Limits.begin_s`, or what the request's header
`x-bulkhead-begin-s` says instead, a stream of events begins with comment lines that tell how far the load is. A plain
request, and a stream of bytes, in which no such word may stand, is answered 503 with Retry-After, and its job goes on
waiting a little longer, so that the load is not given up.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import anyio
import msgspec
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect, Request
from starlette.types import Receive

from coordinator import deliveries
from coordinator.bodies import in_callers_words
from coordinator.errors import JOB_ID
from coordinator.records import JobEnded, JobEvent, JobProgress, JobRecord, Submission
from coordinator.services import Services, services
from protocol.faults import Fault, FaultError, refuse
from protocol.framing import UNDECODABLE
from protocol.work import RESULTS, FreeResult

log = logging.getLogger(__name__)

NO_NAMES: Mapping[str, str] = {}
BEGIN_S = "x-bulkhead-begin-s"  # header of requests
MAX_BEGIN_S = 3600.0
LOADING = "model_loading"
LOADING_RETRY_S = 5
HOLD_S = 30.0  # a client that was told to come again in 5 s has come by then
CANCEL_S = 5.0  # bound on telling the dispatcher that nobody listens any more

T = TypeVar("T")


# ---- waiting ------------------------------------------------------------------------------------------------


async def while_connected(receive: Receive, work: Callable[[], Awaitable[T]]) -> T:
    """Run `work`, but only as long as the client is there.

    Args:
        receive: of a request whose body was read to its end.
        work: cancelled when the client leaves.

    Raises:
        ClientDisconnect: the client left; whatever `work` raises otherwise, not wrapped in a group.
    """
    outcome: list[T] = []
    failure: Exception | None = None
    async with anyio.create_task_group() as group:

        async def watch() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            group.cancel_scope.cancel()

        group.start_soon(watch)
        try:
            outcome.append(await work())
        except Exception as error:
            failure = error
        group.cancel_scope.cancel()
    if failure is not None:
        raise failure
    if not outcome:
        raise ClientDisconnect
    return outcome[0]


@asynccontextmanager
async def watched_job(
    parts: Services, submission: Submission
) -> AsyncIterator[tuple[JobRecord, AsyncIterator[JobEvent]]]:
    """Submit and watch; a job that has not ended when the block is left is cancelled, shielded and bounded.

    One whose client was told that its model is loading stays until the load is over, so that somebody waits for it.
    """
    ended = False
    submission = msgspec.structs.replace(submission, attended=not submission.idempotency_key)
    async with parts.dispatcher.submit_and_watch(submission) as (record, events):

        async def noted() -> AsyncIterator[JobEvent]:
            nonlocal ended
            async for event in events:
                if isinstance(event, JobEnded):
                    ended = True
                    deliveries.note_job(event.record)
                yield event

        try:
            yield record, noted()
        except FaultError as error:
            if error.fault.code == LOADING and not ended and not submission.idempotency_key:
                ended = True
                parts.progress.hold(record.id, submission.tenant, HOLD_S)
            raise
        finally:
            if not ended and not submission.idempotency_key:
                with anyio.move_on_after(CANCEL_S, shield=True):
                    await parts.dispatcher.cancel(record.id, submission.tenant, "the client disconnected")


async def finished(request: Request, submission: Submission, names: Mapping[str, str] = NO_NAMES) -> JobRecord:
    """Submit and wait for success.

    Args:
        request: whose client waits.
        submission: the job.
        names: the engine's field names -> the route's, for refusals.

    Raises:
        FaultError: the submission was refused, or the job's own fault; model_loading when its model is still being
            loaded after `patience_s`.
        ClientDisconnect: the client left; the job was cancelled.
    """
    [record] = await all_finished(request, [submission], names)
    return record


async def all_finished(
    request: Request, submissions: Sequence[Submission], names: Mapping[str, str] = NO_NAMES
) -> list[JobRecord]:
    """`finished` for several jobs side by side; the first fault ends all of them. Their records, in order."""
    patience = patience_s(request.headers, services(request).limits.begin_s)

    async def work() -> list[JobRecord]:
        records: dict[int, JobRecord] = {}
        failure: FaultError | None = None
        async with anyio.create_task_group() as group:

            async def one(index: int, submission: Submission) -> None:
                nonlocal failure
                try:
                    async with watched_job(services(request), submission) as (record, events):
                        if index == 0:
                            request.scope["state"]["job"] = record.id
                        records[index] = succeeded(await _end_of(events, patience), names)
                except FaultError as error:
                    failure = failure or error
                    group.cancel_scope.cancel()

            for index, submission in enumerate(submissions):
                group.start_soon(one, index, submission)
        if failure is not None:
            raise failure
        return [records[index] for index in range(len(submissions))]

    return await while_connected(request.receive, work)


async def _end_of(events: AsyncIterator[JobEvent], patience: float) -> JobRecord:
    """The job's last row. Raises FaultError(model_loading) when it is known to wait for a load after `patience`."""
    record: JobRecord | None = None
    failure: FaultError | None = None
    words, started = "", False
    loading = anyio.Event()
    async with anyio.create_task_group() as group:

        async def lose_patience() -> None:
            nonlocal failure
            await anyio.sleep(patience)
            await loading.wait()
            if not started:
                failure = not_ready(words)
                group.cancel_scope.cancel()

        group.start_soon(lose_patience)
        try:
            async for event in events:
                if isinstance(event, JobEnded):
                    record = event.record
                    break
                if not isinstance(event, JobProgress):
                    started = True
                elif not started:
                    words = loading_words(event)
                    loading.set()
        except FaultError as error:
            failure = error
        group.cancel_scope.cancel()
    if record is not None:
        return record
    raise failure or refuse("internal", "The job's events ended without its end.")


def not_ready(words: str) -> FaultError:
    """What a client is told that waits for a load, and in whose answer nothing can be said about it."""
    return refuse(LOADING, f"The model is not ready yet: {words}.", retry_after_s=LOADING_RETRY_S)


def patience_s(headers: Headers, default: float) -> float:
    """How long the client waits in silence for its work to begin. Raises FaultError(invalid_parameter)."""
    text = headers.get(BEGIN_S)
    if text is None:
        return default
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= MAX_BEGIN_S:
        raise refuse("invalid_parameter", f"{BEGIN_S}: Expected seconds from 0 to {MAX_BEGIN_S:g}.", BEGIN_S)
    return value


def loading_words(event: JobProgress) -> str:
    """Progress before the work began, as part of a sentence on one line."""
    words = event.text or (f"{event.phase} {event.n} of {event.total}" if event.total else event.phase) or "it loads"
    return " ".join(words.split()).rstrip(".")


def succeeded(record: JobRecord, names: Mapping[str, str] = NO_NAMES) -> JobRecord:
    """Return the record of a succeeded job. Raises FaultError with the job's fault, in the route's words, otherwise."""
    if record.state != "succeeded":
        raise FaultError(in_callers_words(ending_fault(record), names))
    if record.result is None:
        raise refuse("not_found", "The job's content was deleted, as this tenant keeps none.")
    return record


def ending_fault(record: JobRecord) -> Fault:
    """Why an ended job did not succeed."""
    if record.fault is not None:
        return record.fault
    if record.state == "cancelled":
        return Fault("cancelled", "The job was cancelled.")
    return Fault("internal", f"The job ended as {record.state} without a reason.")


def result_of(record: JobRecord) -> Any:
    """Decode the result struct of a succeeded job; results come from workers and are not trusted.

    Raises:
        FaultError: engine_protocol when it does not fit the kind.
    """
    type_ = RESULTS.get(record.kind, FreeResult)
    try:
        return msgspec.msgpack.decode(record.result or b"\xc0", type=type_)
    except UNDECODABLE as error:
        raise refuse("engine_protocol", f"The worker's result is not one of kind {record.kind}: {error}.") from None


def usage_tokens(record: JobRecord, *others: JobRecord) -> dict[str, Any]:
    """OpenAI's usage object; of several answers to one prompt the prompt counts once."""
    prompt = int(record.usage.get("prompt_tokens", 0))
    completion = sum(int(one.usage.get("completion_tokens", 0)) for one in (record, *others))
    usage: dict[str, Any] = {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
    }
    if "cached_tokens" in record.usage:
        usage["prompt_tokens_details"] = {"cached_tokens": int(record.usage["cached_tokens"])}
    return usage


def job_headers(record: JobRecord) -> dict[str, str]:
    """Headers that name the job behind an answer."""
    return {JOB_ID: record.id}
