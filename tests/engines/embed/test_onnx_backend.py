"""The layout of a folder: pooling, limits, outputs."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engines.embed.fixture_cases import ONNX_MODEL
from engines.runtime.contract import Job, Model
from protocol.faults import FaultError
from protocol.work import EmbeddingParams

pytestmark = pytest.mark.engine
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
pytest.importorskip("tokenizers", reason="tokenizers is not installed")

from engines.embed.onnx_backend import OnnxBackend  # noqa: E402


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    shutil.copytree(ONNX_MODEL, tmp_path / "model")
    return tmp_path / "model"


def load(path: Path, **options: Any) -> OnnxBackend:
    return OnnxBackend(Model(name="m", device="cpu", options=options), path, path)


def vector(backend: OnnxBackend, item: Any) -> Any:
    outcome = backend.run(Job("embedding", EmbeddingParams(input=[item])))
    return np.frombuffer(outcome.body.vectors, "<f4")


def pooling(path: Path, mode: str) -> None:
    (path / "1_Pooling").mkdir()
    (path / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 64, mode: True}))


def test_cls_pooling_sees_the_first_token_only(folder: Path) -> None:
    pooling(folder, "pooling_mode_cls_token")
    backend = load(folder)
    assert np.array_equal(vector(backend, [2, 50, 3]), vector(backend, [2]))


def test_last_token_pooling(folder: Path) -> None:
    pooling(folder, "pooling_mode_lasttoken")
    backend = load(folder)
    assert np.array_equal(vector(backend, [50, 3]), vector(backend, [3]))


def test_an_unknown_pooling_is_a_failed_load(folder: Path) -> None:
    pooling(folder, "pooling_mode_weightedmean_tokens")
    with pytest.raises(FaultError, match="pooling"):
        load(folder)


def test_the_smallest_stated_limit_counts(folder: Path) -> None:
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 32}')
    assert load(folder).max_tokens == 32
    assert load(folder, max_tokens=64).max_tokens == 64


def test_a_limit_that_means_none_is_none(folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text('{"model_max_length": 1e30}')
    assert load(folder).max_tokens == 128


def test_the_graph_may_lie_at_the_top(folder: Path) -> None:
    (folder / "onnx" / "model.onnx").rename(folder / "model.onnx")
    assert load(folder).dimensions == 64


def test_truncation_of_the_file_is_off(folder: Path) -> None:
    assert load(folder).lengths(["cat " * 500]) == [502]


def test_cancel_stops_before_the_next_batch() -> None:
    backend = load(ONNX_MODEL, batch_size=1)
    begun, cancelled = threading.Event(), threading.Event()
    params = EmbeddingParams(input=["cat"] * 2000)

    def report(*_: object) -> None:
        begun.set()
        cancelled.wait(60)

    job = Job("embedding", params, report=report)
    ends: list[BaseException] = []

    def work() -> None:
        try:
            backend.run(job)
        except BaseException as error:
            ends.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    assert begun.wait(60)
    job.cancelled.set()
    backend.cancel(job)
    cancelled.set()
    thread.join(60)
    assert [type(error).__name__ for error in ends] == ["CancelledRun"]
    assert vector(backend, "cat").shape == (64,)
