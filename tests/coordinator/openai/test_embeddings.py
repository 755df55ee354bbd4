"""Embeddings: the four shapes of input, both encodings, vectors that are not believed."""

from __future__ import annotations

from array import array
from typing import Any

import openai
import pytest

from coordinator.openai.embeddings import to_answer, to_batch
from coordinator.records import JobRecord
from protocol.faults import FaultError
from protocol.work import EmbeddingResult

RECORD = JobRecord(
    id="job_1", kind="embedding", model="m", state="succeeded", tenant="t", attempt=1, created_ms=1, params=b""
)


@pytest.mark.parametrize(
    ("given", "batch"),
    [("a", ["a"]), (["a", "b"], ["a", "b"]), ([1, 2], [[1, 2]]), ([[1], [2]], [[1], [2]]), ([], []), (5, 5)],
)
def test_input_becomes_a_batch(given: Any, batch: Any) -> None:
    assert to_batch(given) == batch


@pytest.mark.parametrize(
    ("count", "vectors"), [(2, array("f", [1, 0]).tobytes()), (1, b"abc"), (1, array("f", [float("nan"), 0]).tobytes())]
)
def test_vectors_that_do_not_fit_are_the_engines_fault(count: int, vectors: bytes) -> None:
    with pytest.raises(FaultError) as caught:
        to_answer(RECORD, EmbeddingResult(count=count, dimensions=2, vectors=vectors), "float")
    assert caught.value.fault.code == "engine_protocol"


def script(job: Any) -> None:
    job.started()
    rows = [[float(len(item)), 0.25] for item in job.params.input]
    vectors = array("f", [value for row in rows for value in row]).tobytes()
    result = EmbeddingResult(count=len(rows), dimensions=2, vectors=vectors)
    job.complete(result, {"prompt_tokens": sum(len(item) for item in job.params.input)})


def test_both_encodings_give_the_same_numbers(ai: openai.OpenAI, serve: Any) -> None:
    worker = serve(script, "embed", "embedding")
    # The official client asks for base64 unless told otherwise.
    packed = ai.embeddings.create(model="embed", input=["a", "bcd"])
    plain = ai.embeddings.create(model="embed", input=["a", "bcd"], encoding_format="float", dimensions=2)
    assert [item.embedding for item in packed.data] == [item.embedding for item in plain.data] == [[1, 0.25], [3, 0.25]]
    assert packed.usage.total_tokens == 4
    assert worker.jobs[1].params.dimensions == 2
    assert ai.embeddings.create(model="embed", input=[7, 8, 9]).data[0].embedding == [3, 0.25]


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"input": ""}, "input"),
        ({"input": []}, "input"),
        ({"input": ["a", 1]}, "input"),
        ({}, "input"),
        ({"input": "a", "encoding_format": "int8"}, "encoding_format"),
        ({"input": "a", "dimensions": 0}, "dimensions"),
        ({"input": "a", "truncate": True}, "truncate"),
    ],
)
def test_refusals_name_the_field(http: Any, body: dict[str, Any], field: str) -> None:
    answer = http.post("/v1/embeddings", json={"model": "embed", **body})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == field
