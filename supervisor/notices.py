"""The supervisor's log: stderr, as text for people or as JSON lines for programs.

Under systemd the journal adds the time and reads the severity from a `<3>` prefix, so the text form leaves the
time out there and writes the prefix instead.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Mapping
from typing import TextIO

import msgspec

from supervisor.settings import LogTable

_SEVERITY = {logging.DEBUG: 7, logging.INFO: 6, logging.WARNING: 4, logging.ERROR: 3, logging.CRITICAL: 2}
# Attributes of every LogRecord; what a caller adds with `extra=` is what remains.
_STANDARD = frozenset(vars(logging.LogRecord("", 0, "", 0, "", (), None))) | {"message", "asctime", "taskName"}
# Libraries that tell of every request at INFO; theirs is our DEBUG.
_CHATTY = ("httpx", "httpcore", "trio-websocket")


class TextFormatter(logging.Formatter):
    """`2026-11-21 10:11:12.345 warning link: sentence` with `key=value` for what came as `extra`."""

    def __init__(self, *, journal: bool = False) -> None:
        super().__init__()
        self._journal = journal

    def format(self, record: logging.LogRecord) -> str:
        """One line; a traceback follows on lines of its own."""
        words = [record.levelname.lower(), _short(record.name) + ":", record.getMessage()]
        words += [f"{key}={value}" for key, value in _extras(record).items()]
        line = " ".join(words)
        if record.exc_info:
            line += "\n" + self.formatException(record.exc_info)
        if not self._journal:
            stamp = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(record.created))
            return f"{stamp}.{int(record.msecs):03d} {line}"
        prefix = f"<{_SEVERITY.get(record.levelno, 6)}>"
        return "\n".join(prefix + part for part in line.split("\n"))


class JsonFormatter(logging.Formatter):
    """One JSON object a line: ts (RFC 3339, UTC), level, logger, message, then what came as `extra`."""

    def format(self, record: logging.LogRecord) -> str:
        """One line, always: a traceback is the field `traceback`."""
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        fields: dict[str, object] = {
            "ts": f"{stamp}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        fields |= _extras(record)
        if record.exc_info:
            fields["traceback"] = self.formatException(record.exc_info)
        return msgspec.json.encode(fields, enc_hook=str).decode()


def _extras(record: logging.LogRecord) -> dict[str, object]:
    return {key: value for key, value in vars(record).items() if key not in _STANDARD}


def _short(name: str) -> str:
    return name.removeprefix("supervisor.")


def set_up(table: LogTable, stream: TextIO | None = None, environ: Mapping[str, str] = os.environ) -> None:
    """Send all logging to `stream` (stderr), in the form that `[log]` asks for; replaces an earlier set-up."""
    target = sys.stderr if stream is None else stream
    formatter: logging.Formatter = JsonFormatter()
    if table.format == "text":
        formatter = TextFormatter(journal="JOURNAL_STREAM" in environ and stream is None)
    sink = logging.StreamHandler(target)
    sink.setFormatter(formatter)
    root = logging.getLogger()
    for old in list(root.handlers):
        root.removeHandler(old)
    root.addHandler(sink)
    root.setLevel(table.level.upper())
    for name in _CHATTY:
        logging.getLogger(name).setLevel(logging.DEBUG if table.level == "debug" else logging.WARNING)
