"""One suite, both backends: the real library in the real child over the real wire."""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from engines.embed.fixture_cases import GGUF_MODEL, ONNX_MODEL, fixture
from protocol import engine_wire as wire
from protocol.engine_wire import Model, Ready
from protocol.faults import Fault

pytestmark = pytest.mark.engine

# float32 sums in another order; llama.cpp with one slot is exact
TOLERANCE = 1e-5


def vectors(answer: Any) -> np.ndarray[Any, Any]:
    body = answer.body
    return np.frombuffer(body.vectors, "<f4").reshape(body.count, body.dimensions)


def embed(child: Any, texts: list[Any], **more: Any) -> np.ndarray[Any, Any]:
    return vectors(child.run("embedding", {"input": texts, **more}))


def texts(count: int, longest: int = 60) -> list[str]:
    choose = random.Random(count)
    words = ["cat", "dog", "gpu", "red", "count", "to", "12", "sat", "moon", "train", "hello"]
    return [" ".join(choose.choices(words, k=choose.randint(1, longest // 4))) for _ in range(count)]


def test_fixture_cases_are_answered_right(embedder: Any, backend: str) -> None:
    for case in fixture(backend).cases:
        answer = embedder.run(case.kind, case.params)
        assert case.check(answer.body, answer.files) == ""


def test_every_row_has_length_1(embedder: Any) -> None:
    lengths = np.linalg.norm(embed(embedder, texts(40)).astype(np.float64), axis=1)
    assert np.abs(lengths - 1).max() < 1e-6


def test_a_batch_equals_its_singles(embedder: Any) -> None:
    batch = texts(50)
    together = embed(embedder, batch)
    alone = np.concatenate([embed(embedder, [text]) for text in batch])
    assert np.abs(together - alone).max() < TOLERANCE


def test_the_order_is_that_of_the_request(embedder: Any) -> None:
    batch = texts(70)
    assert np.abs(embed(embedder, batch)[::-1] - embed(embedder, batch[::-1])).max() < TOLERANCE


def test_token_ids_are_taken_as_they_are(embedder: Any, backend: str) -> None:
    ids = {"onnx": [2, 3], "gguf": [1, 107, 104]}[backend]
    same = {"onnx": [[2, 3], [2, 3]], "gguf": [[1, 107, 104], [1, 107, 104]]}[backend]
    answer = embedder.run("embedding", {"input": same})
    assert answer.result.usage["prompt_tokens"] == 2 * len(ids)
    found = vectors(answer)
    assert np.array_equal(found[0], found[1])
    if backend == "gguf":  # bos, h, e
        assert np.abs(found[0] - embed(embedder, ["he"])[0]).max() < TOLERANCE


def test_usage_counts_tokens(embedder: Any, backend: str) -> None:
    usage = embedder.run("embedding", {"input": ["the cat", "sat"]}).result.usage
    # wordpiece with [CLS] and [SEP]; letters with bos
    assert usage == {"prompt_tokens": {"onnx": 7, "gguf": 12}[backend]}


def test_progress_counts_texts(embedder: Any) -> None:
    answer = embedder.run("embedding", {"input": texts(100)})
    counts = [(entry.n, entry.total) for entry in answer.progress]
    assert len(counts) >= 3
    assert counts == sorted(counts)
    assert counts[-1] == (100, 100)


def test_ready_tells_dimensions_and_the_longest_text(backend: str, spawn_shared: Any, make_model: Any) -> None:
    ready = spawn_shared("embed").load(make_model(backend))
    assert isinstance(ready, Ready), ready
    assert ready.device == "cpu"
    assert ready.limits == {"onnx": {"dimensions": 64, "n_ctx": 128}, "gguf": {"dimensions": 96, "n_ctx": 512}}[backend]


def test_onnx_is_what_serves_without_a_backend(spawn_shared: Any) -> None:
    """The probe of a model without a backend is that of onnx; another library must not serve it then."""
    ready = spawn_shared("embed").load(Model(name="m", files={"model": str(ONNX_MODEL)}, device="cpu"))
    assert "onnxruntime" in ready.versions
    fault = spawn_shared("embed").load(Model(name="m", files={"model": str(GGUF_MODEL)}, device="cpu"))
    assert (fault.code, fault.field) == ("load_failed", "files.model")
    assert 'backend = "gguf"' in fault.detail["hint"]


# ---- dimensions


def test_fewer_dimensions_need_a_model_trained_for_it(embedder: Any) -> None:
    fault = embedder.run("embedding", {"input": ["cat"], "dimensions": 16}).fault
    assert (fault.code, fault.field) == ("unsupported", "dimensions")


def test_more_dimensions_than_there_are_is_refused(embedder: Any) -> None:
    fault = embedder.run("embedding", {"input": ["cat"], "dimensions": 1000}).fault
    assert (fault.code, fault.field) == ("invalid_parameter", "dimensions")


def test_the_models_own_dimensions_are_fine(embedder: Any, backend: str) -> None:
    assert embed(embedder, ["cat"], dimensions={"onnx": 64, "gguf": 96}[backend]).shape[0] == 1


def test_matryoshka_shortens_and_normalises_again(backend: str, spawn_shared: Any, make_model: Any) -> None:
    child = spawn_shared("embed")
    assert isinstance(child.load(make_model(backend, matryoshka=True)), Ready)
    full, short = embed(child, ["cat", "dog"]), embed(child, ["cat", "dog"], dimensions=16)
    expected = full[:, :16] / np.linalg.norm(full[:, :16], axis=1, keepdims=True)
    assert np.abs(short - expected).max() < TOLERANCE


# ---- bad input


def well(child: Any) -> bool:
    return embed(child, ["hello"]).shape[0] == 1 and child.process.poll() is None


def test_a_long_text_is_refused_with_its_index_and_never_cut(embedder: Any, backend: str) -> None:
    answer = embedder.run("embedding", {"input": ["ok", "cat " * 2000]})
    assert (answer.fault.code, answer.fault.field) == ("context_length_exceeded", "input.1")
    assert {"onnx": "128", "gguf": "512"}[backend] in answer.fault.message
    assert not answer.started
    assert well(embedder)


@pytest.mark.parametrize(("count", "fits"), [(0, True), (1, False)])
def test_the_longest_text_is_measured_exactly(embedder: Any, backend: str, count: int, fits: bool) -> None:
    # onnx: [CLS] + words + [SEP] = 128; gguf: bos + letters = 512
    text = {"onnx": "cat " * (126 + count), "gguf": "x" * (511 + count)}[backend]
    fault = embedder.run("embedding", {"input": [text]}).fault
    assert (fault is None) is fits
    assert well(embedder)


@pytest.mark.parametrize(
    ("item", "code"),
    [
        ([2**31 - 1], "invalid_parameter"),
        ([3, 264], "invalid_parameter"),
        ([-1], "invalid_parameter"),
        ([], "invalid_parameter"),
        ("", "invalid_parameter"),
        ([3] * 600, "context_length_exceeded"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_bad_items_are_the_callers_fault(embedder: Any, item: Any, code: str) -> None:
    answer = embedder.run("embedding", {"input": [item]})
    assert answer.fault.code == code
    assert answer.fault.field.startswith("input")
    assert not answer.started
    assert well(embedder)


@pytest.mark.parametrize(
    "text", [" ", "\0", "\U0001f600", "\u2603" * 30, "\ufdfa" * 5, "<s></s>", "[CLS] [PAD]"], ids=ascii
)
def test_odd_texts_are_embedded(embedder: Any, text: str) -> None:
    assert embed(embedder, [text]).shape[0] == 1
    assert well(embedder)


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"batch_size": 0}, "options.batch_size"),
        ({"threads": -1}, "options.threads"),
        ({"pooling": "sum"}, "options.pooling"),
        ({"max_tokens": 1}, "options.max_tokens"),
        ({"matryoska": True}, "options.matryoska"),
    ],
)
def test_a_bad_load_option_is_refused(
    backend: str, spawn_shared: Any, make_model: Any, options: dict[str, Any], field: str
) -> None:
    fault = spawn_shared("embed").load(make_model(backend, **options))
    assert (fault.code, fault.field) == ("load_failed", field)


def _cut(path: Path, name: str, size: int) -> None:
    data = (path / name).read_bytes()
    (path / name).write_bytes(data[:size])


BROKEN: dict[str, Callable[[Path], object]] = {
    "graph cut": lambda path: _cut(path, "onnx/model.onnx", 3000),
    "graph empty": lambda path: _cut(path, "onnx/model.onnx", 0),
    "no graph": lambda path: (path / "onnx/model.onnx").unlink(),
    "tokenizer cut": lambda path: _cut(path, "tokenizer.json", 500),
    "no tokenizer": lambda path: (path / "tokenizer.json").unlink(),
    "config cut": lambda path: _cut(path, "config.json", 10),
    "another kind of graph": lambda path: shutil.copy(
        ONNX_MODEL.parents[2] / "image" / "fixture" / "hang.onnx", path / "onnx" / "model.onnx"
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_onnx_folder_is_a_failed_load(spawn_shared: Any, make_model: Any, tmp_path: Path, name: str) -> None:
    pytest.importorskip("onnxruntime")
    path = tmp_path / "model"
    shutil.copytree(ONNX_MODEL, path)
    BROKEN[name](path)
    child = spawn_shared("embed")
    fault = child.load(make_model("onnx", path))
    assert isinstance(fault, Fault), fault
    assert fault.code == "load_failed"
    assert child.process.poll() is None


@pytest.mark.parametrize("size", [0, 100, 4000, 200_000])
def test_a_cut_gguf_is_a_failed_load(spawn_shared: Any, make_model: Any, tmp_path: Path, size: int) -> None:
    pytest.importorskip("xllamacpp")
    path = tmp_path / "cut.gguf"
    path.write_bytes(GGUF_MODEL.read_bytes()[:size])
    fault = spawn_shared("embed").load(make_model("gguf", path))
    assert isinstance(fault, Fault), fault
    assert (fault.code, fault.field) == ("load_failed", "files.model")


# ---- cancel, devices


def test_cancel_between_batches(spawn: Any, make_model: Any) -> None:
    pytest.importorskip("xllamacpp")
    child = spawn("embed")
    assert isinstance(child.load(make_model("gguf")), Ready)
    endless = fixture("gguf").endless
    assert endless is not None
    answer = child.begin(endless.kind, endless.params)
    while not isinstance(child.receive(), wire.Progress):
        pass
    child.send(wire.Cancel(run=1))
    began = time.monotonic()
    assert child.finish(answer).fault.code == "cancelled"
    assert time.monotonic() - began < 15.0
    assert well(child)


def test_cuda_of_a_cpu_build_is_a_failed_load(backend: str, spawn_shared: Any, make_model: Any) -> None:
    fault = spawn_shared("embed").load(msgspec.structs.replace(make_model(backend), device="cuda"))
    if isinstance(fault, Ready):
        pytest.skip("this is a GPU build on a machine with a GPU")
    assert fault.code == "cpu_fallback"


@pytest.mark.gpu
def test_the_graph_really_runs_on_the_gpu(backend: str, spawn_shared: Any, make_model: Any) -> None:
    child = spawn_shared("embed")
    ready = child.load(msgspec.structs.replace(make_model(backend), device="cuda"))
    if not isinstance(ready, Ready) and ready.code == "cpu_fallback":
        pytest.skip(f"no GPU build for {backend} here: {ready.message}")
    assert isinstance(ready, Ready), ready
    assert ready.device.startswith("cuda")
    assert well(child)
