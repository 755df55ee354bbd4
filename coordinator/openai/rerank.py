"""POST /v1/rerank: the request that Cohere, Jina and llama.cpp share."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from coordinator.answers import finished, job_headers, result_of
from coordinator.bodies import FieldTable, flag, model_name, read_json, work_params
from coordinator.errors import Json
from coordinator.records import JobRecord
from coordinator.services import submission
from protocol.faults import refuse
from protocol.work import Kind, RerankResult

FIELDS = FieldTable(
    passed=frozenset({"query", "top_n"}),
    handled=frozenset({"model", "documents", "return_documents"}),
    ignored=frozenset({"user"}),
)


async def create(request: Request) -> Response:
    """Score documents against a query."""
    model, params, with_documents = read(await read_json(request))
    record = await finished(request, submission(request, Kind.RERANK, model, params))
    documents = params.documents if with_documents else None
    answer = to_answer(record, result_of(record), len(params.documents), documents)
    return Json(answer, headers=job_headers(record))


ROUTES = [Route("/v1/rerank", create, methods=["POST"])]


def read(body: Mapping[str, Any]) -> tuple[str, Any, bool]:
    """Model, work parameters and whether documents come back. Raises FaultError naming the field."""
    passed, handled = FIELDS.pick(body)
    model = model_name(handled)
    with_documents = flag(handled, "return_documents")
    value = dict(passed)
    if "documents" in handled:
        value["documents"] = _texts(handled["documents"])
    return model, work_params(Kind.RERANK, value), with_documents


def _texts(documents: Any) -> Any:
    """Documents may be texts or {"text": …}."""
    if not isinstance(documents, list):
        return documents
    return [item["text"] if isinstance(item, dict) and set(item) == {"text"} else item for item in documents]


def to_answer(record: JobRecord, result: RerankResult, count: int, documents: list[str] | None) -> dict[str, Any]:
    """Results best first; with `documents`, each carries its text.

    Raises:
        FaultError: engine_protocol when the worker names a document that was not sent.
    """
    results = []
    for item in result.results:
        index, score = item.get("index", -1), item.get("relevance_score", math.nan)
        if not 0 <= index < count or index != int(index) or not math.isfinite(score):
            raise refuse("engine_protocol", "The worker's result names no document of this request.")
        entry: dict[str, Any] = {"index": int(index), "relevance_score": score}
        if documents is not None:
            entry["document"] = {"text": documents[int(index)]}
        results.append(entry)
    tokens = int(record.usage.get("prompt_tokens", 0))
    return {
        "object": "list",
        "model": record.model,
        "results": results,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }
