"""POST /v1/embeddings."""

from __future__ import annotations

import base64
import math
from array import array
from collections.abc import Mapping
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from coordinator.answers import finished, job_headers, result_of
from coordinator.bodies import FieldTable, choice, model_name, read_json, work_params
from coordinator.errors import Json
from coordinator.records import JobRecord
from coordinator.services import submission
from protocol.faults import refuse
from protocol.work import EmbeddingResult, Kind

FIELDS = FieldTable(
    passed=frozenset({"dimensions"}),
    handled=frozenset({"model", "input", "encoding_format"}),
    ignored=frozenset({"user"}),
)
_FLOAT_BYTES = 4


async def create(request: Request) -> Response:
    """Embed a text, a batch of texts, a token list or a batch of token lists."""
    model, params, encoding = read(await read_json(request))
    record = await finished(request, submission(request, Kind.EMBEDDING, model, params))
    return Json(to_answer(record, result_of(record), encoding), headers=job_headers(record))


ROUTES = [Route("/v1/embeddings", create, methods=["POST"])]


def read(body: Mapping[str, Any]) -> tuple[str, Any, str]:
    """Model, work parameters and encoding of a request. Raises FaultError naming the field."""
    passed, handled = FIELDS.pick(body)
    model = model_name(handled)
    encoding = choice(handled, "encoding_format", ("float", "base64"), "float")
    if "input" not in handled:
        raise refuse("invalid_parameter", "input: The field is required.", "input")
    return model, work_params(Kind.EMBEDDING, {**passed, "input": to_batch(handled["input"])}), encoding


def to_batch(value: Any) -> Any:
    """OpenAI's four shapes of `input` as one batch; what fits none is left for the parameter check."""
    if isinstance(value, str) or (isinstance(value, list) and value and all(type(item) is int for item in value)):
        return [value]
    return value


def to_answer(record: JobRecord, result: EmbeddingResult, encoding: str) -> dict[str, Any]:
    """OpenAI's list of embeddings.

    Raises:
        FaultError: engine_protocol when the worker's vectors do not fit their announced shape.
    """
    row = result.dimensions * _FLOAT_BYTES
    if result.count < 1 or result.dimensions < 1 or len(result.vectors) != result.count * row:
        raise refuse("engine_protocol", "The worker's vectors do not have the announced shape.")
    data = []
    for index in range(result.count):
        raw = result.vectors[index * row : (index + 1) * row]
        data.append({"object": "embedding", "index": index, "embedding": _encoded(raw, encoding)})
    tokens = int(record.usage.get("prompt_tokens", 0))
    return {
        "object": "list",
        "data": data,
        "model": record.model,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }


def _encoded(raw: bytes, encoding: str) -> str | list[float]:
    # float32 little-endian is what the wire says and what every platform we run on has.
    values = array("f", raw)
    if not all(map(math.isfinite, values)):
        raise refuse("engine_protocol", "The worker's vectors hold a number that is not finite.")
    return base64.b64encode(raw).decode() if encoding == "base64" else values.tolist()
