"""What a GOLIAT dashboard says and is told, in both of its protocols. Pure: no I/O and no clock.

The planned protocol was never built by its authors, and its two descriptions disagree about the shape of an
assignment; the shipped one is what their dashboard does. What comes in is read by hand and leniently, because a
dashboard that adds or leaves out a field must not end the poller; what cannot be understood raises `Odd`.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import msgspec

from protocol.framing import UNDECODABLE
from protocol.ids import is_safe_id

MAX_LINE_CHARS = 4000
MEMORY_CODE = 42  # the study's own word for "out of memory: start me again"

# What a study may say itself, as a line of JSON with one of these types. How it ended is ours to say, never its own.
_STATES = ("overall_progress", "stage_progress", "profiler_update", "sim_details", "start_animation", "end_animation")
_LINES = ("status", "terminal_only", "print")
_LOG_TYPES = frozenset(("default", "success", "progress", "info", "highlight", "warning", "error", "fatal", "verbose"))
_LEVEL = re.compile(r"\b(WARNING|WARN|ERROR|CRITICAL|FATAL)\b")
_LEVELS = {"WARNING": "warning", "WARN": "warning", "ERROR": "error", "CRITICAL": "fatal", "FATAL": "fatal"}
_OVER = ("COMPLETED", "FAILED", "CANCELLED")

Message = dict[str, Any]


class Odd(Exception):
    """The dashboard said something that means nothing, as this sentence says."""


class Slip(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One attempt at one assignment. It goes through the journal as the offer's `upload`.

    Attributes:
        id: the dashboard's own word for the assignment.
        study: id of its super-study; "" when that was not told.
        index: which part of the study it is; -1 when that was not told.
        worker: id of the dashboard's row of this worker, which holds it; "" where there is none.
        failed: its end was told; only the notes of the shipped protocol say so.
    """

    id: str
    attempt: int = 1
    study: str = ""
    index: int = -1
    worker: str = ""
    failed: bool = False

    @property
    def job(self) -> str:
        """The native job id: the assignment's own where that can be one."""
        return self.id if is_safe_id(self.id) else f"goliat-{hashlib.sha256(self.id.encode()).hexdigest()[:32]}"

    @property
    def key(self) -> tuple[str, int]:
        """What names the attempt on the link."""
        return self.job, self.attempt

    def text(self) -> str:
        """For `Offer.upload`."""
        return msgspec.json.encode(self).decode()

    @staticmethod
    def read(text: str | bytes) -> Slip:
        """What `text` made. Raises ValueError: it was something else."""
        try:
            return msgspec.json.decode(text, type=Slip)
        except msgspec.MsgspecError as error:
            raise ValueError(f"no slip of this dialect: {error}") from None


class Given(NamedTuple):
    """An assignment as the planned protocol gives it. Either `config` or `config_url` is set."""

    slip: Slip
    config: bytes | None
    config_url: str


class Row(NamedTuple):
    """An assignment as the shipped protocol lists it. `number` is its index; `config` is None when it has none."""

    id: str
    number: int
    status: str
    worker: str
    config: bytes | None


# ---- the planned protocol ------------------------------------------------------------------------------------------


def given(reply: object) -> Given | None:
    """The assignment in a reply, nested or flat; None when there is none.

    Raises:
        Odd: there is one, but it cannot be used.
    """
    if not isinstance(reply, Mapping):
        raise Odd("the reply to a poll is no object")
    inner = reply.get("assignment")
    flat = {**reply, **inner} if isinstance(inner, Mapping) else dict(reply)
    if reply.get("assigned") is False or not ({"id", "assignment_id", "config", "config_url"} & flat.keys()):
        if reply.get("assigned") is True:
            raise Odd("an assignment was given without an id and a config")
        return None
    config, url = flat.get("config"), _text(flat, "config_url", "configUrl")
    if isinstance(config, str) and not url and re.match(r"(https?://|/)\S+\Z", config):
        url, config = config, None
    if url:
        config = None  # the address is the file; what stands beside it may be no more than its name
    if config is None and not url:
        raise Odd("an assignment was given without a config")
    file = None if config is None else _file(config)
    study, index = _text(flat, "super_study_id", "superStudyId"), _number(flat, "split_index", "splitIndex", "index")
    id_ = _text(flat, "id", "assignment_id", "assignmentId")
    if not id_:  # the flat shape knows none: the same part of the same study is the same assignment
        what = b"%b %d" % (url.encode() if file is None else file, index)
        id_ = f"{study}.{index}" if study else hashlib.sha256(what).hexdigest()[:32]
    return Given(Slip(id=id_, study=study, index=index), file, url)


