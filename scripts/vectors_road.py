"""Test vectors of the two wires for implementations in any language, and what of their document is generated.

The vectors are made by the codecs themselves from the examples below; tests/protocol/test_vectors.py runs them back
through both, so a change of a wire shows as a change of this file. Bytes stand as {"$hex": "…"} in JSON.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import msgspec

from protocol import engine_session, engine_wire, link_session, link_wire
from protocol.engine_wire import OutputFile
from protocol.faults import Fault
from protocol.revision import ENGINE_WIRE, LINK_SUBPROTOCOL, LINK_WIRE

ROOT = Path(__file__).resolve().parents[1]
VECTORS = ROOT / "protocol" / "vectors.json"
DOCUMENT = ROOT / "protocol" / "README.md"

link, engine = link_wire, engine_wire


def raw(value: object) -> msgspec.Raw:
    """A value that travels inside a message as it is."""
    return msgspec.Raw(msgspec.msgpack.encode(value))


CHAT = {"messages": [{"role": "user", "content": "Say hi"}], "max_tokens": 8}
HASH = "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824"
JOB = ("job_01jd2x5v6g7h8j9k0m1n2p3q4r", 1)

LINK: list[tuple[str, link.Body, tuple[str, int]]] = [
    (
        "hello",
        link.Hello(
            worker="box-1",
            low=1,
            high=2,
            boot="5f0c",
            capabilities=link.Capabilities(
                models=(
                    link.ModelOffer(
                        name="chat",
                        kinds=("llm",),
                        engine="llama",
                        slots=2,
                        resident=True,
                        device="cuda:0",
                        revision="9f86d081884c7d65",
                        vram_bytes=5368709120,
                        limits={"context_tokens": 8192},
                        sandbox={"landlock": "verified", "net": "unavailable(EPERM)"},
                    ),
                ),
                gpus=(link.Gpu(uuid="GPU-1", name="RTX", vram_bytes=25769803776, free_bytes=20401094656),),
                labels={"rack": "3"},
                vram_threshold_gb=20.0,
                version="1.0.0",
                machine="Linux x86_64",
                deploys=True,
            ),
            held=(link.Held(job=JOB[0], attempt=1, started=True),),
        ),
        ("", 0),
    ),
    ("welcome", link.Welcome(session="a1b2", revision=2, heartbeat_ms=10000), ("", 0)),
    (
        "offer of a chat",
        link.Offer(kind="llm", model="chat", params=raw(CHAT), stream=True, deadline_ms=60000),
        JOB,
    ),
    (
        "offer with a file",
        link.Offer(
            kind="audio_stt",
            model="ears",
            params=raw({"language": "en"}),
            inputs=(
                link.FileRef(name="audio", url="/v1/blobs/blob_1?exp=1&sig=2", size=5, sha256=HASH, mime="audio/wav"),
            ),
            upload="/v1/blobs/job_1/1/{name}?exp=1&sig=2",
            traceparent="00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
            labels={"trusted": "true"},
            tenant="team-7",
            priority=5,
            vram_gb_estimate=1.5,
            alone=True,
        ),
        JOB,
    ),
    ("accept", link.Accept(), JOB),
    ("decline", link.Decline(code="busy", reason="2 jobs wait already", retry_after_ms=500), JOB),
    ("started", link.Started(), JOB),
    ("chunk", link.Chunk(seq=0, data=raw({"delta": {"content": "hi"}})), JOB),
    ("chunk_ack", link.ChunkAck(seq=0), JOB),
    ("progress", link.Progress(n=3, total=10, phase="step", text="three of ten"), JOB),
    ("complete inline", link.Complete(result=raw({"content": "hi"}), usage={"completion_tokens": 2.0}), JOB),
    ("complete with a file", link.Complete(files=(OutputFile("a.png", "image/png", 5, HASH),)), JOB),
    (
        "fail",
        link.Fail(fault=Fault("engine_crashed", "The engine ended by SIGSEGV.", detail={"signal": 11}), streamed=True),
        JOB,
    ),
    (
        "fail for the caller's sake",
        link.Fail(fault=Fault("invalid_parameter", "It is negative.", field="max_tokens", retryable=False)),
        JOB,
    ),
    ("ack stored", link.Ack(), JOB),
    ("ack fenced", link.Ack(verdict="fenced"), JOB),
    ("cancel", link.Cancel(reason="the client left"), JOB),
    (
        "heartbeat",
        link.Heartbeat(
            n=7,
            running=1,
            gpus=(link.GpuState(uuid="GPU-1", free_bytes=20401094656, busy=0.5, temperature_c=61.0, power_w=180.0),),
        ),
        ("", 0),
    ),
    (
        "heartbeat while ordered models are fetched",
        link.Heartbeat(
            n=8,
            fetches=(
                link.Fetch(model="chat@0123456789", phase="fetching", done_bytes=1073741824, total_bytes=4294967296),
                link.Fetch(model="draw@9876543210", phase="waiting"),
            ),
        ),
        ("", 0),
    ),
    ("heartbeat_ack", link.HeartbeatAck(n=7), ("", 0)),
    ("announce", link.Announce(capabilities=link.Capabilities(accepting=False, reason="quiet hours")), ("", 0)),
    ("pause", link.Pause(reason="maintenance", for_ms=60000), ("", 0)),
    ("resume", link.Resume(), ("", 0)),
    ("drain", link.Drain(), ("", 0)),
    ("draining", link.Draining(reason="SIGTERM was received"), ("", 0)),
    ("shutdown", link.ShutdownWorker(reason="the box is sold"), ("", 0)),
    ("order", link.Order(id="7", verb="probe", arguments={"model": "chat"}), ("", 0)),
    ("order to log more", link.Order(id="8", verb="log_level", arguments={"level": "debug", "for_s": 600.0}), ("", 0)),
    (
        "order to change the configuration",
        link.Order(id="9", verb="configure", arguments={"changes": {"worker.labels": {"rack": "4"}}}),
        ("", 0),
    ),
    (
        "order to serve a model",
        link.Order(
            id="10",
            verb="serve",
            arguments={
                "name": "chat@0a1b2c3d4e",
                "source": "https://models.example/chat.gguf",
                "sha256": HASH,
                "file": "",
                "engine": "llama",
                "options": {"context_tokens": 8192},
            },
        ),
        ("", 0),
    ),
    ("order to let go of it", link.Order(id="11", verb="unserve", arguments={"name": "chat@0a1b2c3d4e"}), ("", 0)),
    ("order_done", link.OrderDone(id="7", ok=True, message="Done.", detail={"chat": "it works"}), ("", 0)),
    (
        "log_batch",
        link.LogBatch(
            lines=(link.LogLine(ts="2026-01-02T03:04:05.678Z", level="warning", message="m", job=JOB[0]),), dropped=1
        ),
        ("", 0),
    ),
    ("error", link.Error(code="duplicate_worker", message="A newer session has been opened."), ("", 0)),
]

# What must be refused. "envelope" ends the session, "body" costs that one job at most.
LINK_REFUSED: list[tuple[str, str, bytes, str]] = [
    ("not msgpack", "up", b"\xc1", "envelope"),
    ("no map", "up", msgspec.msgpack.encode([1, 2]), "envelope"),
    ("no tag", "up", msgspec.msgpack.encode({"job": "j"}), "envelope"),
    ("cut short", "up", link.encode(link.Started(), *JOB)[:-1], "envelope"),
    ("an unknown tag", "up", msgspec.msgpack.encode({"t": "dance", "body": {}}), "body"),
    ("a tag of the other direction", "up", link.encode(link.Drain()), "body"),
    ("a field of another type", "up", msgspec.msgpack.encode({"t": "heartbeat", "body": {"n": "x"}}), "body"),
    ("a missing field", "down", msgspec.msgpack.encode({"t": "offer", "job": "j", "attempt": 1, "body": {}}), "body"),
]
# Unknown fields are ignored, at every level.
LINK_TOLERATED: list[tuple[str, str, bytes]] = [
    (
        "unknown fields",
        "up",
        msgspec.msgpack.encode({"t": "heartbeat", "body": {"n": 1, "mood": "good"}, "colour": "red"}),
    ),
]

ENGINE: list[tuple[str, engine.Down | engine.Up]] = [
    ("hello", engine.Hello(engine="llama", kinds=("llm",), low=1, high=1, pid=42, python="3.11.2")),
    (
        "load",
        engine.Load(
            model=engine.Model(
                name="chat",
                revision="9f86d081884c7d65",
                kinds=("llm",),
                files={"model": "/m.gguf"},
                backend="xllamacpp",
                device="cuda",
                devices=("GPU-1",),
                options={"context_tokens": 8192},
            ),
            scratch="/scratch",
        ),
    ),
    ("progress of the load", engine.Progress(run=engine.NO_RUN, n=1, total=2, phase="load", text="half of it")),
    (
        "ready",
        engine.Ready(
            device="cuda:0",
            slots=2,
            compute_type="q4_k",
            versions={"xllamacpp": "0.2.0"},
            peak_rss_bytes=1073741824,
            vram_bytes=5368709120,
            sandbox={"landlock": "verified"},
            limits={"context_tokens": 8192},
            schema={"x-count": {"type": "object"}},
        ),
    ),
    ("log", engine.Log(level="warning", message="The file has no chat template.")),
    ("stats", engine.Stats(rss_bytes=1073741824, extra={"kv_used": 0.5})),
    ("validate", engine.Validate(run=2, kind="llm", params=raw(CHAT))),
    ("valid", engine.Valid(run=2)),
    (
        "run",
        engine.Run(
            run=1,
            kind="llm",
            params=raw(CHAT),
            inputs={"image": "/in/a.png"},
            folder="/out",
            stream=True,
            log="/out/log",
        ),
    ),
    ("started", engine.Started(run=1)),
    ("chunk", engine.Chunk(run=1, seq=0, data=raw({"delta": {"content": "hi"}}))),
    ("result", engine.Result(run=1, body=raw({"content": "hi"}), usage={"completion_tokens": 2.0})),
    ("result with a file", engine.Result(run=1, body=raw({}), files=(OutputFile("a.png", "image/png", 5, HASH),))),
    ("fault", engine.RunFault(run=1, fault=Fault("out_of_memory", "CUDA is out of memory."))),
    (
        "fault of a request",
        engine.RunFault(
            run=2,
            fault=Fault("invalid_parameter", "It is none.", field="grammar", retryable=False, detail={"line": 3}),
        ),
    ),
    ("cancel", engine.Cancel(run=1)),
    ("ping", engine.Ping(n=3)),
    ("pong", engine.Pong(n=3)),
    ("shutdown", engine.Shutdown()),
    (
        "a large chunk, behind the header",
        engine.Chunk(run=1, seq=1, data=raw({"pcm": "x" * (engine.INLINE_BYTES + 10)})),
    ),
]

# Structs that messages are made of.
LINK_PARTS = (
    link.Capabilities,
    link.ModelOffer,
    link.Gpu,
    link.GpuState,
    link.Fetch,
    link.Held,
    link.FileRef,
    OutputFile,
    Fault,
    link.LogLine,
)
ENGINE_PARTS = (engine.Model, OutputFile, Fault)


def plain(value: Any) -> Any:
    """JSON of a decoded message."""
    if isinstance(value, bytes):
        return {"$hex": value.hex()}
    if isinstance(value, dict):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    return value


def framed(header: object) -> bytes:
    """A frame with this header and nothing behind it."""
    data = msgspec.msgpack.encode(header)
    return len(data).to_bytes(4, "big") + data


def link_messages() -> list[dict[str, Any]]:
    """Every message of the link."""
    found = []
    for name, body, (job, attempt) in LINK:
        data = link.encode(body, job, attempt)
        direction = "up" if link.TAGS[type(body)] in link.UP else "down"
        found.append({"name": name, "direction": direction, "hex": data.hex(), "message": decoded(data)})
    return found


def decoded(data: bytes) -> Any:
    return plain(msgspec.msgpack.decode(data))


def engine_frames() -> list[dict[str, Any]]:
    """Every message of the engine wire, as frames."""
    found = []
    for name, message in ENGINE:
        parts = [bytes(part) for part in engine.encode(message)]
        whole = b"".join(parts)
        size = int.from_bytes(whole[:4], "big")
        header = decoded(whole[4 : 4 + size])
        blobs = parts[1:]
        found.append(
            {
                "name": name,
                "direction": "down" if isinstance(message, engine.Down) else "up",
                "hex": whole.hex() if len(whole) < 4096 else "",
                "sha256_of_blobs": [hashlib.sha256(blob).hexdigest() for blob in blobs],
                "header_hex": whole[: 4 + size].hex(),
                "header": header,
            }
        )
    return found


def table(rows: Any) -> list[list[str | None]]:
    """Rows of a state table: state, tag, next state; null is «never heard of»."""
    return [[None if state is None else state.value, tag, following.value] for (state, tag), following in rows]


def whole() -> dict[str, Any]:
    """The file."""
    refused = [
        {"name": "a header above the limit", "direction": "up", "hex": "ffffffff"},
        {"name": "a header that is no map", "direction": "up", "hex": "0000000101"},
        {"name": "a negative blob", "direction": "up", "hex": framed({"t": "pong", "n": 1, "blobs": [-1]}).hex()},
        {"name": "17 blobs", "direction": "up", "hex": framed({"t": "pong", "n": 1, "blobs": [1] * 17}).hex()},
        {"name": "an unknown tag", "direction": "up", "hex": framed({"t": "dance"}).hex()},
        {"name": "a tag of the other direction", "direction": "up", "hex": framed({"t": "shutdown"}).hex()},
        {"name": "a field of another type", "direction": "up", "hex": framed({"t": "pong", "n": "x"}).hex()},
    ]
    return {
        "about": "Test vectors of Bulkhead's two wires; see README.md beside this file. Made by scripts/vectors.",
        "link": {
            "subprotocol": LINK_SUBPROTOCOL,
            "revisions": [LINK_WIRE.low, LINK_WIRE.high],
            "messages": link_messages(),
            "refused": [
                {"name": name, "direction": direction, "hex": data.hex(), "costs": costs}
                for name, direction, data, costs in LINK_REFUSED
            ],
            "tolerated": [
                {"name": name, "direction": direction, "hex": data.hex(), "message": decoded(data)}
                for name, direction, data in LINK_TOLERATED
            ],
            "session_table": table(link_session.SESSION_TABLE.items()),
            "attempt_table": table(link_session.ATTEMPT_TABLE.items()),
        },
        "engine": {
            "revisions": [ENGINE_WIRE.low, ENGINE_WIRE.high],
            "frames": engine_frames(),
            "refused": refused,
            "instance_table": table(engine_session.INSTANCE_TABLE.items()),
            "run_table": table(engine_session.RUN_TABLE.items()),
        },
    }


def hexdump(data: bytes) -> str:
    """Sixteen bytes a line, with what can be read beside them."""
    lines = []
    for at in range(0, len(data), 16):
        piece = data[at : at + 16]
        words = "".join(chr(byte) if 32 <= byte < 127 else "." for byte in piece)
        lines.append(f"{at:04x}  {piece.hex(' '):<47}  {words}")
    return "\n".join(lines)


def parts() -> dict[str, str]:
    """The generated parts of the document, by the name in their markers."""
    examples = []
    for name, body, (job, attempt) in LINK:
        if name in ("offer of a chat", "accept", "chunk", "complete inline", "ack stored"):
            data = link.encode(body, job, attempt)
            examples.append(f"`{name}`, {len(data)} bytes:\n\n```\n{hexdump(data)}\n```")
    frames = []
    for name, message in ENGINE:
        if name in ("started", "chunk", "result"):
            data = b"".join(bytes(part) for part in engine.encode(message))
            frames.append(f"`{name}`, {len(data)} bytes:\n\n```\n{hexdump(data)}\n```")
    session, attempt_ = link_session.diagram().split("\n\n")
    instance, run = engine_session.diagram().split("\n\n")
    return {
        "link messages": _messages(),
        "link parts": _parts(LINK_PARTS),
        "link session": f"```mermaid\n{session.strip()}\n```",
        "link attempt": f"```mermaid\n{attempt_.strip()}\n```",
        "link bytes": "\n\n".join(examples),
        "engine messages": _frames(),
        "engine parts": _parts(ENGINE_PARTS),
        "engine instance": f"```mermaid\n{instance.strip()}\n```",
        "engine run": f"```mermaid\n{run.strip()}\n```",
        "engine bytes": "\n\n".join(frames),
    }


def _messages() -> str:
    rows = ["| message | sent by | fields |", "| --- | --- | --- |"]
    for side, found in (("worker", link.UP), ("coordinator", link.DOWN)):
        rows += [f"| `{tag}` | {side} | {_fields(type_)} |" for tag, type_ in found.items()]
    return "\n".join(rows)


def _frames() -> str:
    rows = ["| message | sent by | fields |", "| --- | --- | --- |"]
    for side, base in (("engine", engine.Up), ("host", engine.Down)):
        rows += [f"| `{type_.__struct_config__.tag}` | {side} | {_fields(type_)} |" for type_ in base.__subclasses__()]
    return "\n".join(rows)


def _parts(types: tuple[type[msgspec.Struct], ...]) -> str:
    rows = ["| part | fields |", "| --- | --- |"]
    return "\n".join([*rows, *(f"| {type_.__name__} | {_fields(type_)} |" for type_ in types)])


def _fields(type_: type[msgspec.Struct]) -> str:
    """Its fields with their types; "?" stands behind one that may be left out, with what that means if not nothing."""
    shown = [
        f"`{field.name}`{'' if field.required else '?'} {type_word(field.type)}"
        + (
            f" ({json.dumps(field.default)})"
            if not field.required and field.default and isinstance(field.default, str | int | float)
            else ""
        )
        for field in msgspec.structs.fields(type_)
        if field.name != "blobs"
    ]
    return ", ".join(shown) or "none"


_WORDS = {str: "string", int: "integer", float: "number", bool: "boolean", Any: "anything", msgspec.Raw: "anything"}


def type_word(type_: Any) -> str:
    """A type in words that every language has."""
    if type_ in _WORDS:
        return _WORDS[type_]
    origin, inside = get_origin(type_), get_args(type_)
    if origin is Literal:
        return " or ".join(f'"{value}"' for value in inside)
    if origin is tuple:
        return f"list of {type_word(inside[0])}"
    if origin is dict:
        return f"map to {type_word(inside[1])}"
    if type(None) in inside:
        return " or ".join(type_word(each) for each in inside if each is not type(None))
    return str(type_.__name__)


def written(text: str) -> str:
    """The document with its generated parts renewed."""
    for name, content in parts().items():
        begin, end = f"<!-- {name} -->\n", f"\n<!-- end of {name} -->"
        head, found, rest = text.partition(begin)
        _, closed, tail = rest.partition(end)
        if not found or not closed:
            raise SystemExit(f"protocol/README.md has no markers for {name!r}")
        text = f"{head}{begin}{content}{end}{tail}"
    return text


def vectors_text() -> str:
    """The file as it is written."""
    return json.dumps(whole(), indent=1, ensure_ascii=False) + "\n"


def main() -> int:
    """Write, or with --check compare."""
    new = {VECTORS: vectors_text(), DOCUMENT: written(DOCUMENT.read_text())}
    stale = [path for path, text in new.items() if not path.exists() or path.read_text() != text]
    if "--check" in sys.argv[1:]:
        for path in stale:
            print(f"{path.relative_to(ROOT)} is not what the code says; run scripts/vectors", file=sys.stderr)
        return int(bool(stale))
    for path, text in new.items():
        path.write_text(text)
        print(f"wrote {path.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
