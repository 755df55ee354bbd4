"""What a load will take of a GPU, and how people are told of it."""

from __future__ import annotations

import pytest

from supervisor.intake.residency import CONTEXT_BYTES, GIB, KV_BYTES_PER_TOKEN, Need, gib, need_of, short


@pytest.mark.parametrize(
    ("told", "learned", "files", "tokens", "need"),
    [
        (5, 7, 100, 10, Need(5, "operator")),
        (0, 7, 100, 10, Need(7, "learned")),
        (0, 0, 100, 10, Need(0, "learned")),
        (0, None, 1000, 2, Need(1100 + 2 * KV_BYTES_PER_TOKEN + CONTEXT_BYTES, "estimated")),
        (0, None, 0, 10, Need(0, "none")),
    ],
)
def test_the_best_source_of_a_need(told, learned, files, tokens, need):
    assert need_of(told=told, learned=learned, file_bytes=files, kv_tokens=tokens) == need


def test_numbers_and_names_for_people():
    assert gib(int(3.25 * GIB)) == "3.2 GiB"
    assert (short("GPU-one"), short("GPU-1234567890")) == ("GPU-one", "GPU-12345678…")
