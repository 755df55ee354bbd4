"""Judges what a worker calls a result, before any of it is stored. A worker's word is input like any other."""

from __future__ import annotations

import math

import msgspec
from anyio.to_thread import run_sync

from coordinator.blobs.base import Blobs
from coordinator.blobs.bounds import MAX_RESULT_BYTES
from coordinator.media import HEAD_BYTES, output_type
from coordinator.plain import json_bytes
from coordinator.records import StoredFile
from coordinator.store.base import Outcome
from protocol.engine_wire import MAX_OUTPUT_FILES
from protocol.faults import Fault, FaultError
from protocol.framing import UNDECODABLE
from protocol.link_wire import RESULT_FILE, Complete
from protocol.work import RESULTS, FreeResult, LlmResult, SttResult

MAX_USAGE_KEYS = 32
_FREE = (LlmResult, FreeResult)  # those with fields of any type
_LONGEST_S = 1e9  # no recording is thirty years long
_THREAD_BYTES = 2**20  # decoding more than this is not done on the event loop


async def judge_result(blobs: Blobs, job: str, attempt: int, kind: str, body: Complete) -> Outcome | Fault:
    """Return what shall be stored, or the fault of the attempt.

    Every file must have been uploaded with the declared size and digest; the result must fit its kind.
    """
    files: list[StoredFile] = []
    result = body.inline
    if len(body.files) > MAX_OUTPUT_FILES or len({file.name for file in body.files}) < len(body.files):
        return Fault("upload_failed", f"The worker named a file twice, or more than {MAX_OUTPUT_FILES} files.")
    for file in body.files:
        key = await blobs.find_output(job, attempt, file.name, file.size, file.sha256)
        if key is None:
            return Fault("upload_failed", f"The output {file.name!r} was not uploaded as the worker declared it.")
        if file.name == RESULT_FILE and result is None:
            result = await _read(blobs, key)
        else:
            mime = output_type(file.mime, await _head(blobs, key))
            files.append(StoredFile(file.name, key, mime, file.size, file.sha256))
    if result is None and (key := await blobs.find_named(job, attempt, RESULT_FILE)):
        result = await _read(blobs, key)
    if result is None:
        return Fault("upload_failed", f"The worker sent neither a result nor the file {RESULT_FILE}.")
    if broken := await _broken(kind, result):
        return Fault("engine_protocol", f"The result does not fit the task kind {kind}: {broken}")
    return Outcome(result, tuple(files), clean_usage(body.usage))


def clean_usage(usage: dict[str, float]) -> dict[str, float]:
    """Keep only what can be summed."""
    good = {key: value for key, value in usage.items() if math.isfinite(value) and value >= 0 and len(key) <= 64}
    return dict(list(good.items())[:MAX_USAGE_KEYS])


async def _head(blobs: Blobs, key: str) -> bytes:
    async with await blobs.open(key) as file:
        return await file.read(HEAD_BYTES)


async def _read(blobs: Blobs, key: str) -> bytes | None:
    try:
        return await blobs.read(key, MAX_RESULT_BYTES)
    except FaultError:
        return None


async def _broken(kind: str, result: bytes) -> str:
    if len(result) > _THREAD_BYTES:
        return await run_sync(_misfit, kind, result)
    return _misfit(kind, result)


def _has_times(result: SttResult) -> bool:
    """Whether its times can be counted and written down."""
    times = [result.duration]
    for segment in result.segments:
        times += (segment.start, segment.end)
        for word in segment.words:
            times += (word.start, word.end)
    return all(-_LONGEST_S < time < _LONGEST_S for time in times)


def _misfit(kind: str, result: bytes) -> str:
    """msgspec's sentence when the result does not fit; "" when it does."""
    try:
        decoded = msgspec.msgpack.decode(result, type=RESULTS.get(kind, FreeResult))
    except UNDECODABLE as error:
        return str(error)
    if isinstance(decoded, SttResult) and not _has_times(decoded):
        return "it has times that are none"
    if isinstance(decoded, _FREE) and json_bytes(decoded) is None:
        return "it holds what cannot be said in JSON"
    return ""
