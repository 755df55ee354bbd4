from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engines.embed.vectors import batches, normalised, pool, result
from protocol.faults import FaultError

STATES = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
MASK = np.array([[1, 1, 1], [1, 1, 0]])


def test_mean_leaves_out_the_padding() -> None:
    assert np.array_equal(pool(STATES, MASK, "mean"), [STATES[0].mean(0), STATES[1, :2].mean(0)])


def test_cls_is_the_first_token() -> None:
    assert np.array_equal(pool(STATES, MASK, "cls"), STATES[:, 0])


def test_last_is_the_last_token_before_the_padding() -> None:
    assert np.array_equal(pool(STATES, MASK, "last"), [STATES[0, 2], STATES[1, 1]])


def test_half_precision_is_summed_in_full() -> None:
    states = np.full((1, 4000, 1), 30, np.float16)
    assert pool(states, np.ones((1, 4000), np.int64), "mean")[0, 0] == 30


@pytest.mark.parametrize("row", [[0, 0], [float("nan"), 1], [float("inf"), 1]])
def test_a_vector_without_direction_is_a_fault(row: list[float]) -> None:
    with pytest.raises(FaultError, match="without a direction"):
        normalised(np.array([[1, 0], row], np.float32))


def test_result_is_packed_row_by_row() -> None:
    found = result(np.array([[3, 4, 0], [0, 0, 2]], np.float32), None)
    assert (found.count, found.dimensions) == (2, 3)
    assert np.allclose(np.frombuffer(found.vectors, "<f4"), [0.6, 0.8, 0, 0, 0, 1])


def test_shortened_vectors_have_length_1() -> None:
    found = result(np.array([[3, 4, 100]], np.float32), 2)
    assert np.allclose(np.frombuffer(found.vectors, "<f4"), [0.6, 0.8])


@given(st.lists(st.integers(1, 50), max_size=60), st.integers(1, 8), st.integers(1, 120))
def test_batches_keep_their_bounds_and_lose_nothing(lengths: list[int], rows: int, tokens: int) -> None:
    found = list(batches(lengths, rows=rows, tokens=tokens))
    assert sorted(index for batch in found for index in batch) == list(range(len(lengths)))
    for batch in found:
        assert len(batch) <= rows
        assert len(batch) == 1 or len(batch) * max(lengths[index] for index in batch) <= tokens
