"""Lines of a batch: what a client may write in one, and what is written back for it.

Everything here is pure but `read_lines`, which blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, BinaryIO, NamedTuple

import msgspec

from coordinator.answers import result_of, succeeded
from coordinator.bodies import JSON_BYTES, decode_object, model_name
from coordinator.openai import chat, completions, embeddings, rerank
from coordinator.openai.sampling import answers_wanted, stream_wish
from coordinator.records import JobRecord
from coordinator.store.shelf import BatchItem, BatchState
from protocol.faults import Fault, FaultError, refuse
from protocol.work import Kind

MAX_LINES = 50_000  # OpenAI's own
LINE_BYTES = JSON_BYTES
MAX_CUSTOM_ID_CHARS = 512
_FIELDS = frozenset({"custom_id", "method", "url", "body"})


class Line(NamedTuple):
    """One request of a batch."""

    custom_id: str
    body: dict[str, Any]


class Planned(NamedTuple):
    """A request as a job: its kind, model and parameters, and how its answer is written."""

    kind: str
    model: str
    params: Any
    names: Mapping[str, str]
    answer: Callable[[JobRecord], dict[str, Any]]


# ---- reading ------------------------------------------------------------------------------------------------


def read_lines(source: Callable[[], BinaryIO], offset: int, count: int) -> tuple[list[bytes], int]:
    """Some lines from byte `offset` on, and where the next one begins; no lines at the end of the file. Blocks.

    At most `count`, and fewer when they are long. Blank lines are left out and do not count. A line beyond
    `LINE_BYTES` comes cut off after one byte more than that, and so does not parse.
    """
    lines: list[bytes] = []
    size = 0
    with source() as file:
        file.seek(offset)
        while len(lines) < count and size < LINE_BYTES and (line := file.readline(LINE_BYTES + 1)):
            rest = line
            while len(rest) > LINE_BYTES and not rest.endswith(b"\n"):
                rest = file.readline(LINE_BYTES + 1)
            size += len(line)
            if line.strip():
                lines.append(line if len(line) > LINE_BYTES else line.strip())
        return lines, file.tell()


def parse_line(raw: bytes, endpoint: str) -> Line:
    """Check a line's envelope; its body is judged by `planned`. Raises FaultError."""
    if len(raw) > LINE_BYTES:
        raise refuse("payload_too_large", f"The line exceeds {LINE_BYTES} bytes.")
    value = decode_object(raw, "The line")
    if unknown := set(value) - _FIELDS:
        name = min(unknown)[:100]
        raise refuse("invalid_parameter", f"{name}: Unknown field.", name)
    custom_id = value.get("custom_id")
    if not isinstance(custom_id, str) or not 1 <= len(custom_id) <= MAX_CUSTOM_ID_CHARS:
        message = f"custom_id: Expected a text of 1 to {MAX_CUSTOM_ID_CHARS} characters."
        raise refuse("invalid_parameter", message, "custom_id")
    if value.get("method") != "POST":
        raise refuse("invalid_parameter", "method: Expected POST.", "method")
    if value.get("url") != endpoint:
        raise refuse("invalid_parameter", f"url: Expected {endpoint}, the batch's endpoint.", "url")
    body = value.get("body")
    if not isinstance(body, dict):
        raise refuse("invalid_parameter", "body: Expected an object.", "body")
    return Line(custom_id, body)


# ---- the endpoints ------------------------------------------------------------------------------------------


def planned(endpoint: str, body: Mapping[str, Any]) -> Planned:
    """The job of a request. Raises FaultError naming the field in the endpoint's words."""
    return ENDPOINTS[endpoint](body)


def _chat(body: Mapping[str, Any]) -> Planned:
    passed, handled = chat.FIELDS.pick(body)
    _whole(handled)
    params = chat.to_params(passed, handled)
    return Planned(
        Kind.LLM,
        model_name(handled),
        params,
        chat.field_names(handled),
        chat.to_answer,
    )


def _completion(body: Mapping[str, Any]) -> Planned:
    passed, handled = completions.FIELDS.pick(body)
    _whole(handled)
    params = completions.to_params(passed, handled)
    return Planned(
        Kind.LLM,
        model_name(handled),
        params,
        {},
        completions.to_answer,
    )


