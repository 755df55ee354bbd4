"""The frames of `studio-worker-v1`: JSON text messages, told apart by `type`, camelCase, unknown fields ignored.

Reading has two stages, as on the native link: first what every frame has (`type`, and the job that it names), then its
body. So a frame that cannot be read costs its job, and only something that is no frame at all ends the session.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from coordinator.fleet import Worker
from protocol import link_wire as wire
from protocol.framing import UNDECODABLE

SUBPROTOCOL = "studio-worker-v1"
KINDS = ("image", "llm", "audio_stt", "audio_tts", "video")
JSON_KINDS = frozenset({"llm", "audio_stt"})  # results of these come as a frame, of the others as a file
OLD_KIND = "image"  # what a worker does that is too old to name its kinds
MAX_MODELS = 2000
MAX_NAME_CHARS = 200
MAX_LOG_CHARS = 4000

_Count = Annotated[float, Meta(ge=0)]


class Words(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """Base of what a worker sends."""


class Capabilities(Words, frozen=True):
    """What a worker says of itself. Fields that some releases leave out have defaults.

    Attributes:
        vram_threshold_gb: jobs that are reckoned to need more are not for it.
        user_presence: "idle" or "active"; None when it does not know.
    """

    machine_name: str = ""
    username: str = ""
    agent_version: str = ""
    engine: str = ""
    vram_total_gb: _Count = 0.0
    vram_threshold_gb: _Count = 0.0
    auto_enabled: bool = True
    auto_start: bool = False
    supported_models: Annotated[list[str], Meta(max_length=MAX_MODELS)] = []
    task_kinds: Annotated[list[str], Meta(max_length=100)] = []
    supported_models_per_kind: Annotated[dict[str, list[str]], Meta(max_length=100)] = {}
    only_when_idle: bool = False
    user_presence: str | None = None


class Hello(Words, frozen=True):
    """The first frame."""

    auth_token: str
    capabilities: Capabilities


class Heartbeat(Words, frozen=True):
    """Every 5 s; without a job when it is idle."""

    capabilities: Capabilities
    current_job_id: str | None = None


class Accept(Words, frozen=True):
    """Said before the engine starts."""


class Reject(Words, frozen=True):
    """The offer is not taken. Older releases send no code."""

    reason: str = ""
    code: str | None = None


class CompleteJson(Words, frozen=True):
    """A result of kind llm or audio_stt."""

    result: msgspec.Raw


class Fail(Words, frozen=True):
    """The job failed."""

    error: str
    retryable: bool


class LogEntry(Words, frozen=True):
    """One line of a worker's log."""

    message: str
    ts: str = ""
    level: str = "info"
    category: str = ""
    job_id: str | None = None


class LogBatch(Words, frozen=True):
    """Lines of about a second."""

    entries: list[LogEntry]


class ReadyForMore(Words, frozen=True):
    """Means nothing: offers are pushed anyway, and twice would be once too often."""


class Head(msgspec.Struct, frozen=True, rename="camel"):
    """What every frame has."""

    type: str
    job_id: str | None = None


UP: dict[str, type[Words]] = {
    "hello": Hello,
    "heartbeat": Heartbeat,
    "accept": Accept,
    "reject": Reject,
    "completeJson": CompleteJson,
    "fail": Fail,
    "logBatch": LogBatch,
    "readyForMore": ReadyForMore,
}
OF_A_JOB = frozenset({"accept", "reject", "completeJson", "fail"})


class NoFrame(Exception):
    """Not even a frame: the session cannot go on."""


class Unreadable(Exception):
    """A frame, but its body does not fit its type."""


def read_head(text: str) -> Head:
    """First stage. Raises NoFrame."""
    try:
        head = msgspec.json.decode(text, type=Head)
    except (*UNDECODABLE, ValueError) as error:
        raise NoFrame(f"A frame is a JSON object with a type: {error}.") from None
    if head.type in OF_A_JOB and not head.job_id:
        raise NoFrame(f"A frame of type {head.type} names its job.")
    return head


def read_body(head: Head, text: str) -> Any:
    """Second stage; the type must be one of `UP`. Raises Unreadable."""
    try:
        return msgspec.json.decode(text, type=UP[head.type])
    except (*UNDECODABLE, ValueError) as error:
        raise Unreadable(f"{head.type}: {error}") from None


def frame(type_: str, **fields: Any) -> str:
    """One frame to a worker."""
    return msgspec.json.encode({"type": type_, **fields}).decode()


# ---- in our words -------------------------------------------------------------------------------------------


def announced(
    said: Capabilities, paused: str = "", fetched: Mapping[str, Sequence[str]] | None = None
) -> wire.Capabilities:
    """What a worker serves, as the fleet knows it.

    Args:
        said: by the worker.
        paused: why the coordinator gives it nothing; "" when it does.
        fetched: kinds of the models that claims bring the files of, by name. Such a one is served by whoever names one
            of its kinds among the kinds of task: a worker too old to name those is too old to fetch, too.
    """
    kinds: dict[str, set[str]] = {}
    named = [(kind, name) for kind, names in _per_kind(said).items() for name in names]
    named += [(kind, name) for name, those in (fetched or {}).items() for kind in those if kind in said.task_kinds]
    for kind, name in named:
        if kind in KINDS and _is_name(name) and (name in kinds or len(kinds) < MAX_MODELS):
            kinds.setdefault(name, set()).add(kind)
    reason = paused or _away(said)
    return wire.Capabilities(
        models=tuple(
            wire.ModelOffer(name=name, kinds=tuple(sorted(kinds[name])), engine=said.engine[:MAX_NAME_CHARS])
            for name in sorted(kinds)
        ),
        version=said.agent_version[:MAX_NAME_CHARS],
        machine=said.machine_name[:MAX_NAME_CHARS],
        accepting=not reason,
        reason=reason,
    )


def _is_name(name: str) -> bool:
    """Whether it can be a model's: one with a NUL no database takes, and every look at the queue asks for it."""
    return 1 <= len(name) <= MAX_NAME_CHARS and "\0" not in name


def _per_kind(said: Capabilities) -> dict[str, list[str]]:
    if said.supported_models_per_kind:
        named = set(said.task_kinds or said.supported_models_per_kind)
        return {kind: names for kind, names in said.supported_models_per_kind.items() if kind in named}
    return {kind: said.supported_models for kind in said.task_kinds or [OLD_KIND]}


def _away(said: Capabilities) -> str:
    if not said.auto_enabled:
        return "paused on the worker"
    if said.only_when_idle and said.user_presence != "idle":
        return "only when idle, and somebody is using the machine"
    return ""


def bound(worker: Worker, said: Capabilities) -> None:
    """What the dialect asks beyond models: one job at a time, and none above the threshold."""
    worker.at_once = 1
    worker.vram_gb = said.vram_threshold_gb if math.isfinite(said.vram_threshold_gb) else 0.0


_CODES: tuple[tuple[Literal["busy", "paused"], tuple[str, ...]], ...] = (
    ("paused", ("paused", "only when idle")),
    ("busy", ("busy", "in-flight", "in flight")),
)


def declined(said: Reject) -> wire.Decline:
    """A reject as the dispatcher knows it: for a while when the worker is busy or paused, else for good.

    Workers that send no code are known by the words of their reason.
    """
    reason = said.reason[:MAX_LOG_CHARS]
    if said.code in ("busy", "paused"):
        return wire.Decline(code=said.code, reason=reason)
    if said.code is None:
        for code, words in _CODES:
            if any(word in reason.lower() for word in words):
                return wire.Decline(code=code, reason=reason)
    return wire.Decline(code="unsupported", reason=reason)
