"""The coordinator's log: one line per event as text or JSON, one line per job, and never what callers wrote.

The fields of a JSON line have the names that the supervisor's have: ts, level, logger, message, then what the line is
about (job, attempt, model, …). A job's line says how it ended and whose fault it was; prompts, results and messages of
faults, which may quote them, are in no line of it.
"""

from __future__ import annotations

import logging
import sys
import time
from collections import OrderedDict
from contextvars import ContextVar
from typing import Literal, TextIO

import msgspec

from coordinator.records import JobRecord
from protocol.faults import FaultError

LEVELS = ("debug", "info", "warning", "error")
Format = Literal["text", "json"]
Level = Literal["debug", "info", "warning", "error"]
# Libraries that tell of every request at INFO.
CHATTY = ("uvicorn.error", "httpx", "psycopg.pool", "opentelemetry")
REMEMBERED = 10_000  # requests whose jobs have not ended; after that, the line goes without
TEXT = "%(asctime)s %(levelname)s %(name)s: %(message)s"

# The id of the request that the current task answers; "" outside of any.
REQUEST: ContextVar[str] = ContextVar("bulkhead_request", default="")

access_log = logging.getLogger("coordinator.access")
job_log = logging.getLogger("coordinator.jobs")

_STANDARD = frozenset(vars(logging.LogRecord("", 0, "", 0, "", None, None))) | {"message", "asctime", "taskName"}


def extras(record: logging.LogRecord) -> dict[str, object]:
    """What a caller added with `extra=`."""
    return {key: value for key, value in vars(record).items() if key not in _STANDARD}


class TextFormatter(logging.Formatter):
    """`2026-11-21 10:11:12,345 INFO logger: sentence` with `key=value` for what came as `extra`."""

    def __init__(self) -> None:
        super().__init__(TEXT)

    def formatMessage(self, record: logging.LogRecord) -> str:
        """The line, without a traceback."""
        words = [f"{key}={_word(value)}" for key, value in extras(record).items()]
        return " ".join([super().formatMessage(record), *words])


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
        if record.exc_info and record.exc_info[0]:
            fields["traceback"] = self.formatException(record.exc_info)
        return msgspec.json.encode(fields, enc_hook=str).decode()


def _word(value: object) -> str:
    """A value that cannot break out of its line, nor look like two."""
    text = "".join(letter if letter.isprintable() else "?" for letter in str(value))
    return msgspec.json.encode(text).decode() if not text or " " in text or '"' in text else text


class _StandardError(logging.StreamHandler[TextIO]):
    """To what is standard error when a line is told."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record."""
        self.stream = sys.stderr
        super().emit(record)


def set_up(form: Format = "text", level: Level = "info", *, access: bool = False, stream: TextIO | None = None) -> None:
    """Let everything go to standard error from now on; calling it again replaces what was set up before."""
    root = logging.getLogger()
    handler = logging.StreamHandler(stream) if stream is not None else _StandardError()
    handler.setFormatter(JsonFormatter() if form == "json" else TextFormatter())
    handler.set_name("coordinator")
    for old in [one for one in root.handlers if one.get_name() == "coordinator"]:
        root.removeHandler(old)
    root.addHandler(handler)
    set_level(level)
    access_log.disabled = not access


def trouble(log: logging.Logger, error: Exception, words: str) -> None:
    """Tell of trouble that passes, and comes again as long as it lasts: a full disk, a database that is away.

    What has a sentence for clients needs no traceback; a day without the database would fill a disk with them.
    """
    log.error("%s: %s", words, error, exc_info=None if isinstance(error, FaultError) else error)


def set_level(level: str) -> None:
    """Change what is told. Raises ValueError for what is no level."""
    if level not in LEVELS:
        raise ValueError(f"level must be one of {', '.join(LEVELS)}, not {level!r}")
    number: int = getattr(logging, level.upper())
    logging.getLogger().setLevel(number)
    for name in CHATTY:
        logging.getLogger(name).setLevel(logging.DEBUG if level == "debug" else logging.WARNING)


def level_now() -> str:
    """The level in force."""
    return logging.getLevelName(logging.getLogger().level).lower()


class JobLines:
    """One line per job, when it ends. Knows of each open job which request asked for it, if that was answered here."""

    def __init__(self) -> None:
        self._asked: OrderedDict[str, str] = OrderedDict()

    def asked(self, job: str) -> None:
        """The current request has made this job."""
        if request := REQUEST.get():
            self._asked[job] = request
            while len(self._asked) > REMEMBERED:
                self._asked.popitem(last=False)

    def ended(self, record: JobRecord) -> None:
        """Say how it ended, at INFO; a fault of ours or of a worker's at WARNING."""
        request = self._asked.pop(record.id, "")
        fault = record.fault
        owner = str(fault.owner) if fault is not None else ""
        level = logging.WARNING if record.state == "failed" and owner != "caller" else logging.INFO
        if job_log.isEnabledFor(level):
            about = _about(record) | {"request": request, "fault": fault.code if fault else "", "owner": owner}
            job_log.log(
                level, "Job %s", record.state, extra={key: value for key, value in about.items() if value != ""}
            )


def _about(record: JobRecord) -> dict[str, object]:
    ended, began = record.finished_ms or record.created_ms, record.started_ms
    about: dict[str, object] = {
        "job": record.id,
        "attempt": record.attempt,
        "model": record.model,
        "kind": record.kind,
        "outcome": record.state,
        "tenant": record.tenant,
        "key": record.key_id,
        "worker": record.worker,
        "tries": record.tries,
        "waited_s": round(((began or ended) - record.created_ms) / 1000, 3),
        "ran_s": round((ended - began) / 1000, 3) if began else 0.0,
    }
    tokens = {name: int(record.usage[name]) for name in ("prompt_tokens", "completion_tokens") if name in record.usage}
    return about | tokens