# ---- the shipped protocol ------------------------------------------------------------------------------------------


def open_studies(reply: object, name: str) -> list[str]:
    """Ids of the studies of this name that may have something to do, as they were listed.

    Raises:
        Odd: it is no list.
    """
    if not isinstance(reply, list):
        raise Odd("the list of studies is no list")
    found = []
    for study in reply:
        if not isinstance(study, Mapping) or study.get("name") != name or study.get("status") in _OVER:
            continue
        parts = study.get("assignments")
        states = [part.get("status") for part in parts if isinstance(part, Mapping)] if isinstance(parts, list) else []
        if (id_ := _text(study, "id")) and (not states or "PENDING" in states):
            found.append(id_)
    return found


def rows(reply: object) -> list[Row]:
    """The assignments of a study, by their index. Array positions mean nothing: workers took wrong parts by them.

    Raises:
        Odd: it is no list.
    """
    if not isinstance(reply, list):
        raise Odd("the list of assignments is no list")
    return sorted((row(each) for each in reply if _usable(each)), key=lambda each: each.number)


def row(reply: object) -> Row:
    """One assignment. Raises Odd."""
    if not _usable(reply):
        raise Odd("an assignment came without an id or an index")
    assert isinstance(reply, Mapping)
    config = reply.get("splitConfig")
    return Row(
        id=_text(reply, "id"),
        number=_number(reply, "index"),
        status=_text(reply, "status"),
        worker=_text(reply, "workerId"),
        config=None if config is None else _file(config),
    )


def _usable(reply: object) -> bool:
    return isinstance(reply, Mapping) and bool(_text(reply, "id")) and _number(reply, "index") >= 0


def _text(fields: Mapping[Any, Any], *names: str) -> str:
    for name in names:
        value = fields.get(name)
        if isinstance(value, str | int) and not isinstance(value, bool) and value != "":
            return str(value)
    return ""


def _number(fields: Mapping[Any, Any], *names: str) -> int:
    values = (fields.get(name) for name in names)
    return next((each for each in values if isinstance(each, int) and not isinstance(each, bool)), -1)


def _file(config: object) -> bytes:
    return config.encode() if isinstance(config, str) else msgspec.json.encode(config)


# ---- messages to the dashboard -------------------------------------------------------------------------------------


def status(text: str, log_type: str, at: float) -> Message:
    """A line for people; `at` in seconds since the epoch."""
    short = text if len(text) <= MAX_LINE_CHARS else f"{text[: MAX_LINE_CHARS - 1]}…"
    return {"type": "status", "message": short, "log_type": log_type, "timestamp": at}


def batch(lines: list[Message], sequence: int) -> Message:
    """Several of them."""
    return {"type": "log_batch", "logs": lines, "sequence": sequence}


def finished() -> Message:
    """It is done, and what it brought has been delivered. The dashboard takes this for COMPLETED, whatever it says."""
    return {"type": "finished", "exit_code": 0}


def fatal(sentence: str) -> Message:
    """It has failed. Never followed by `finished`, for the dashboard would then take it for COMPLETED."""
    return {"type": "fatal_error", "message": sentence}


def memory(sentence: str) -> Message:
    """It ran out of memory."""
    return {"type": "memory_error", "message": sentence, "exit_code": MEMORY_CODE}


def said(text: str, at: float) -> Message:
    """What a line that the study printed means: a message of its own in JSON, or a line for people."""
    if text.startswith("{") and (message := _own(text)) is not None:
        kind = message["type"]
        if kind in _STATES:
            return message
        log_type = message.get("log_type")
        told = log_type if log_type in _LOG_TYPES else "default" if kind == "status" else "verbose"
        return status(str(message.get("message", "")), told, at)
    level = _LEVEL.search(text[:80])
    return status(text, _LEVELS[level[1]] if level else "default", at)


def _own(text: str) -> Message | None:
    try:
        message = msgspec.json.decode(text)
    except UNDECODABLE:
        return None
    return message if isinstance(message, dict) and message.get("type") in (*_STATES, *_LINES) else None


def state_of(message: Message) -> str:
    """What a message overwrites when it is newer; "" for a line, which overwrites nothing."""
    kind = message["type"]
    if kind not in _STATES:
        return ""
    if kind == "stage_progress":
        return f"{kind} {message.get('name', '')}"[:200]
    return "animation" if kind.endswith("_animation") else str(kind)


def pending(listed: list[Row]) -> Iterator[Row]:
    """Those that nobody works on, the lowest index first."""
    return (each for each in listed if each.status == "PENDING")
