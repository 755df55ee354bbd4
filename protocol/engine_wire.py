"""Messages between the supervisor's host and an engine child, in both directions.

Tagged structs as msgpack maps (or JSON lines, same structs). Unknown fields are ignored; an unknown tag or a
body that does not fit is a protocol error of the peer that sent it. Decoding never runs code of the peer's.

    host                          engine
     │        hello {engine, …}      │  first frame, before any heavy import
     │ ◄──────────────────────────── │
     │        load {model, …}        │
     │ ────────────────────────────► │  progress* while loading
     │        ready {device, slots}  │
     │ ◄──────────────────────────── │
     │        run {run, kind, …}     │
     │ ────────────────────────────► │  validate, then: started, (chunk | progress)*, result | fault
     │        cancel {run}           │
     │ ────────────────────────────► │  the run still ends with result or fault(cancelled)
     │        shutdown               │
     │ ────────────────────────────► │  exit 0
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from protocol.faults import Fault
from protocol.framing import INLINE_BYTES, UNDECODABLE, Frame, encode_frame

RunNumber = int  # u32, unique within the life of one instance

NO_RUN = 0  # a fault with this run number speaks of the whole instance
FIRST_RUN = 1
LAST_RUN = 2**32 - 1

MAX_OUTPUT_FILES = 256  # of one attempt; each costs the worker an upload


class Down(msgspec.Struct, tag_field="t", frozen=True, omit_defaults=True, kw_only=True):
    """Base of everything the host sends. `blobs` belongs to the framing: sizes of what follows the header."""

    blobs: tuple[int, ...] = ()


class Up(msgspec.Struct, tag_field="t", frozen=True, omit_defaults=True, kw_only=True):
    """Base of everything the engine sends. `blobs` as in `Down`."""

    blobs: tuple[int, ...] = ()


class Model(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """What an instance shall load: one model + one config + one device set.

    Attributes:
        name: public name, for messages only.
        revision: sha256 hex over files and config.
        kinds: task kinds that this model shall serve.
        files: role -> absolute path; the main file or folder has the role "model".
        backend: engine-specific backend name; "" means the engine's default.
        device: "cpu", "cuda" or "auto". With "cuda" a fall back to the CPU is a failed load.
        devices: GPU UUIDs of the device set; empty means the engine's default device.
        options: engine-specific load options from `[models.options]` (n_ctx, compute_type, …).
    """

    name: str
    revision: str = ""
    kinds: tuple[str, ...] = ()
    files: dict[str, str] = {}
    backend: str = ""
    device: str = "auto"
    devices: tuple[str, ...] = ()
    options: dict[str, Any] = {}


class Load(Down, tag="load", frozen=True):
    """Load the model. `scratch` is the instance's private folder, writable, absolute."""

    model: Model
    scratch: str


class Validate(Down, tag="validate", frozen=True):
    """Only check the parameters against the loaded model; answered by `valid` or `fault`."""

    run: RunNumber
    kind: str
    params: msgspec.Raw


class Run(Down, tag="run", frozen=True):
    """Validate, then do the work.

    Attributes:
        params: a params struct of protocol/work.py, encoded like the frame itself.
        inputs: name -> absolute path of an input file, fetched before the run.
        folder: the attempt's folder for outputs, absolute, exists, empty.
        stream: whether chunks are wanted.
        log: opaque words for log lines (job id, attempt).
    """

    run: RunNumber
    kind: str
    params: msgspec.Raw
    inputs: dict[str, str] = {}
    folder: str = ""
    stream: bool = False
    log: str = ""


class Cancel(Down, tag="cancel", frozen=True):
    """Stop this run soon; the others of the instance go on."""

    run: RunNumber


class Shutdown(Down, tag="shutdown", frozen=True):
    """Finish nothing, clean up, exit 0."""


class Ping(Down, tag="ping", frozen=True):
    """Answered at once by `pong` from the I/O thread."""

    n: int = 0


class Hello(Up, tag="hello", frozen=True):
    """First frame of an engine."""

    engine: str
    kinds: tuple[str, ...]
    low: int
    high: int
    pid: int
    python: str = ""


class Ready(Up, tag="ready", frozen=True):
    """The model is loaded and was found to work.

    Attributes:
        device: where it really runs: "cpu" or "cuda:0" and so on; never the device asked for.
        compute_type: "q8_0", "int8", "float32", …
        slots: how many runs the instance takes at once (>= 1).
        versions: library -> version.
        peak_rss_bytes: peak resident memory of the process after the load.
        vram_bytes: GPU memory the load took, where the library says so.
        sandbox: layer -> verdict word; empty until there is a sandbox.
        limits: what the model allows: n_ctx, sample_rate, voices, dimensions, …
        schema: JSON schema of the parameters of kinds named `x-…`.
    """

    device: str
    slots: int = 1
    compute_type: str = ""
    versions: dict[str, str] = {}
    peak_rss_bytes: int = 0
    vram_bytes: int = 0
    sandbox: dict[str, str] = {}
    limits: dict[str, Any] = {}
    schema: dict[str, Any] = {}


