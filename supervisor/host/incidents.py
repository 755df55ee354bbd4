"""What is kept of an instance that ended badly: one JSON file per incident, for the operator.

An incident says how it ended, what the watchdog saw, which runs were in flight (by label: job and attempt), the last
lines of stderr and the stacks of the engine's threads. It never holds a prompt, an input or an output. What an engine
writes on its stderr is taken as it is; an engine that prints prompts there would put them here, so the files are for
the owner alone (mode 0600).
"""

from __future__ import annotations

import contextlib
import datetime
import logging
import os
import re
import secrets
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

log = logging.getLogger(__name__)

# How many are kept, and how large one may be: 50 x 64 KiB is all the disk that this can take.
KEPT = 50
MAX_BYTES = 64 * 2**10
_MAX_LINES = 200
_MAX_LINE = 512
_SUFFIX = ".json"
_PARTIAL = ".partial"

# How faulthandler begins a stack, in the words of Python 3.11 to 3.14; the lines of a stack are indented.
_HEADING = re.compile(
    r"^(Fatal Python error: |Timeout \(|(Current thread|Thread) 0x[0-9a-f]+|.*\(most recent call first\):$)"
)
_FRAME = re.compile(r"^  (File |Binary file |<|\.\.\.)")
_OLD_S = 60.0


class Incident(msgspec.Struct, frozen=True, kw_only=True):
    """One bad end of an instance.

    Attributes:
        time: UTC, ISO 8601.
        how: how the process ended, as a phrase ("killed by SIGSEGV").
        diagnosis: what the watchdog thought it was doing.
        facts: what the watchdog saw.
        code, message: of the fault that its runs got.
        stacks: stacks of its threads, as faulthandler wrote them.
        stderr: the last lines, without the stacks.
        runs: labels of the runs in flight.
        sandbox: layer -> verdict.
        gpus: readings of its GPUs, as they were given.
    """

    model: str
    engine: str
    time: str = ""
    pid: int = 0
    how: str = ""
    diagnosis: str = ""
    facts: Mapping[str, Any] = {}
    code: str = ""
    message: str = ""
    stacks: tuple[str, ...] = ()
    stderr: tuple[str, ...] = ()
    runs: tuple[str, ...] = ()
    sandbox: Mapping[str, str] = {}
    gpus: tuple[Mapping[str, Any], ...] = ()


def now_utc() -> str:
    """This moment as `Incident.time` wants it."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")


def stack_dump(lines: Iterable[str]) -> list[str]:
    """The lines that faulthandler wrote, out of all that an engine wrote on stderr; blank ones left out."""
    return [line for line, inside in _marked(lines) if inside]


def without_stacks(lines: Iterable[str]) -> list[str]:
    """The other lines."""
    return [line for line, inside in _marked(lines) if not inside]


def _marked(lines: Iterable[str]) -> list[tuple[str, bool]]:
    marked, inside = [], False
    for line in lines:
        inside = bool(_HEADING.match(line)) or (inside and bool(_FRAME.match(line)))
        marked.append((line, inside))
    return marked


class Incidents:
    """The folder that they are kept in. Its calls touch the disk for a moment; nothing they meet there is raised."""

    def __init__(self, folder: Path, *, kept: int = KEPT) -> None:
        self._folder = folder
        self._kept = kept

    def keep(self, incident: Incident) -> Path | None:
        """Write one and drop the oldest; None when the disk would not have it."""
        if not incident.time:
            incident = msgspec.structs.replace(incident, time=now_utc())
        stamp = re.sub(r"[^0-9T]", "", incident.time[:23])
        path = self._folder / f"{stamp}-{secrets.token_hex(3)}{_SUFFIX}"
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            _write(path, _encoded(incident))
            self._prune()
        except OSError as error:
            log.warning("An incident of %s could not be kept: %s.", incident.model, error.strerror)
            return None
        return path

    def recent(self, count: int = 10) -> list[Incident]:
        """The newest first; files that cannot be read are left out."""
        found: list[Incident] = []
        for path in reversed(self._files()):
            if len(found) >= count:
                break
            with contextlib.suppress(OSError, msgspec.MsgspecError):
                found.append(msgspec.json.decode(path.read_bytes(), type=Incident))
        return found

    def _files(self) -> list[Path]:
        try:
            return sorted(path for path in self._folder.iterdir() if path.suffix == _SUFFIX)
        except OSError:
            return []

    def _prune(self) -> None:
        for path in self._files()[: -self._kept]:
            path.unlink(missing_ok=True)
        for path in self._folder.glob(f"*{_PARTIAL}"):  # of a supervisor that was killed while it wrote
            if path.stat().st_mtime < time.time() - _OLD_S:
                path.unlink(missing_ok=True)


def _encoded(incident: Incident) -> bytes:
    """As JSON of at most `MAX_BYTES`: long lines are cut, then the oldest lines of stderr and stacks go."""
    lines = _MAX_LINES
    while True:
        short = msgspec.structs.replace(
            incident,
            message=incident.message[: 8 * _MAX_LINE],
            stacks=_cut(incident.stacks[:lines]),
            stderr=_cut(incident.stderr[-lines:] if lines else ()),
            runs=_cut(incident.runs[:lines]),
        )
        data = msgspec.json.format(msgspec.json.encode(short), indent=2) + b"\n"
        if len(data) <= MAX_BYTES:
            return data
        if not lines:  # it is not the lines: keep what fits on a page
            incident = msgspec.structs.replace(incident, facts={}, gpus=(), sandbox={}, how=incident.how[:_MAX_LINE])
        if not lines and not (short.facts or short.gpus or short.sandbox):
            return data
        lines //= 2


def _cut(lines: Sequence[str]) -> tuple[str, ...]:
    return tuple(line[:_MAX_LINE] for line in lines)


def _write(path: Path, data: bytes) -> None:
    partial = path.with_suffix(_PARTIAL)
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
