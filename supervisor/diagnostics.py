"""The bundle for whoever helps: everything that explains a worker, nothing that opens it, no word of a caller.

Theory of operation. Three nets, one behind the other. What goes in is chosen: configuration, states, versions and
facts of the machine; of bad ends what we found out ourselves, never what an engine said; of the log only lines of
ours. Every value then goes through the log's redaction (observe/redact.py), which knows names and looks of secrets.
Last, every secret that this machine can know is read from where it lies (secret_values) and struck out of every file,
in every spelling that JSON, URLs and headers give it, whatever it looks like. Only a secret of fewer than `SHORTEST`
characters is no secret to us: striking it out would strike out everything.

The bundle is made in a thread, in memory, and holds at most `MAX_BYTES` before compression; what was cut says so.
"""

from __future__ import annotations

import gzip
import io
import os
import tarfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from supervisor.config import masked, read
from supervisor.config_shown import origins
from supervisor.control.snapshot import IncidentView
from supervisor.diagnostics_machine import machine, packages
from supervisor.diagnostics_secrets import Strike, secret_values, secrets_of_toml
from supervisor.errors import ConfigError
from supervisor.observe.redact import redacted, safe
from supervisor.observe.ring import Entry
from supervisor.settings import Settings
from supervisor.version import version

MAX_BYTES = 20 * 2**20
MAX_LINES = 2000
LONGEST_MESSAGE = 2000  # characters
# So much of the whole may one file have: a log of very long lines must not push the rest out.
SHARE = 4
CUT = "\n[cut: the bundle is full]\n"
# Loggers whose lines are ours. What libraries say may quote what callers sent them.
_OURS = ("supervisor", "protocol")


class Seen(msgspec.Struct, frozen=True, kw_only=True):
    """What a running supervisor adds; all of it is plain or made of structs.

    Attributes:
        status: the snapshot.
        holds: what each rule sees now.
        metrics: as they are served.
        lines: the latest of the log.
        incidents: the newest bad ends.
        reload: how the last one went.
    """

    status: Any = None
    holds: Any = None
    metrics: str = ""
    lines: Sequence[Entry] = ()
    incidents: Sequence[IncidentView] = ()
    reload: Any = None


