"""From text to pieces of phoneme ids, each small enough to compute."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from protocol.faults import FaultError, refuse

# Memory grows with the square of a piece: 100,000 characters in one sentence are an allocation error. Spoken
# sentences have 50 to 200 phonemes, so only monsters are cut.
MAX_PHONEMES = 300

_STRONG, _WEAK, _SPACE = frozenset(".!?。！？"), frozenset(",;:、，；："), frozenset(" \n\t")


def check_text(text: str) -> None:
    """Refuse what the native code below cannot take as a string. Raises FaultError, field "text"."""
    if "\0" in text:
        raise refuse("invalid_parameter", "text: it holds a NUL character.", "text")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        what = f"text: the character at position {error.start} is half of a surrogate pair."
        raise refuse("invalid_parameter", what, "text") from None


def pieces(voice: Any, text: str) -> list[list[int]]:
    """Return phoneme ids: one list per sentence, several for a sentence of over `MAX_PHONEMES`.

    Raises:
        FaultError: `invalid_parameter`, field "text": nothing in it makes a sound in this voice.
    """
    known = voice.config.phoneme_id_map
    sentences = [[phoneme for phoneme in sentence if phoneme in known] for sentence in voice.phonemize(text)]
    if not any(_sounds(phoneme) for sentence in sentences for phoneme in sentence):
        raise _silent(text)
    cut = [piece for sentence in sentences for piece in split(sentence) if any(map(_sounds, piece))]
    return [voice.phonemes_to_ids(piece) for piece in cut]


def _sounds(phoneme: str) -> bool:
    """Letters, digits and IPA signs sound; punctuation and spaces only shape what is said."""
    return any(character.isalnum() for character in phoneme)


def _silent(text: str) -> FaultError:
    shown = text if len(text) <= 40 else text[:40] + "…"
    return refuse("invalid_parameter", f"text: there is nothing in {shown!r} that this voice can say.", "text")


def split(sentence: Sequence[str], most: int = MAX_PHONEMES) -> Iterator[list[str]]:
    """Cut an over-long sentence after its last full stop, else comma, else space within the limit."""
    rest = list(sentence)
    while len(rest) > most:
        at = _cut(rest[:most])
        yield rest[:at]
        rest = rest[at:]
    if rest:
        yield rest


def _cut(window: Sequence[str]) -> int:
    """Where to cut: the second half only, so that pieces do not become crumbs."""
    for marks in (_STRONG, _WEAK, _SPACE):
        for at in range(len(window), len(window) // 2, -1):
            if window[at - 1] in marks:
                return at
    return len(window)