def _whole(handled: Mapping[str, Any]) -> None:
    stream, _ = stream_wish(handled)
    if stream:
        raise refuse("unsupported", "stream: Nobody reads along in a batch; leave the field out.", "stream")
    if answers_wanted(handled) > 1:
        raise refuse("unsupported", "n: One answer per line of a batch; write more lines.", "n")


def _embedding(body: Mapping[str, Any]) -> Planned:
    model, params, encoding = embeddings.read(body)
    return Planned(
        Kind.EMBEDDING, model, params, {}, lambda record: embeddings.to_answer(record, result_of(record), encoding)
    )


def _rerank(body: Mapping[str, Any]) -> Planned:
    model, params, with_documents = rerank.read(body)
    documents = params.documents if with_documents else None
    return Planned(
        Kind.RERANK,
        model,
        params,
        {},
        lambda record: rerank.to_answer(record, result_of(record), len(params.documents), documents),
    )


ENDPOINTS: Mapping[str, Callable[[Mapping[str, Any]], Planned]] = {
    "/v1/chat/completions": _chat,
    "/v1/completions": _completion,
    "/v1/embeddings": _embedding,
    "/v1/rerank": _rerank,
}


# ---- writing ------------------------------------------------------------------------------------------------


class Written(NamedTuple):
    """One line of an output file (`good`) or of an error file."""

    good: bool
    data: bytes


def written(
    batch_id: str, endpoint: str, n: int, raw: bytes, item: BatchItem | None, record: JobRecord | None, end: BatchState
) -> Written:
    """What is said of line `n` of a batch that ends as `end`.

    Args:
        batch_id: whose line it is.
        endpoint: of the batch.
        n: its number, from 0.
        raw: the line as it stands in the input; it was checked when the batch began.
        item: what was remembered of it; None when its turn never came.
        record: its job as it is now, where it has one.
        end: the batch's last state.
    """
    line = parse_line(raw, endpoint)
    head: dict[str, Any] = {"id": f"batch_req_{batch_id.removeprefix('batch_')}_{n}", "custom_id": line.custom_id}
    if item is None or (record is not None and not _kept(record, end)):
        return _unmade(head, end)
    request_id = record.id if record is not None else head["id"]
    try:
        if record is None:
            raise FaultError(item.fault or Fault("internal", "The job of this line is gone."))
        plan = planned(endpoint, line.body)
        body = plan.answer(succeeded(record, plan.names))
        status, good = 200, True
    except FaultError as error:
        body, status, good = error.fault.openai_error(), error.fault.http_status, False
    response = {"status_code": status, "request_id": request_id, "body": body}
    return Written(good, _line({**head, "response": response, "error": None}))


def _kept(record: JobRecord, end: BatchState) -> bool:
    """Whether the job ended by itself and not with its batch."""
    code = record.fault.code if record.fault is not None else ""
    with_batch = {"expired": "deadline_exceeded", "cancelled": "cancelled"}.get(end)
    return record.state == "succeeded" or (record.ended and code != with_batch)


def _unmade(head: dict[str, Any], end: BatchState) -> Written:
    words = {
        "expired": "This request could not be executed before the completion window expired.",
        "cancelled": "This request was not executed before the batch was cancelled.",
    }.get(end, "This request was not executed.")
    error = {"code": f"batch_{end}", "message": words}
    return Written(False, _line({**head, "response": None, "error": error}))


def _line(value: Any) -> bytes:
    return msgspec.json.encode(value) + b"\n"


def wrong_lines(raws: list[bytes], first: int, endpoint: str, seen: set[str]) -> Iterator[tuple[int, Fault]]:
    """Faults of lines that begin with number `first`, each with its number from 1; `seen` collects the custom ids."""
    for number, raw in enumerate(raws, first + 1):
        try:
            line = parse_line(raw, endpoint)
        except FaultError as error:
            yield number, error.fault
            continue
        if line.custom_id in seen:
            yield number, Fault("invalid_parameter", "custom_id: Another line has the same.", "custom_id")
        seen.add(line.custom_id)
