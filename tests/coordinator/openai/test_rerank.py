"""Rerank over a real server."""

from __future__ import annotations

from typing import Any

import pytest

from protocol.work import RerankResult


def test_documents_come_back_best_first(http: Any, serve: Any) -> None:
    def script(job: Any) -> None:
        job.started()
        assert job.params.documents == ["x", "yy"]
        results = [{"index": 1, "relevance_score": 0.9}, {"index": 0, "relevance_score": 0.1}]
        job.complete(RerankResult(results=results), {"prompt_tokens": 5})

    serve(script, "rank", "rerank")
    body = {"model": "rank", "query": "q", "documents": ["x", {"text": "yy"}], "return_documents": True}
    answer = http.post("/v1/rerank", json=body).json()
    assert answer["results"] == [
        {"index": 1, "relevance_score": 0.9, "document": {"text": "yy"}},
        {"index": 0, "relevance_score": 0.1, "document": {"text": "x"}},
    ]
    assert answer["usage"]["total_tokens"] == 5


@pytest.mark.parametrize("index", [7.0, -1.0, 0.5, float("nan"), float("inf")])
def test_a_document_that_was_not_sent_is_the_engines_fault(http: Any, serve: Any, index: float) -> None:
    def script(job: Any) -> None:
        job.started()
        job.complete(RerankResult(results=[{"index": index, "relevance_score": 0.9}]))

    serve(script, f"rank-wrong-{index}", "rerank")
    answer = http.post("/v1/rerank", json={"model": f"rank-wrong-{index}", "query": "q", "documents": ["x"]})
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "engine_protocol")


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"documents": ["x"]}, "query"),
        ({"query": "q"}, "documents"),
        ({"query": "q", "documents": []}, "documents"),
        ({"query": "q", "documents": ["x"], "top_n": 0}, "top_n"),
    ],
)
def test_refusals_name_the_field(http: Any, body: dict[str, Any], field: str) -> None:
    answer = http.post("/v1/rerank", json={"model": "rank", **body})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, field)
