"""Ids sort by time, are safe as folder names, and depend on nothing but what is handed in."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.ids import MAX_ID_BYTES, RANDOM_BYTES, is_safe_id, model_revision, new_id

_TIME = st.integers(0, 2**48 - 1)
_RANDOM = st.binary(min_size=RANDOM_BYTES, max_size=RANDOM_BYTES)


@given(_TIME, _RANDOM)
def test_an_id_is_safe_and_repeatable(now, random):
    made = new_id("job", now, random)
    assert made == new_id("job", now, random)
    assert len(made) == 30
    assert is_safe_id(made)


@given(_TIME, _TIME, _RANDOM, _RANDOM)
def test_ids_sort_by_time(first, second, one, other):
    if first != second:
        assert (new_id("j", first, one) < new_id("j", second, other)) == (first < second)


@given(_TIME, _RANDOM, _RANDOM)
def test_other_randomness_is_another_id(now, one, other):
    assert (new_id("j", now, one) == new_id("j", now, other)) == (one == other)


@pytest.mark.parametrize("random", [b"", bytes(9), bytes(11)])
def test_the_randomness_must_be_whole(random):
    with pytest.raises(ValueError, match="need 10 random bytes"):
        new_id("j", 0, random)


@pytest.mark.parametrize("text", ["a", "job_01", "A-b.c:d_e", "a" * MAX_ID_BYTES])
def test_safe(text):
    assert is_safe_id(text)


@pytest.mark.parametrize(
    "text",
    ["", ".", "..", ".a", "-a", "_a", "a/b", "a\\b", "a b", "a\n", "a\0", "é", "٣", "a" * (MAX_ID_BYTES + 1), "a%2f"],
)
def test_unsafe(text):
    assert not is_safe_id(text)


@given(st.text(max_size=140))
def test_whatever_is_safe_is_a_plain_file_name(text):
    if is_safe_id(text):
        assert text.isascii()
        assert "/" not in text
        assert text not in (".", "..")
        assert len(text.encode()) <= MAX_ID_BYTES


def test_a_revision_depends_on_files_and_config_and_not_on_their_order():
    first = model_revision({"model": "a", "voice": "b"}, {"n_ctx": 1, "deep": {"x": 1, "y": 2}})
    assert first == model_revision({"voice": "b", "model": "a"}, {"deep": {"y": 2, "x": 1}, "n_ctx": 1})
    others = [
        model_revision({"model": "a", "voice": "c"}, {"n_ctx": 1, "deep": {"x": 1, "y": 2}}),
        model_revision({"model": "a"}, {"n_ctx": 1, "deep": {"x": 1, "y": 2}}),
        model_revision({"model": "a", "voice": "b"}, {"n_ctx": 2, "deep": {"x": 1, "y": 2}}),
        model_revision({"model": "b", "voice": "a"}, {"n_ctx": 1, "deep": {"x": 1, "y": 2}}),
    ]
    assert len({first, *others}) == 5
    assert len(first) == 64
