"""The words of `studio-worker-v1`: JSON text frames with `type` as their tag, camelCase, unknown fields ignored.

Reading has stages, like the native link: a frame that is no JSON or has no type that is known costs nothing but a line
of the log, and a claim that does not fit costs that one job. Peers are newer or older than we are all the time, and a
session that is dropped for one odd frame would be dropped again as soon as the same frame is sent again.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from protocol.framing import UNDECODABLE

SUBPROTOCOL = "studio-worker-v1"
MAX_FRAME_BYTES = 16 * 2**20
CLOSE_AUTH, CLOSE_PROTOCOL, CLOSE_DUPLICATE, CLOSE_DELETED = 4001, 4002, 4003, 4004
KINDS = ("image", "llm", "audio_stt", "audio_tts", "video")
JSON_KINDS = frozenset({"llm", "audio_stt"})  # their results go as a frame, those of the others as a file


class Words(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """Base of everything here."""


# ---- worker to server ---------------------------------------------------------------------------------------


class Capabilities(Words, frozen=True):
    """What this worker can do. Every field is sent: an older server knows no defaults."""

    machine_name: str
    username: str
    agent_version: str
    engine: str
    vram_total_gb: float
    vram_threshold_gb: float
    auto_enabled: bool
    supported_models: list[str]
    task_kinds: list[str]
    supported_models_per_kind: dict[str, list[str]]
    auto_start: bool = False
    auto_update: bool = False
    start_minimised: bool = False
    only_when_idle: bool = False
    user_presence: Literal["idle", "active"] | UnsetType = UNSET


class Up(Words, frozen=True, tag_field="type"):
    """Base of what the worker says."""


class Hello(Up, frozen=True, tag="hello"):
    """The first frame."""

    auth_token: str
    capabilities: Capabilities


class Heartbeat(Up, frozen=True, tag="heartbeat"):
    """Every 5 s after welcome."""

    capabilities: Capabilities
    current_job_id: str | UnsetType = UNSET


class Accept(Up, frozen=True, tag="accept"):
    """Before anything starts."""

    job_id: str


class Reject(Up, frozen=True, tag="reject"):
    """Not taken."""

    job_id: str
    reason: str
    code: Literal["busy", "paused"] | UnsetType = UNSET


class CompleteJson(Up, frozen=True, tag="completeJson"):
    """A result that is no file."""

    job_id: str
    result: dict[str, Any]
    prompt: str | UnsetType = UNSET


class Fail(Up, frozen=True, tag="fail"):
    """A job that failed."""

    job_id: str
    error: str
    retryable: bool


class LogEntry(Words, frozen=True):
    """A line of the log; `ts` is RFC 3339."""

    ts: str
    level: Literal["info", "warn", "error"]
    category: str
    message: str
    job_id: str | UnsetType = UNSET


class LogBatch(Up, frozen=True, tag="logBatch"):
    """Lines of about a second."""

    entries: list[LogEntry]


def encode(frame: Up) -> str:
    """One frame as text."""
    return msgspec.json.encode(frame).decode()


# ---- tasks --------------------------------------------------------------------------------------------------

_Text = Annotated[str, Meta(min_length=1)]


class Task(Words, frozen=True, tag_field="kind"):
    """Base of the tasks. What a range here does not say, the parameters of our own kinds do."""


class ImageTask(Task, frozen=True, tag="image"):
    """`maskUrl` is white where the picture may change; 0 as a side means the model's own."""

    prompt: _Text
    negative_prompt: str | None = None
    init_image_url: str | None = None
    mask_url: str | None = None
    ref_image_url: str | None = None
    denoise: Annotated[float, Meta(ge=0, le=1)] | None = None
    cfg_scale: float | None = None
    sampling_method: str | None = None
    width: Annotated[int, Meta(ge=0)] = 512
    height: Annotated[int, Meta(ge=0)] = 512
    steps: Annotated[int, Meta(ge=0)] = 20
    seed: Annotated[int, Meta(ge=0)] | None = None
    ext: str = "webp"


