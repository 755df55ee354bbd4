"""Errors to Sentry, only when `[log] sentry_dsn_file` names a DSN.

The SDK is imported only then (it costs 0.3 s and tens of MB), and everything it would gather by itself is off: no
default integrations, no local variables, no host name, no breadcrumbs, no request bodies, no tracing. It gets what the
funnel made: a sentence and a traceback that are redacted already; `scrubbed` looks once more at what leaves. What the
SDK's own thread cannot deliver is dropped by it.
"""

from __future__ import annotations

import importlib
import logging
from pathlib import Path
from typing import Any

from supervisor.errors import ConfigError
from supervisor.observe.levels import CHATTY
from supervisor.observe.redact import safe
from supervisor.version import version

CLOSE_S = 2.0
# Parts of an event that may leave, after `safe`; everything else the SDK adds (modules, user, request, …) stays.
_KEPT = ("event_id", "timestamp", "level", "logger", "logentry", "tags", "release", "platform", "fingerprint")


class Sentry:
    """A sink of the funnel for errors and worse.

    Args:
        sdk: the module `sentry_sdk`, with a client that is started.
    """

    def __init__(self, sdk: Any) -> None:
        self._sdk = sdk

    def take(self, record: logging.LogRecord) -> None:
        """Hand an error to the SDK, which sends it from a thread of its own."""
        # An exporter that fails must not report its failure through itself.
        if record.levelno >= logging.ERROR and record.name.split(".")[0] not in CHATTY:
            self._sdk.capture_event(event_of(record))

    def close(self) -> None:
        """Send what is left, for at most `CLOSE_S`."""
        self._sdk.get_client().close(timeout=CLOSE_S)


def event_of(record: logging.LogRecord) -> dict[str, Any]:
    """A redacted record as an event; job, attempt, model and engine are its tags."""
    tags = {name: str(getattr(record, name)) for name in ("job", "attempt", "model", "engine") if hasattr(record, name)}
    event: dict[str, Any] = {
        "level": "fatal" if record.levelno >= logging.CRITICAL else "error",
        "logger": record.name,
        "logentry": {"formatted": record.getMessage()},
        "tags": tags,
    }
    if record.exc_text:
        # As text: frames would bring local variables and paths along.
        event["logentry"]["formatted"] += "\n\n" + record.exc_text
        event["fingerprint"] = ["{{ default }}", record.exc_text.rstrip().rsplit("\n", 1)[-1].split(":")[0]]
    return event


def scrubbed(event: dict[str, Any], _hint: Any = None) -> dict[str, Any]:
    """What is sent of an event."""
    kept: dict[str, Any] = {}
    for name in _KEPT:
        if name in event:
            value = event[name]
            # Its own ids are 32 hex digits.
            kept[name] = value if name in ("event_id", "timestamp") else safe(value, "logentry")
    return kept


def start_sentry(dsn_file: Path) -> Sentry:
    """Import and start the SDK.

    Raises:
        ConfigError: the DSN cannot be read or is none, or the SDK is not installed.
    """
    try:
        dsn = dsn_file.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError([f"[log] sentry_dsn_file: {dsn_file} cannot be read: {error}"]) from None
    try:
        sdk: Any = importlib.import_module("sentry_sdk")
    except ImportError:
        why = "the package sentry-sdk is not installed: pip install 'bulkhead-worker[sentry]'"
        raise ConfigError([f"[log] sentry_dsn_file: {why}"]) from None
    try:
        sdk.init(
            dsn=dsn,
            release=f"bulkhead@{version()}",
            server_name="",
            default_integrations=False,
            auto_enabling_integrations=False,
            auto_session_tracking=False,
            include_local_variables=False,
            include_source_context=False,
            max_request_body_size="never",
            max_breadcrumbs=0,
            send_client_reports=False,
            shutdown_timeout=CLOSE_S,
            before_send=scrubbed,
        )
    except Exception as error:  # BadDsn, and whatever other versions raise; its text would show the DSN
        raise ConfigError([f"[log] sentry_dsn_file: {dsn_file} holds no DSN ({type(error).__name__})"]) from None
    return Sentry(sdk)