def bundle(
    config: Path | None,
    state: Path,
    seen: Seen | None = None,
    *,
    settings: Settings | None = None,
    environ: Mapping[str, str] = os.environ,
    now: Callable[[], float] = time.time,
    max_bytes: int = MAX_BYTES,
) -> bytes:
    """Make the bundle, a tar.gz; for a thread: it reads files and may take a second.

    Args:
        config: worker.toml; None when the supervisor runs without.
        state: the state folder.
        seen: None without a running supervisor.
        settings: those in force, whose secrets are struck out as well as those of the file.
    """
    found, facts = _config(config, environ)
    known = [each for each in (settings, found) if each is not None]
    strike = Strike(secret_values(known, state, environ) | (set() if config is None else secrets_of_toml(config)))
    files: dict[str, str] = {
        "about.json": _json({"version": version(), "made_at": now(), "running": seen is not None, "config": facts}),
        "machine.json": _json(machine(state, environ)),
        "packages.json": _json(packages()),
        "verdicts.json": _json(_kept(state / "verdicts.json")),
        "quarantines.json": _json(_kept(state / "quarantines.json")),
        "gpus.json": _json(_kept(state / "gpus.json")),
        "holds.json": _json(_kept(state / "holds.json")),
        "peaks.json": _json(_kept(state / "peaks.json")),
    }
    if seen is not None:
        files |= _of_running(seen, strike, max_bytes // SHARE)
    return _packed({name: strike(text) for name, text in files.items()}, int(now()), max_bytes)


def _config(path: Path | None, environ: Mapping[str, str]) -> tuple[Settings | None, Any]:
    """The settings of the file, and what may be shown of them: each value with its origin, or the mistakes."""
    if path is None:
        return None, {"path": None}
    try:
        loaded = read(path, environ)
    except ConfigError as error:
        return None, {"path": str(path), "problems": error.problems}
    rows = [{**row, "value": _value(row)} for row in origins(loaded, masked(loaded.settings))]
    return loaded.settings, {"path": str(path), "values": rows, "notes": loaded.notes}


def _value(row: Mapping[str, Any]) -> Any:
    """A setting's value; hidden when any part of its key below the table says so."""
    value = row["value"]
    for part in str(row["key"]).split(".")[1:]:
        value = safe(value, part.strip("\"'"))
    return value


def _of_running(seen: Seen, strike: Strike, most: int) -> dict[str, str]:
    incidents = [
        {"time": one.time, "model": one.model, "how": one.how, "code": one.code, "diagnosis": one.diagnosis}
        for one in seen.incidents
    ]
    ours = [entry for entry in seen.lines[-MAX_LINES:] if entry.logger.partition(".")[0] in _OURS]
    lines = [_line(entry, strike) for entry in ours]
    return {
        "status.json": _json(_without_words(msgspec.to_builtins(seen.status, enc_hook=str))),
        "hold_findings.json": _json(seen.holds),
        "metrics.txt": redacted(strike(seen.metrics)[: most + len(CUT)]),
        "incidents.json": _json(incidents),
        "reload.json": _json(seen.reload),
        "log.jsonl": "".join(lines),
    }


# Sentences that may quote an engine: of a model its reason, of an incident its message.
_QUOTES = frozenset({"message", "reason", "why", "last_end", "waits"})


def _without_words(status: Any) -> Any:
    """The status without sentences that may quote what an engine said: it may quote its callers."""
    if not isinstance(status, dict):
        return status
    plain = dict(status)
    plain.pop("incidents", None)  # in a file of their own
    plain["models"] = [
        {name: _said(value) if name in _QUOTES else value for name, value in model.items()}
        for model in plain.get("models") or ()
    ]
    if "why" in plain:
        plain["why"] = _said(plain["why"])
    plain["gpus"] = [
        {name: _said(value) if name == "why" else value for name, value in gpu.items()}
        for gpu in plain.get("gpus") or ()
    ]
    return plain


def _said(text: Any) -> str:
    """How long a sentence is: that there is one matters, and its words may be anybody's."""
    return f"[{len(text)} characters]" if text else ""


def _line(entry: Entry, strike: Strike) -> str:
    """One line of the log; its fields and its traceback are left out but for what names something."""
    plain: dict[str, Any] = {
        "seq": entry.seq,
        "time": entry.time,
        "level": entry.level,
        "logger": entry.logger,
        "message": _ours_alone(entry, strike(entry.message)[:LONGEST_MESSAGE]),
        "job": entry.job,
        "attempt": entry.attempt,
        "model": entry.model,
        "engine": entry.engine,
    }
    if entry.traceback:
        plain["traceback"] = [line for line in entry.traceback.splitlines() if line.startswith('  File "')]
    return (
        msgspec.json.encode({name: value for name, value in plain.items() if value not in ("", None)}).decode() + "\n"
    )


# Loggers that pass on what engines and callers said, behind a colon.
_QUOTING = ("supervisor.host", "supervisor.proving", "supervisor.link", "supervisor.probe", "supervisor.box")


def _ours_alone(entry: Entry, message: str) -> str:
    refusal = message.startswith("order of ") and " refused: " in message
    return _opening(message) if refusal or entry.logger.startswith(_QUOTING) else redacted(message)


def _opening(message: str) -> str:
    """The part before the first colon: what happened; behind it stands what somebody else said."""
    head, colon, rest = message.partition(": ")
    return redacted(head) + (f": [{len(rest)} characters]" if colon else "")


def _kept(path: Path) -> Any:
    """A file of the state folder, for people; what it says in sentences is measured only."""
    try:
        return _measured(msgspec.json.decode(path.read_bytes()))
    except FileNotFoundError:
        return None
    except (OSError, msgspec.MsgspecError) as error:
        return {"unreadable": type(error).__name__}


def _measured(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            str(name): _said(each) if isinstance(each, str) and name in _QUOTES else _measured(each)
            for name, each in value.items()
        }
    if isinstance(value, list):
        return [_measured(each) for each in value]
    return value


def _json(value: Any) -> str:
    return msgspec.json.format(msgspec.json.encode(safe_plain(value), enc_hook=str)).decode() + "\n"


def safe_plain(value: Any) -> Any:
    """As `redact.safe`, to any depth: structure that we made ourselves is no reason to hide what lies deep in it."""
    if isinstance(value, Mapping):
        return {redacted(str(name)): _named(str(name), each) for name, each in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [safe_plain(each) for each in value]
    if isinstance(value, msgspec.Struct):
        return safe_plain(msgspec.to_builtins(value, enc_hook=str))
    return safe(value)


def _named(name: str, value: Any) -> Any:
    if isinstance(value, Mapping | list | tuple | msgspec.Struct):
        hidden = safe("x", name) != "x"  # by its name alone
        return safe(value, name) if hidden else safe_plain(value)
    return safe(value, name)


def _packed(files: Mapping[str, str], now: int, max_bytes: int) -> bytes:
    """The archive; each file has at most its share, and all together `max_bytes`."""
    out = io.BytesIO()
    left = max_bytes
    with (
        gzip.GzipFile(fileobj=out, mode="wb", mtime=now) as packed,
        tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as archive,
    ):
        for name, data in _cut(files.items(), max_bytes):
            size = len(data) + 2 * tarfile.BLOCKSIZE
            if size > left:
                continue
            left -= size
            entry = tarfile.TarInfo(f"bulkhead-diagnostics/{name}")
            entry.size, entry.mtime, entry.mode = len(data), now, 0o600
            archive.addfile(entry, io.BytesIO(data))
    return out.getvalue()


def _cut(files: Iterable[tuple[str, str]], max_bytes: int) -> Iterable[tuple[str, bytes]]:
    most = max_bytes // SHARE
    for name, text in files:
        data = text.encode("utf-8", "replace")
        if len(data) > most:
            # Of a log the end is what matters, of everything else the beginning.
            mark = CUT.encode()
            data = mark + data[len(mark) - most :] if name.endswith(".jsonl") else data[: most - len(mark)] + mark
        yield name, data
