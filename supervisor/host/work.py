"""What the host is asked to do and how it ends, as data. Shared by host/, link/ and app.py."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from protocol.engine_wire import Model, OutputFile
from protocol.faults import Fault


class Sandbox(msgspec.Struct, frozen=True, kw_only=True):
    """How an engine is confined.

    Attributes:
        mode: "require": it does not start unless every layer is verified; "best-effort"; "off".
        network: "none", "loopback", "host"; "" means what the engine's profile says.
        read, write, execute: more paths it may touch.
        without: layers left out, to find the one that breaks an engine.
    """

    mode: str = "best-effort"
    network: str = ""
    read: tuple[str, ...] = ()
    write: tuple[str, ...] = ()
    execute: tuple[str, ...] = ()
    without: tuple[str, ...] = ()


class EngineSpec(msgspec.Struct, frozen=True, kw_only=True):
    """How to start an engine: interpreter, module, extra environment, confinement."""

    name: str
    module: str
    python: str
    env: Mapping[str, str] = {}
    sandbox: Sandbox = Sandbox()


class ModelSpec(msgspec.Struct, frozen=True, kw_only=True):
    """One servable model: the engine that runs it, what to load, and digests to check before the load.

    Attributes:
        stall_s: replaces `limits.first_output_s` and `limits.stall_s` for its runs when it is not 0.
        keep_alive_s: an instance without work is ended after this long; 0 never.
        memory_bytes: most resident memory of an instance; 0 means nine tenths of the box's.
        vram_bytes: what a load will need of its GPU, told by the operator; 0 estimates.
        copies: most instances of it at once.
        pin: loaded at the start, and never ended for another model.
        group: of one exclusive group only one model is loaded; "" for none.
        split: it may lie on several of its GPUs.
    """

    name: str
    engine: EngineSpec
    model: Model
    sha256: Mapping[str, str] = {}
    stall_s: float = 0.0
    keep_alive_s: float = 0.0
    memory_bytes: int = 0
    vram_bytes: int = 0
    copies: int = 1
    pin: bool = False
    group: str = ""
    split: bool = False


class RunRequest(msgspec.Struct, frozen=True, kw_only=True):
    """One attempt for the host.

    Attributes:
        model: public name.
        params: msgpack of a params struct of protocol/work.py.
        inputs: name -> absolute path.
        folder: for outputs; exists, empty, absolute.
        deadline_s: seconds from now; None means `limits.job_s`.
        label: job and attempt, for logs.
        alone: a suspect of an earlier crash: nothing else runs in the instance beside it.
        priority: each step counts like half a minute of waiting.
        vram_bytes: what the job itself says it may need of a GPU; 0 says nothing.
    """

    model: str
    kind: str
    params: bytes
    folder: Path
    inputs: Mapping[str, Path] = {}
    stream: bool = False
    deadline_s: float | None = None
    label: str = ""
    alone: bool = False
    priority: int = 0
    vram_bytes: int = 0


class Started(msgspec.Struct, frozen=True):
    """Validation passed, the engine works."""


class Chunk(msgspec.Struct, frozen=True):
    """One chunk, msgpack of a chunk struct of protocol/work.py; `seq` from 0."""

    seq: int
    data: bytes


class Progress(msgspec.Struct, frozen=True):
    """Work done; also sent while the model loads (phase "load")."""

    n: int
    total: int | None = None
    phase: str = ""
    text: str = ""


RunEvent = Started | Chunk | Progress
OnEvent = Callable[[RunEvent], None]  # must not block; called on the trio thread


class Done(msgspec.Struct, frozen=True, kw_only=True):
    """The run succeeded. `body` is msgpack of a result struct; files lie in the request's folder."""

    body: bytes
    files: tuple[OutputFile, ...] = ()
    usage: Mapping[str, float] = {}


class Failed(msgspec.Struct, frozen=True, kw_only=True):
    """The run failed; `streamed` says whether chunks had gone out."""

    fault: Fault
    streamed: bool = False


RunEnd = Done | Failed


class InstanceStatus(msgspec.Struct, frozen=True, kw_only=True):
    """What `status` shows of one model's instance.

    Attributes:
        state: cold, starting, loading, ready, busy, draining, stopping, backoff, quarantined.
        reason: one sentence when it does not serve.
        blocked: new runs are answered at once with a fault, for `reason`: it cannot be loaded, or is in quarantine.
        sandbox: layer -> verdict, as the running (or latest) instance told.
        idle_s: how long it has been loaded without work; None when it works or is not loaded.
        vram_bytes: GPU memory it was seen to hold.
        last_end: one phrase about how the previous instance ended ("killed by SIGSEGV while it ran a job").
        copy: which of the model's instances it is, from 0. Runs that wait are counted at the first.
        gpus: UUIDs of the GPUs that it was given; empty where nothing is known of them.
        job_vram_bytes: most GPU memory that one job may say it needs here; 0 sets no limit.
    """

    model: str
    engine: str
    state: str
    pid: int = 0
    running: int = 0
    queued: int = 0
    slots: int = 1
    restarts: int = 0
    reason: str = ""
    blocked: bool = False
    device: str = ""
    limits: Mapping[str, Any] = {}
    rss_bytes: int = 0
    vram_bytes: int = 0
    sandbox: Mapping[str, str] = {}
    idle_s: float | None = None
    last_end: str = ""
    copy: int = 0
    gpus: tuple[str, ...] = ()
    job_vram_bytes: int = 0
