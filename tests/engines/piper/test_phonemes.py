"""Text becomes pieces: all of it, none too long, and none without a sound."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engines.piper import phonemes
from protocol.faults import FaultError

KNOWN = {letter: [number] for number, letter in enumerate("_^$ abcdefgh.,!?'")}


class Voice:
    """Phonemes are characters, sentences are lines."""

    config = SimpleNamespace(phoneme_id_map=KNOWN)

    def phonemize(self, text: str) -> list[list[str]]:
        return [list(line) for line in text.split("\n")]

    def phonemes_to_ids(self, piece: list[str]) -> list[int]:
        return [KNOWN[phoneme][0] for phoneme in piece]


def spoken(text: str) -> list[str]:
    letters = {number[0]: letter for letter, number in KNOWN.items()}
    return ["".join(letters[number] for number in piece) for piece in phonemes.pieces(Voice(), text)]


def test_one_piece_per_sentence():
    assert spoken("abc.\nde, f!") == ["abc.", "de, f!"]


def test_what_the_voice_does_not_know_is_left_out():
    assert spoken("aÄb\N{GRINNING FACE}") == ["ab"]


def test_sentences_without_a_sound_are_left_out():
    assert spoken("ab\n...\n\n!?\ncd") == ["ab", "cd"]


@pytest.mark.parametrize("text", ["...", "!?", " ", "\N{GRINNING FACE}", "ÄÖÜ", "' '", ""])
def test_a_text_without_a_sound_is_the_callers_fault(text):
    with pytest.raises(FaultError, match=r"nothing in .* that this voice can say") as caught:
        phonemes.pieces(Voice(), text)
    assert (caught.value.fault.code, caught.value.fault.field) == ("invalid_parameter", "text")


def test_a_long_text_is_quoted_short():
    with pytest.raises(FaultError) as caught:
        phonemes.pieces(Voice(), "." * 5000)
    assert len(caught.value.fault.message) < 120


@pytest.mark.parametrize(("text", "reason"), [("a\0b", "NUL"), ("a\ud800", "position 1 is half of a surrogate")])
def test_text_that_native_code_cannot_take(text, reason):
    with pytest.raises(FaultError, match=reason) as caught:
        phonemes.check_text(text)
    assert (caught.value.fault.code, caught.value.fault.field) == ("invalid_parameter", "text")


def test_good_text_passes():
    phonemes.check_text("ünï 世界 \N{GRINNING FACE}")


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("aaaa. bb, cc dd", ["aaaa. bb,", " cc dd"]),  # a full stop in the first half would leave a crumb
        ("aaaaaaa. bb cc dd", ["aaaaaaa.", " bb cc dd"]),
        ("aaaaaa, bb cc dd", ["aaaaaa,", " bb cc dd"]),
        ("aaaaaa bb cc dd", ["aaaaaa bb ", "cc dd"]),
        ("aaaaaaaaaaaaaaa", ["aaaaaaaaaa", "aaaaa"]),
    ],
)
def test_where_a_long_sentence_is_cut(text, pieces):
    found = ["".join(piece) for piece in phonemes.split(text, 10)]
    assert found == pieces


@given(st.text(alphabet="ab .,!?", max_size=400), st.integers(2, 40))
def test_cutting_loses_nothing_and_keeps_the_limit(text, most):
    found = list(phonemes.split(text, most))
    assert "".join("".join(piece) for piece in found) == text
    assert all(1 <= len(piece) <= most for piece in found)
