"""The supervisor's log: stderr, as text for people or as JSON lines for programs; a file; a ring for readers.

Under systemd the journal adds the time and reads the severity from a `<3>` prefix, so the text form leaves the
time out there and writes the prefix instead.
"""

from __future__ import annotations

import atexit
import logging
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TextIO

import msgspec

from supervisor.observe.funnel import Funnel, Sink, extras
from supervisor.observe.levels import Levels
from supervisor.observe.logfile import LogFile
from supervisor.observe.ring import Ring
from supervisor.observe.sentry import start_sentry
from supervisor.settings import LogTable

log = logging.getLogger(__name__)

_SEVERITY = {logging.DEBUG: 7, logging.INFO: 6, logging.WARNING: 4, logging.ERROR: 3, logging.CRITICAL: 2}


class TextFormatter(logging.Formatter):
    """`2026-11-21 10:11:12.345 warning link: sentence` with `key=value` for what came as `extra`."""

    def __init__(self, *, journal: bool = False) -> None:
        super().__init__()
        self._journal = journal

    def format(self, record: logging.LogRecord) -> str:
        """One line; a traceback follows on lines of its own."""
        words = [record.levelname.lower(), _short(record.name) + ":", record.getMessage()]
        words += [f"{key}={value}" for key, value in extras(record).items()]
        line = " ".join(words)
        if trace := _trace(self, record):
            line += "\n" + trace
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
        fields |= extras(record)
        if trace := _trace(self, record):
            fields["traceback"] = trace
        return msgspec.json.encode(fields, enc_hook=str).decode()


def _trace(formatter: logging.Formatter, record: logging.LogRecord) -> str:
    """The traceback; the funnel has made it text already."""
    if record.exc_text:
        return record.exc_text
    return formatter.formatException(record.exc_info) if record.exc_info and record.exc_info[0] else ""


def _short(name: str) -> str:
    return name.removeprefix("supervisor.")


class Log:
    """The log that is set up.

    Attributes:
        ring: the latest lines, for readers.
        levels: the level in force.
        funnel: what every line goes through.
        file: None when `[log]` names none.
    """

    def __init__(self, table: LogTable, stream: logging.StreamHandler[TextIO], *, journal: bool = False) -> None:
        self.ring = Ring()
        self.levels = Levels(table.level)
        self.file = _file_of(table)
        self._table, self._stream, self._journal = table, stream, journal
        stream.setFormatter(_formatter(table, journal))
        sinks: list[Sink] = [_Stream(stream), _Ring(self.ring)]
        if self.file is not None:
            sinks.append(_File(self.file))
        self._sinks = sinks
        self._sentry = start_sentry(Path(table.sentry_dsn_file)) if table.sentry_dsn_file else None
        if self._sentry is not None:
            sinks.append(self._sentry)
        self.funnel = Funnel(self.levels, sinks)

    def apply(self, table: LogTable) -> None:
        """Go on in another form, or with another file; the level and Sentry stay. What the old file lacks is written.

        Waits for that at most `logfile.CLOSE_S`.
        """
        self._stream.setFormatter(_formatter(table, self._journal))
        if (table.file, table.max_mb, table.keep) != (self._table.file, self._table.max_mb, self._table.keep):
            old, self.file = self.file, None
            self._sinks[:] = [sink for sink in self._sinks if not isinstance(sink, _File)]
            if old is not None:
                old.close()
            self.file = _file_of(table)
            if self.file is not None:
                self._sinks.append(_File(self.file))
        self._table = table

    def dropped(self) -> Mapping[str, int]:
        """Sink -> lines that it did not get."""
        lost = {"repeats": self.funnel.repeated, "sinks": self.funnel.failed}
        return lost if self.file is None else {**lost, "file": self.file.dropped}

    def close(self) -> None:
        """Say and write what is left; bounded by `logfile.CLOSE_S` and `sentry.CLOSE_S`."""
        self.funnel.flush()
        if self.file is not None:
            self.file.close()
        if self._sentry is not None:
            self._sentry.close()


def _file_of(table: LogTable) -> LogFile | None:
    return LogFile(Path(table.file), int(table.max_mb * 2**20), table.keep) if table.file else None


def _formatter(table: LogTable, journal: bool) -> logging.Formatter:
    return TextFormatter(journal=journal) if table.format == "text" else JsonFormatter()


class _Stream:
    def __init__(self, stream: logging.StreamHandler[TextIO]) -> None:
        self._stream = stream

    def take(self, record: logging.LogRecord) -> None:
        if not self._stream.stream.closed:  # what is said at the very end may have nowhere to go
            self._stream.handle(record)


class _Ring:
    def __init__(self, ring: Ring) -> None:
        self._ring = ring

    def take(self, record: logging.LogRecord) -> None:
        self._ring.add(record, extras(record))


class _File:
    def __init__(self, file: LogFile) -> None:
        self._file, self._form = file, JsonFormatter()

    def take(self, record: logging.LogRecord) -> None:
        self._file.put(self._form.format(record))


_log: Log | None = None


def set_up(table: LogTable, stream: TextIO | None = None, environ: Mapping[str, str] = os.environ) -> Log:
    """Send all logging to `stream` (stderr) in the form that `[log]` asks for, to its file, and to readers.

    Replaces an earlier set-up, and closes it.

    Raises:
        ConfigError: Sentry is asked for and cannot be had.
    """
    global _log
    sink = logging.StreamHandler(sys.stderr if stream is None else stream)
    made = Log(table, sink, journal="JOURNAL_STREAM" in environ and stream is None)
    if _log is None:
        atexit.register(close)
    else:
        _log.close()
    root = logging.getLogger()
    for old in list(root.handlers):
        root.removeHandler(old)
    root.addHandler(made.funnel)
    _log = made
    return made


def close() -> None:
    """Write what is left of the log; for the end of the process."""
    if _log is not None:
        _log.close()


def set_level(level: str, for_s: float | None = None) -> None:
    """Change the level of the running process, for good or for so many seconds.

    Raises:
        ValueError: there is no such level, or `for_s` is not above 0.
        RuntimeError: no log is set up.
    """
    if _log is None:
        raise RuntimeError("there is no log yet whose level could be changed")
    _log.levels.set(level, for_s)
    log.info("log level %s%s", level, f" for {for_s:g} s" if for_s is not None else "")
