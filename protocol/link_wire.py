"""The native link, `bulkhead.v1`: one msgpack map per binary WebSocket message, worker ↔ coordinator.

Decoding has two stages. First the envelope {t, job, attempt, body}, with the body still raw; then the body by
its tag. An unknown tag or a body that does not fit therefore rejects that one job and keeps the session; only
something without an envelope is a fault of the session (`EnvelopeError`).

    worker                                   coordinator
      │  hello {worker, capabilities, held}      │   first message; nothing else before welcome
      │ ───────────────────────────────────────► │
      │  welcome {session, heartbeat_ms}         │
      │ ◄─────────────────────────────────────── │
      │  offer {kind, model, params, inputs}     │
      │ ◄─────────────────────────────────────── │
      │  accept | decline {code, reason}         │
      │  started, (chunk | progress)*            │
      │  complete {result} | fail {fault}        │   kept by the worker until acked
      │ ───────────────────────────────────────► │
      │  ack {verdict}                           │
      │ ◄─────────────────────────────────────── │

Durations travel in milliseconds and are anchored by the receiver. Inline payloads stay under 64 KiB; larger
inputs and results go as files over HTTP, to URLs relative to the coordinator.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from protocol.engine_wire import OutputFile
from protocol.faults import Fault
from protocol.framing import UNDECODABLE

MAX_MESSAGE_BYTES = 4 * 2**20
INLINE_BYTES = 64 * 2**10
RESULT_FILE = "result.msgpack"  # a result body above INLINE_BYTES travels as this file
_NIL = b"\xc0"
NO_RESULT = msgspec.Raw(_NIL)


class Body(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """Base of all bodies. Unknown fields are ignored, so that newer peers may add some."""


class Gpu(Body, frozen=True):
    """One GPU as announced."""

    uuid: str
    name: str
    vram_bytes: int
    free_bytes: int | None = None


class ModelOffer(Body, frozen=True):
    """One model that this worker serves, and how many jobs of it at once.

    Attributes:
        kinds: task kinds that the probes proved for it.
        slots: concurrent jobs (the engine's own number once it is loaded, the configured one before).
        resident: whether it is loaded now.
        limits: what `ready` reported (context length, voices, dimensions, …).
        sandbox: layer -> verdict of the instance that is or was loaded; empty before the first.
    """

    name: str
    kinds: tuple[str, ...]
    engine: str
    slots: int = 1
    resident: bool = False
    device: str = ""
    revision: str = ""
    vram_bytes: int = 0
    limits: dict[str, Any] = {}
    sandbox: dict[str, str] = {}


class Capabilities(Body, frozen=True):
    """What a worker announces, in `hello` and again whenever it changes.

    Attributes:
        deploys: its owner lets the coordinator say what it serves (orders `serve` and `unserve`).
    """

    models: tuple[ModelOffer, ...] = ()
    gpus: tuple[Gpu, ...] = ()
    labels: dict[str, str] = {}
    vram_threshold_gb: float = 0.0  # most GPU memory that a job may be reckoned to need; 0: the worker says nothing
    version: str = ""
    machine: str = ""
    accepting: bool = True
    reason: str = ""  # why not, when not accepting
    deploys: bool = False


class Held(Body, frozen=True):
    """An attempt that the worker still holds when it says hello."""

    job: str
    attempt: int
    started: bool = False


class FileRef(Body, frozen=True):
    """An input (or output) file by URL; a relative URL belongs to the coordinator."""

    name: str
    url: str
    size: int
    sha256: str
    mime: str = "application/octet-stream"


# ---- worker to coordinator ---------------------------------------------------------------------------------


class Hello(Body, frozen=True):
    """First message of a session. `low` and `high` are link revisions."""

    worker: str
    low: int
    high: int
    boot: str = ""
    capabilities: Capabilities = Capabilities()
    held: tuple[Held, ...] = ()


class Announce(Body, frozen=True):
    """Capabilities changed."""

    capabilities: Capabilities


class GpuState(Body, frozen=True):
    """One GPU at this moment; what is not known is left out. `busy` is 0 to 1."""

    uuid: str
    free_bytes: int | None = None
    busy: float | None = None
    temperature_c: float | None = None
    power_w: float | None = None


class Fetch(Body, frozen=True):
    """How far the worker is with a model that it was ordered to serve.

    Attributes:
        phase: `waiting` for others that are fetched, `fetching`, or `proving` (it is loaded and tried).
        done_bytes, total_bytes: of all its files; a total of 0 is not known yet.
    """

    model: str
    phase: str
    done_bytes: int = 0
    total_bytes: int = 0


class Heartbeat(Body, frozen=True):
    """Every `heartbeat_ms` after welcome; answered by `heartbeat_ack` with the same `n`."""

    n: int
    running: int = 0
    gpus: tuple[GpuState, ...] = ()
    fetches: tuple[Fetch, ...] = ()


class Accept(Body, frozen=True):
    """The attempt is in the worker's ledger; sent before anything starts."""


class Decline(Body, frozen=True):
    """Not taken. `code`: busy, paused, draining, unknown_model, unsupported, too_large, bad_offer."""

    code: str
    reason: str
    retry_after_ms: int = 0


class Started(Body, frozen=True):
    """Validation passed, the engine works."""


class Chunk(Body, frozen=True):
    """One piece of streamed output, numbered without gaps from 0 within the attempt."""

    seq: int
    data: msgspec.Raw


class Progress(Body, frozen=True):
    """How far it is. Droppable."""

    n: int
    total: int | None = None
    phase: str = ""
    text: str = ""


class Complete(Body, frozen=True):
    """The attempt succeeded. Output files were uploaded before this is sent.

    `result` is the result struct in msgpack, or nil when it went as the file `RESULT_FILE`. It is no union with
    None, because msgspec decodes a `Raw` only where it stands alone.
    """

    result: msgspec.Raw = NO_RESULT
    files: tuple[OutputFile, ...] = ()
    usage: dict[str, float] = {}

    @property
    def inline(self) -> bytes | None:
        """The result in msgpack, when it came with this message."""
        data = bytes(self.result)
        return None if data == _NIL else data


class Fail(Body, frozen=True):
    """The attempt failed. `streamed`: chunks had been sent, so no new attempt may start."""

    fault: Fault
    streamed: bool = False


class OrderDone(Body, frozen=True):
    """What became of an `order`. `message` is a sentence for people."""

    id: str
    ok: bool
    message: str = ""
    detail: dict[str, Any] = {}


class LogLine(Body, frozen=True):
    """One log line; `ts` is RFC 3339 in UTC."""

    ts: str
    level: str
    message: str
    job: str = ""


class LogBatch(Body, frozen=True):
    """Log lines of up to a second; `dropped` were lost before these."""

    lines: tuple[LogLine, ...]
    dropped: int = 0


class Draining(Body, frozen=True):
    """No more offers, please; the session ends when everything held is acknowledged."""

    reason: str = ""


# ---- coordinator to worker ---------------------------------------------------------------------------------


class Welcome(Body, frozen=True):
    """Answer to hello. `session` names this span of connection in logs of both sides."""

    session: str
    revision: int
    heartbeat_ms: int = 5000


class Offer(Body, frozen=True):
    """A job for this worker.

    Attributes:
        params: params struct of protocol/work.py in msgpack.
        inputs: files to fetch before the run.
        upload: URL template with `{name}`; outputs are PUT there, relative to the coordinator.
        deadline_ms: time from now until the attempt is worthless; 0 means none.
        alone: a suspect of an earlier crash: nothing else may run in its instance beside it.
        labels, tenant, priority, vram_gb_estimate, traceparent: reserved from the start.
    """

    kind: str
    model: str
    params: msgspec.Raw
    inputs: tuple[FileRef, ...] = ()
    upload: str = ""
    stream: bool = False
    deadline_ms: int = 0
    traceparent: str = ""
    labels: dict[str, str] = {}
    tenant: str = ""
    priority: int = 0
    vram_gb_estimate: float = 0.0
    alone: bool = False


class Ack(Body, frozen=True):
    """The coordinator has stored the end of this attempt, or refuses it for good ("fenced")."""

    verdict: Literal["stored", "fenced"] = "stored"


class ChunkAck(Body, frozen=True):
    """All chunks up to and including `seq` arrived; the worker may forget them."""

    seq: int


class HeartbeatAck(Body, frozen=True):
    """Answer to `heartbeat`."""

    n: int


class Cancel(Body, frozen=True):
    """Stop this attempt; it still ends with `complete` or `fail`."""

    reason: str = ""


class Drain(Body, frozen=True):
    """Finish what you hold, take nothing new."""


class Pause(Body, frozen=True):
    """Take no new jobs until `resume`, or for `for_ms` when it is not 0."""

    reason: str = ""
    for_ms: int = 0


class Resume(Body, frozen=True):
    """Lift the coordinator's pause."""


class Order(Body, frozen=True):
    """Something else that the worker shall do; it answers with `order_done` and the same `id`.

    Attributes:
        verb: `log_level` {level, for_s}, `probe` {model}, `configure` {changes: {key: value}},
            `serve` {name, source, sha256, file, engine, options}, `unserve` {name}. A verb that the worker
            does not know is answered with ok = false.
    """

    id: str
    verb: str
    arguments: dict[str, Any] = {}


class ShutdownWorker(Body, frozen=True):
    """End the supervisor after a drain."""

    reason: str = ""


class Error(Body, frozen=True):
    """The session is about to be closed: auth_failed, protocol_violation, duplicate_worker, worker_deleted,
    bad_revision, internal_error."""

    code: str
    message: str


UP: dict[str, type[Body]] = {
    "hello": Hello,
    "announce": Announce,
    "heartbeat": Heartbeat,
    "accept": Accept,
    "decline": Decline,
    "started": Started,
    "chunk": Chunk,
    "progress": Progress,
    "complete": Complete,
    "fail": Fail,
    "log_batch": LogBatch,
    "order_done": OrderDone,
    "draining": Draining,
}
DOWN: dict[str, type[Body]] = {
    "welcome": Welcome,
    "offer": Offer,
    "ack": Ack,
    "chunk_ack": ChunkAck,
    "heartbeat_ack": HeartbeatAck,
    "cancel": Cancel,
    "drain": Drain,
    "pause": Pause,
    "resume": Resume,
    "order": Order,
    "shutdown": ShutdownWorker,
    "error": Error,
}
TAGS: dict[type[Body], str] = {type_: tag for table in (UP, DOWN) for tag, type_ in table.items()}

# WebSocket close codes of our own range.
CLOSE_AUTH = 4001
CLOSE_PROTOCOL = 4002
CLOSE_DUPLICATE = 4003
CLOSE_DELETED = 4004
CLOSE_REVISION = 4005


class EnvelopeError(Exception):
    """Not even an envelope: the session cannot go on."""


class BodyError(Exception):
    """Envelope good, body unknown or broken: only that job is rejected."""


class Envelope(msgspec.Struct, frozen=True, omit_defaults=True):
    """Outer map of every message; `job` and `attempt` are set on messages that speak of an attempt."""

    t: str
    job: str = ""
    attempt: int = 0
    body: msgspec.Raw = msgspec.Raw(b"\x80")  # an empty map


_encode = msgspec.msgpack.Encoder().encode
_envelope = msgspec.msgpack.Decoder(Envelope)
_bodies = {type_: msgspec.msgpack.Decoder(type_) for type_ in TAGS}


def encode(body: Body, job: str = "", attempt: int = 0) -> bytes:
    """Return one message."""
    return _encode(Envelope(TAGS[type(body)], job, attempt, msgspec.Raw(_encode(body))))


def decode_envelope(data: bytes) -> Envelope:
    """First stage. Raises EnvelopeError."""
    if len(data) > MAX_MESSAGE_BYTES:
        raise EnvelopeError(f"a message of {len(data)} bytes exceeds {MAX_MESSAGE_BYTES}")
    try:
        return _envelope.decode(data)
    except UNDECODABLE as error:
        raise EnvelopeError(str(error)) from None


def decode_body(envelope: Envelope, table: dict[str, type[Body]]) -> Any:
    """Second stage, with `UP` or `DOWN` as table. Raises BodyError."""
    type_ = table.get(envelope.t)
    if type_ is None:
        raise BodyError(f"unknown message {envelope.t!r}")
    try:
        return _bodies[type_].decode(envelope.body)
    except UNDECODABLE as error:
        raise BodyError(f"{envelope.t}: {error}") from None
