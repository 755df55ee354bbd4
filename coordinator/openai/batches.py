"""/v1/batches: many requests in one file, answered within a day as the queue has room for them."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from coordinator.batch_lines import ENDPOINTS
from coordinator.batches import new_batch_id
from coordinator.bodies import FieldTable, choice, page_size, read_json
from coordinator.errors import Json
from coordinator.openai.files import keep_seconds
from coordinator.openai.listing import cursor, page
from coordinator.services import caller, services
from coordinator.store.shelf import BatchRecord
from protocol.faults import FaultError, refuse

WINDOW = "24h"
LIST_LIMIT = 20
MAX_LIST_LIMIT = 100
MAX_METADATA = 16
MAX_METADATA_KEY_CHARS = 64
MAX_METADATA_CHARS = 512

FIELDS = FieldTable(
    passed=frozenset(),
    handled=frozenset({"input_file_id", "endpoint", "completion_window", "metadata", "output_expires_after"}),
)


async def create(request: Request) -> Response:
    """Make a batch; its lines are checked and queued from now on, and it goes on when the client leaves."""
    _, handled = FIELDS.pick(await read_json(request))
    parts, key = services(request), caller(request)
    endpoint = _required(handled, "endpoint", ENDPOINTS)
    _required(handled, "completion_window", (WINDOW,))
    file_id = handled.get("input_file_id")
    if not isinstance(file_id, str):
        raise refuse("invalid_parameter", "input_file_id: Expected the id of a file.", "input_file_id")
    metadata = to_metadata(handled.get("metadata", {}))
    keep = handled.get("output_expires_after")
    keep_s = keep_seconds(keep, "output_expires_after") if keep is not None else 0
    if not parts.dispatcher.accepting:
        raise refuse("overloaded", "The coordinator is shutting down; try again later.")
    file = await parts.files.find(file_id, key.tenant, "input_file_id")
    if file.purpose != "batch":
        message = f"input_file_id: The file was uploaded for {file.purpose}, not for batch."
        raise refuse("invalid_parameter", message, "input_file_id")
    batch = BatchRecord(
        id=new_batch_id(),
        tenant=key.tenant,
        key_id=key.prefix,
        endpoint=endpoint,
        input_file=file.id,
        input_blob=file.blob,
        metadata=metadata,
        keep_s=keep_s,
    )
    return Json(to_batch(await parts.batches.create(batch)))


async def list_batches(request: Request) -> Response:
    """The tenant's batches, newest first, in pages."""
    limit = page_size(request.query_params, LIST_LIMIT, MAX_LIST_LIMIT)
    tenant, after = caller(request).tenant, cursor(request.query_params)
    records = await services(request).batches.list(tenant, limit + 1, after)
    return Json(page([to_batch(record) for record in records], limit))


async def retrieve(request: Request) -> Response:
    """One batch, with the counts of this moment."""
    name = request.path_params["id"]
    record = await services(request).batches.get(name, caller(request).tenant)
    if record is None:
        raise _unknown(name)
    return Json(to_batch(record))


async def cancel(request: Request) -> Response:
    """Cancel; what was answered until then is in its output file."""
    name = request.path_params["id"]
    record = await services(request).batches.cancel(name, caller(request).tenant)
    if record is None:
        raise _unknown(name)
    if record.state not in ("cancelling", "cancelled"):
        raise refuse("conflict", f"The batch cannot be cancelled any more: it is {record.state}.", "batch_id")
    return Json(to_batch(record))


ROUTES = [
    Route("/v1/batches", create, methods=["POST"]),
    Route("/v1/batches", list_batches, methods=["GET"]),
    Route("/v1/batches/{id}", retrieve, methods=["GET"]),
    Route("/v1/batches/{id}/cancel", cancel, methods=["POST"]),
]


def _unknown(name: str) -> FaultError:
    return refuse("not_found", f"There is no batch {name[:100]!r}.", "batch_id")


def _required(handled: dict[str, Any], name: str, allowed: Any) -> str:
    if name not in handled:
        raise refuse("invalid_parameter", f"{name}: The field is required.", name)
    return choice(handled, name, allowed, "")


def to_metadata(value: Any) -> dict[str, str]:
    """Check the metadata. Raises FaultError(invalid_parameter)."""
    good = isinstance(value, dict) and len(value) <= MAX_METADATA
    if not good or not all(
        isinstance(text, str) and len(text) <= MAX_METADATA_CHARS and len(name) <= MAX_METADATA_KEY_CHARS
        for name, text in value.items()
    ):
        message = (
            f"metadata: Expected at most {MAX_METADATA} texts of at most {MAX_METADATA_CHARS} characters, with names "
            f"of at most {MAX_METADATA_KEY_CHARS}."
        )
        raise refuse("invalid_parameter", message, "metadata")
    return value  # type: ignore[no-any-return]


def to_batch(record: BatchRecord) -> dict[str, Any]:
    """OpenAI's batch object."""
    moments = {
        f"{state}_at": record.moved[state] // 1000 if state in record.moved else None
        for state in ("in_progress", "finalizing", "completed", "failed", "expired", "cancelling", "cancelled")
    }
    errors = [
        {"code": fault.code, "message": fault.message, "param": fault.field, "line": line or None}
        for line, fault in record.errors
    ]
    return {
        "id": record.id,
        "object": "batch",
        "endpoint": record.endpoint,
        "model": record.model or None,
        "errors": {"object": "list", "data": errors} if errors else None,
        "input_file_id": record.input_file,
        "completion_window": WINDOW,
        "status": record.state,
        "output_file_id": record.output_file or None,
        "error_file_id": record.error_file or None,
        "created_at": record.created_ms // 1000,
        "expires_at": record.expires_ms // 1000,
        **moments,
        "request_counts": {"total": record.total, "completed": record.completed, "failed": record.failed},
        "usage": _usage(record.usage) if record.ended else None,
        "metadata": record.metadata or None,
    }


def _usage(counted: dict[str, float]) -> dict[str, Any]:
    names = ("prompt_tokens", "completion_tokens", "cached_tokens")
    prompt, completion, cached = (int(counted.get(name, 0)) for name in names)
    return {
        "input_tokens": prompt,
        "input_tokens_details": {"cached_tokens": cached},
        "output_tokens": completion,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": prompt + completion,
    }
