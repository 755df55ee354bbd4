"""What an engine told, made fit to be passed on: bounded, plain, and saying nothing that only we may say.

An engine's words reach callers, logs, terminals and the coordinator's store. A hostile model may choose them.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Mapping

import msgspec

from protocol.faults import CODES, Fault, Owner

MAX_MESSAGE_CHARS = 2000
MAX_NAME_CHARS = 200
MAX_DETAIL_BYTES = 64 * 1024
MAX_USAGE_KEYS = 64
# Of a log: enough for a library that explains itself while it loads.
LINES_PER_S = 50.0
LINES_AT_ONCE = 500.0
_CODE = re.compile(r"[a-z][a-z0-9_]{0,63}\Z")
# What the host and the coordinator conclude from; an engine has no say in it.
_OURS = frozenset({"alone", "suspects", "end", "attempts", "crashes", "last_code", "diagnosis", "cause"})


def text(words: str, most: int = MAX_MESSAGE_CHARS) -> str:
    """One paragraph of at most `most` characters; what could paint a terminal becomes a space."""
    cut = words[:most]
    return "".join(char if char.isprintable() else " " for char in cut) + ("…" if len(words) > most else "")


def fault(said: Fault) -> Fault:
    """A fault of an engine: its code may blame the caller or the engine, nobody else."""
    detail = {name: value for name, value in said.detail.items() if name not in _OURS}
    if len(msgspec.msgpack.encode(detail)) > MAX_DETAIL_BYTES:
        detail = {"hint": "The engine's detail was too large and is left out."}
    code = said.code
    if not _CODE.match(code) or (code in CODES and CODES[code].owner not in (Owner.CALLER, Owner.ENGINE)):
        detail["code"] = text(code, MAX_NAME_CHARS)
        code = "engine_failed"
    field = None if said.field is None else text(said.field, MAX_NAME_CHARS)
    return Fault(code, text(said.message), field=field, retryable=said.retryable, detail=detail)


def usage(said: Mapping[str, float]) -> dict[str, float]:
    """Counts that can be added up: finite, not negative, not too many."""
    names = [name for name in said if len(name) <= MAX_NAME_CHARS and name.isprintable()][:MAX_USAGE_KEYS]
    return {name: said[name] for name in names if math.isfinite(said[name]) and said[name] >= 0}


class LogGate:
    """Lets so many log lines of an engine through, and counts the rest.

    Args:
        clock: seconds, monotonic.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._left = LINES_AT_ONCE
        self._at = clock()
        self.dropped = 0

    def admit(self) -> int | None:
        """None when this line is dropped; else how many were dropped before it."""
        now = self._clock()
        self._left = min(LINES_AT_ONCE, self._left + (now - self._at) * LINES_PER_S)
        self._at = now
        if self._left < 1.0:
            self.dropped += 1
            return None
        self._left -= 1.0
        dropped, self.dropped = self.dropped, 0
        return dropped