class LlmTask(Task, frozen=True, tag="llm"):
    """A chat."""

    messages: Annotated[list[dict[str, Any]], Meta(min_length=1)]
    system: str | None = None
    max_tokens: int = 512
    temperature: float = 0.7
    top_p: float | None = None
    stop: list[str] | None = None
    json_schema: dict[str, Any] | None = None
    reasoning: Any = None
    chat_template_kwargs: dict[str, Any] | None = None


class SttTask(Task, frozen=True, tag="audio_stt"):
    """Speech to text."""

    input_url: _Text
    language: str | None = None
    translate: bool | None = None
    prompt: str | None = None
    vad: bool | None = None
    timestamps: Literal["segment", "word"] | None = None


class TtsTask(Task, frozen=True, tag="audio_tts"):
    """Text to speech."""

    text: _Text
    voice: str = "default"
    speed: float | None = None
    language: str | None = None
    ext: str = "wav"


class VideoTask(Task, frozen=True, tag="video"):
    """A film."""

    prompt: _Text
    negative_prompt: str | None = None
    init_image_url: str | None = None
    seconds: float = 2.0
    fps: int | None = None
    width: Annotated[int, Meta(ge=0)] = 512
    height: Annotated[int, Meta(ge=0)] = 512
    ext: str = "mp4"


class ModelSource(Words, frozen=True):
    """Where the model's files are. While the model is served here only the engine is looked at (studio_models.py)."""

    engine: _Text
    files: Any = None
    cli_defaults: Any = None


class Claim(Words, frozen=True):
    """A job that is offered."""

    job_id: str
    model: _Text
    task: ImageTask | LlmTask | SttTask | TtsTask | VideoTask
    model_source: ModelSource
    vram_gb_estimate: Annotated[float, Meta(ge=0, le=1e6)] = 0.0


# ---- server to worker ---------------------------------------------------------------------------------------


class Welcome(Words, frozen=True):
    """The answer to hello; `serverTime` is RFC 3339."""

    worker_id: str = ""
    server_time: str = ""


class HeartbeatAck(Words, frozen=True):
    """The answer to a heartbeat."""


class CompleteAck(Words, frozen=True):
    """A `completeJson` is stored."""

    job_id: str


class FailAck(Words, frozen=True):
    """A `fail` is noted."""

    job_id: str


class Error(Words, frozen=True):
    """The session is about to be closed."""

    code: str
    message: str = ""


class Offered(msgspec.Struct, frozen=True):
    """An offer; without a claim it cannot be taken, for this reason."""

    job: str
    claim: Claim | None
    reason: str = ""


Down = Welcome | HeartbeatAck | CompleteAck | FailAck | Error | Offered


class Unreadable(Exception):
    """A frame that means nothing to us."""


class _Head(msgspec.Struct, frozen=True):
    type: str


class _Offer(msgspec.Struct, frozen=True):
    claim: msgspec.Raw


class _Named(Words, frozen=True):
    job_id: _Text


_PLAIN: dict[str, type[Welcome | HeartbeatAck | CompleteAck | FailAck | Error]] = {
    "welcome": Welcome,
    "heartbeatAck": HeartbeatAck,
    "completeAck": CompleteAck,
    "failAck": FailAck,
    "error": Error,
}


def read(text: str) -> Down:
    """What a frame says. Raises Unreadable: nothing that we know."""
    try:
        type_ = msgspec.json.decode(text, type=_Head).type
        if type_ == "offer":
            return _offered(msgspec.json.decode(text, type=_Offer).claim)
        if type_ not in _PLAIN:
            raise Unreadable(f"a frame of the unknown type {type_[:50]!r}")
        return msgspec.json.decode(text, type=_PLAIN[type_])
    except UNDECODABLE as error:
        raise Unreadable(f"a frame that cannot be read: {error}") from None


def _offered(raw: msgspec.Raw) -> Offered:
    job = msgspec.json.decode(raw, type=_Named).job_id  # without it there is nothing to reject
    try:
        return Offered(job, msgspec.json.decode(raw, type=Claim))
    except UNDECODABLE as error:
        return Offered(job, None, f"The claim cannot be read: {error}.")
