from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from engines.llm.backend import DEFAULT_CTX, check_fit, check_memory, model_path, read_options
from engines.runtime.contract import Model
from engines.runtime.gguf import Header
from protocol.faults import FaultError
from protocol.work import LlmParams, Message


def header(**numbers: int) -> Header:
    metadata = {"general.architecture": "llama", **{f"llama.{key}": value for key, value in numbers.items()}}
    return Header(metadata=metadata, lengths={}, tensors=1, bytes=1)


def options(trained: int = 4096, slots: int = 4, **given: Any) -> Any:
    return read_options(Model(name="m", options=given), header(context_length=trained), slots=slots)


@pytest.mark.parametrize(
    ("trained", "given", "n_ctx"),
    [(512, {}, 512), (131_072, {}, DEFAULT_CTX), (131_072, {"n_ctx": 100_000}, 100_000), (0, {}, DEFAULT_CTX)],
)
def test_context_is_the_models_up_to_a_default(trained: int, given: dict[str, Any], n_ctx: int) -> None:
    assert options(trained, **given).n_ctx == n_ctx


def test_more_than_the_model_was_trained_for_is_refused() -> None:
    with pytest.raises(FaultError, match="4097 tokens exceed the 4096"):
        options(n_ctx=4097)


def test_context_memory_beyond_the_machine_is_refused() -> None:
    big = header(context_length=10**8, block_count=32, embedding_length=4096)
    wanted = read_options(Model(name="m", options={"n_ctx": 10**8}), big, slots=1)
    with pytest.raises(FaultError) as caught:
        check_memory(wanted, big, 64 * 2**30)
    assert caught.value.fault.field == "options.n_ctx"
    assert "GiB" in caught.value.fault.message
    check_memory(options(), header(context_length=4096, block_count=2, embedding_length=64), 2**30)


@pytest.mark.parametrize(("prompt", "wanted"), [(1, None), (99, None), (99, 1), (50, 50)])
def test_what_fits_passes(prompt: int, wanted: int | None) -> None:
    check_fit(prompt, LlmParams(prompt="x", max_tokens=wanted), 100)


@pytest.mark.parametrize(
    ("prompt", "wanted", "field"), [(100, None, "messages"), (100, 1, "messages"), (50, 51, "max_tokens")]
)
def test_what_does_not_fit_is_refused_by_field(prompt: int, wanted: int | None, field: str) -> None:
    params = LlmParams(messages=[Message(role="user", content="x")], max_tokens=wanted)
    with pytest.raises(FaultError) as caught:
        check_fit(prompt, params, 100)
    fault = caught.value.fault
    assert (fault.code, fault.field) == ("context_length_exceeded", field)
    assert f"({prompt} in the messages, {wanted or 1} in the completion)" in fault.message
    assert fault.detail == {"n_prompt_tokens": prompt, "n_ctx": 100}


def test_a_folder_with_one_model_is_enough(tmp_path: Path) -> None:
    for name in ("big-00001-of-00002.gguf", "big-00002-of-00002.gguf"):
        (tmp_path / name).touch()
    assert model_path(Model(name="m"), tmp_path).name == "big-00001-of-00002.gguf"
    (tmp_path / "other-00001-of-00001.gguf").touch()
    with pytest.raises(FaultError, match="name one file"):
        model_path(Model(name="m"), tmp_path)