class Valid(Up, tag="valid", frozen=True):
    """The parameters of a `validate` are good."""

    run: RunNumber


class Started(Up, tag="started", frozen=True):
    """The run passed validation and the work began: headers may go out to the client."""

    run: RunNumber


class Progress(Up, tag="progress", frozen=True):
    """A counter from the work loop itself, never from a side thread.

    Attributes:
        run: the run, or `NO_RUN` while loading.
        n: grows with every unit of work (token, step, window, frame).
        total: how many units there will be, when known.
        phase: "load", "prefill", "decode", "step", "encode", …
        text: a line for people (a line that a command printed).
    """

    run: RunNumber
    n: int
    total: int | None = None
    phase: str = ""
    text: str = ""


class Chunk(Up, tag="chunk", frozen=True):
    """One piece of streamed output; `seq` counts from 0 without gaps within the run."""

    run: RunNumber
    seq: int
    data: msgspec.Raw


class OutputFile(msgspec.Struct, frozen=True, omit_defaults=True):
    """A file that the run left in its folder: `name` is relative, without any slash."""

    name: str
    mime: str
    size: int
    sha256: str


class Result(Up, tag="result", frozen=True):
    """The run is done. `body` is a result struct of protocol/work.py; `files` lie in the run's folder."""

    run: RunNumber
    body: msgspec.Raw
    files: tuple[OutputFile, ...] = ()
    usage: dict[str, float] = {}


class RunFault(Up, tag="fault", frozen=True):
    """The run ended badly, or (run 0) the load did; the process itself is still well."""

    run: RunNumber
    fault: Fault


class Pong(Up, tag="pong", frozen=True):
    """Answer to `ping`."""

    n: int = 0


class Log(Up, tag="log", frozen=True):
    """A log line of the engine's: level is debug, info, warning or error."""

    level: str
    message: str


class Stats(Up, tag="stats", frozen=True):
    """Resident bytes and whatever else the engine measures of itself."""

    rss_bytes: int = 0
    extra: dict[str, float] = {}


DownMessage = Load | Validate | Run | Cancel | Shutdown | Ping
UpMessage = Hello | Ready | Valid | Started | Progress | Chunk | Result | RunFault | Pong | Log | Stats


class WireError(Exception):
    """The peer sent a frame that is not a message of this wire."""


_msgpack = msgspec.msgpack.Encoder()
_json = msgspec.json.Encoder()
_decoders: dict[tuple[type, bool], Any] = {
    (Down, False): msgspec.msgpack.Decoder(DownMessage),
    (Down, True): msgspec.json.Decoder(DownMessage),
    (Up, False): msgspec.msgpack.Decoder(UpMessage),
    (Up, True): msgspec.json.Decoder(UpMessage),
}


def pack(value: Any, json: bool = False) -> msgspec.Raw:
    """Encode a body (params, chunk data, result) for a frame of the same encoding."""
    return msgspec.Raw(_json.encode(value) if json else _msgpack.encode(value))


def unpack(raw: msgspec.Raw, type_: Any = Any, json: bool = False) -> Any:
    """Decode a body that `pack` made.

    Raises:
        WireError: it does not fit `type_`.
    """
    try:
        return msgspec.json.decode(raw, type=type_) if json else msgspec.msgpack.decode(raw, type=type_)
    except UNDECODABLE as error:
        raise WireError(str(error)) from None


# The one field of these messages that may be large: above INLINE_BYTES it travels as a blob behind the header.
_BULK: dict[type, str] = {Validate: "params", Run: "params", Chunk: "data", Result: "body"}
_NIL = msgspec.Raw(b"\xc0")


def encode(message: Down | Up, json: bool = False) -> Sequence[bytes | memoryview]:
    """Return the buffers of one frame, ready for writev.

    Raises:
        FramingError: the message exceeds a limit of the framing.
    """
    if json:
        return [_json.encode(message) + b"\n"]
    field = _BULK.get(type(message))
    if field is not None and len(bulk := getattr(message, field)) > INLINE_BYTES:
        header = msgspec.structs.replace(message, **{field: _NIL, "blobs": (len(bulk),)})
        return encode_frame(_msgpack.encode(header), [memoryview(bulk)])
    return encode_frame(_msgpack.encode(message))


def decode_down(frame: Frame) -> DownMessage:
    """Decode a frame on the engine's side. Raises WireError."""
    return _decode(frame, Down)  # type: ignore[no-any-return]


def decode_up(frame: Frame) -> UpMessage:
    """Decode a frame on the host's side. Raises WireError."""
    return _decode(frame, Up)  # type: ignore[no-any-return]


def _decode(frame: Frame, side: type) -> Any:
    try:
        message = _decoders[side, frame.json].decode(frame.header)
    except UNDECODABLE as error:
        raise WireError(f"not a message of this wire: {error}") from None
    if not frame.blobs:
        return message
    field = _BULK.get(type(message))
    if field is None or len(frame.blobs) != 1:
        raise WireError("blobs where none belong")
    return msgspec.structs.replace(message, **{field: msgspec.Raw(frame.blobs[0]), "blobs": ()})
