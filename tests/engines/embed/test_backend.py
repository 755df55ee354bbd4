from __future__ import annotations

from typing import Any

import pytest

from engines.embed.backend import check_request, check_vocabulary, read_options
from engines.runtime.contract import Model
from protocol.faults import FaultError
from protocol.work import EmbeddingParams


class Eight:
    """A backend of eight dimensions whose texts have as many tokens as letters."""

    ready: Any = None
    dimensions = 8
    max_tokens = 5

    def lengths(self, items: Any) -> list[int]:
        return [len(item.strip()) for item in items]

    def run(self, job: Any) -> Any:
        raise AssertionError

    def cancel(self, job: Any) -> None:
        raise AssertionError


def refusal(matryoshka: bool = False, **params: Any) -> tuple[str, str | None]:
    with pytest.raises(FaultError) as caught:
        check_request(EmbeddingParams(**params), Eight(), matryoshka=matryoshka)
    return caught.value.fault.code, caught.value.fault.field


def test_refusals() -> None:
    assert refusal(input=["ok", "too long"]) == ("context_length_exceeded", "input.1")
    assert refusal(input=[" "]) == ("invalid_parameter", "input.0")
    assert refusal(input=["ok"], dimensions=4) == ("unsupported", "dimensions")
    assert refusal(input=["ok"], dimensions=9, matryoshka=True) == ("invalid_parameter", "dimensions")


@pytest.mark.parametrize(("dimensions", "matryoshka"), [(None, False), (8, False), (4, True)])
def test_good_requests_pass(dimensions: int | None, matryoshka: bool) -> None:
    check_request(EmbeddingParams(input=["12345"], dimensions=dimensions), Eight(), matryoshka=matryoshka)


def test_vocabulary() -> None:
    check_vocabulary([[0, 9], "text"], 10)
    with pytest.raises(FaultError, match=r"input\.1: token 10"):
        check_vocabulary([[0], [10]], 10)


def test_options_have_defaults_and_names() -> None:
    assert read_options(Model(name="m")).batch_size == 32
    with pytest.raises(FaultError, match="n_gpu_layers"):
        read_options(Model(name="m", options={"n_gpu_layers": 1}))
    assert read_options(Model(name="m", options={"n_gpu_layers": 1}), ("n_gpu_layers",)).pooling is None
