"""How much an attempt may leave, by what its task kind makes: it stands in the signed URL."""

from __future__ import annotations

import re

import msgspec

from protocol.engine_wire import MAX_OUTPUT_FILES
from protocol.faults import refuse
from protocol.link_wire import RESULT_FILE
from protocol.work import Kind

MAX_OUTPUT_BYTES = 2 * 2**30  # of one file
MAX_RESULT_BYTES = 64 * 2**20  # of a result that comes as a file

_TEXT = re.compile(r"([0-9]{1,6})-([0-9]{1,15})-([0-9]{1,15})\Z")


class Bounds(msgspec.Struct, frozen=True):
    """Of one attempt, beside the file of its result, which may have `MAX_RESULT_BYTES`.

    Attributes:
        files: how many outputs.
        each: most bytes of one.
        together: most bytes of all, with what has come of those whose connection broke.
    """

    files: int
    each: int
    together: int

    def of(self, name: str, most: int = MAX_OUTPUT_BYTES) -> int:
        """Most bytes of the file with this name, where no file may have more than `most`.

        Raises:
            FaultError: payload_too_large, where there may be no such file.
        """
        if name == RESULT_FILE:
            return min(MAX_RESULT_BYTES, most)
        if not self.files:
            sentence = f"A job of this kind makes no files; a large result comes as {RESULT_FILE}."
            raise refuse("payload_too_large", sentence, "name")
        return min(self.each, most)

    @property
    def total(self) -> int:
        """Most bytes of everything."""
        return self.together + MAX_RESULT_BYTES

    def text(self) -> str:
        """As it stands in a URL."""
        return f"{self.files}-{self.each}-{self.together}"


NONE = Bounds(0, 0, 0)
WIDEST = Bounds(MAX_OUTPUT_FILES, MAX_OUTPUT_BYTES, 4 * MAX_OUTPUT_BYTES)  # whatever a program leaves
_KINDS: dict[str, Bounds] = {
    Kind.LLM: NONE,
    Kind.EMBEDDING: NONE,
    Kind.RERANK: NONE,
    Kind.AUDIO_STT: NONE,
    Kind.AUDIO_TTS: Bounds(1, 512 * 2**20, 512 * 2**20),
    Kind.IMAGE: Bounds(16, 128 * 2**20, 16 * 128 * 2**20),
    Kind.VIDEO: Bounds(1, MAX_OUTPUT_BYTES, MAX_OUTPUT_BYTES),
}


def bounds_of(kind: str) -> Bounds:
    """Of an attempt at a job of this kind."""
    return _KINDS.get(kind, WIDEST)


def parse(text: str) -> Bounds:
    """What `Bounds.text` wrote. Raises FaultError(forbidden)."""
    found = _TEXT.match(text)
    if found is None:
        raise refuse("forbidden", "The URL does not say how much may be left; ask for a new one.")
    return Bounds(int(found[1]), int(found[2]), int(found[3]))
