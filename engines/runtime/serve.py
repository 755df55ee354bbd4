"""The engine's main loop: I/O and signals on the main thread, work on worker threads.

SIGTERM keeps its default disposition: a Python handler would wait for the running native call, for ever if need
be. SIGUSR2 dumps every stack to stderr from C, also while a library holds the GIL.
"""

from __future__ import annotations

import contextlib
import errno
import faulthandler
import os
import platform
import resource
import signal
import sys
import threading
import traceback
from pathlib import Path
from typing import Any

import msgspec

from engines.runtime import confined, device
from engines.runtime.contract import CancelledRun, Engine, Job, Outcome
from engines.runtime.stdio import Wire
from protocol import engine_wire as wire
from protocol import work
from protocol.engine_session import EngineSession, ProtocolError, Role
from protocol.faults import Fault, FaultError
from protocol.framing import FramingError
from protocol.revision import ENGINE_WIRE

EXIT_PROTOCOL = 70
_TRACE_LINES = 12


def serve(engine: Engine, channel: Wire) -> None:
    """Serve one host until it shuts us down or closes the pipe; ends the process, never returns."""
    faulthandler.enable()
    if hasattr(signal, "SIGUSR2"):
        faulthandler.register(signal.SIGUSR2, all_threads=True, chain=False)
    server = _Server(engine, channel)
    code = EXIT_PROTOCOL
    try:
        code = server.loop()
    except (FramingError, ProtocolError, wire.WireError) as error:
        sys.stderr.write(f"the host broke the protocol: {error}\n")
    # No interpreter shutdown: library destructors have been seen to hang for over a minute.
    sys.stderr.flush()
    os._exit(code)


class _Server:
    def __init__(self, engine: Engine, channel: Wire) -> None:
        self._engine = engine
        self._channel = channel
        self._session = EngineSession(Role.ENGINE)
        self._lock = threading.Lock()
        self._jobs: dict[int, Job] = {}
        self._verdicts = confined.verdicts()  # before the engine can start anything that would inherit them

    def loop(self) -> int:
        """Read and dispatch until the end; returns the exit code."""
        self._send(
            wire.Hello(
                engine=self._engine.name,
                kinds=self._engine.kinds,
                low=ENGINE_WIRE.low,
                high=ENGINE_WIRE.high,
                pid=os.getpid(),
                python=platform.python_version(),
            )
        )
        for frame in self._channel.frames():
            self._channel.json = frame.json
            message = wire.decode_down(frame)
            with self._lock:
                self._session.received(message)
            if isinstance(message, wire.Shutdown):
                self._close()
                return 0
            self._dispatch(message, frame.json)
        return 0  # the host is gone; so are we

    def _dispatch(self, message: wire.DownMessage, json: bool) -> None:
        match message:
            case wire.Ping(n=n):
                self._send(wire.Pong(n=n))
            case wire.Load():
                self._thread(self._load, message)
            case wire.Validate():
                self._thread(self._validate, message, json)
            case wire.Run():
                self._thread(self._run, message, json)
            case wire.Cancel(run=run):
                self._cancel(run)
            case _:  # pragma: no cover  the union is closed
                raise AssertionError(message)

    def _thread(self, target: Any, *args: Any) -> None:
        threading.Thread(target=target, args=args, daemon=True).start()

    def _send(self, message: wire.Up) -> None:
        """Judge and write under one lock: the order on the wire is the order the table saw."""
        buffers = self._channel.encode(message)  # first: what cannot be framed must not count as sent
        with self._lock:
            self._session.sending(message)
            self._channel.write(buffers)

    # ---- load

    def _load(self, message: wire.Load) -> None:
        def progress(n: int, total: int | None = None, phase: str = "load") -> None:
            self._send(wire.Progress(run=wire.NO_RUN, n=n, total=total, phase=phase))

        try:
            device.prepare(message.model)
            ready = self._engine.load(message.model, Path(message.scratch), progress)
            device.refuse_fallback(message.model, ready)
        except BaseException as error:
            self._send(wire.RunFault(run=wire.NO_RUN, fault=fault_of(error, "load_failed")))
            return
        peak = ready.peak_rss_bytes or peak_rss_bytes()
        self._send(msgspec.structs.replace(ready, peak_rss_bytes=peak, sandbox=self._verdicts))

    # ---- runs

    def _validate(self, message: wire.Validate, json: bool) -> None:
        try:
            params = self._params(message.kind, message.params, json)
            self._engine.validate(message.kind, params)
        except BaseException as error:
            self._send(wire.RunFault(run=message.run, fault=fault_of(error)))
        else:
            self._send(wire.Valid(run=message.run))

    def _run(self, message: wire.Run, json: bool) -> None:
        number, seq = message.run, 0

        def emit(data: Any) -> None:
            nonlocal seq
            self._send(wire.Chunk(run=number, seq=seq, data=wire.pack(data, json)))
            seq += 1

        def report(n: int, total: int | None, phase: str, text: str) -> None:
            self._send(wire.Progress(run=number, n=n, total=total, phase=phase, text=text))

        final: wire.Up
        try:
            job = self._job(message, json, emit, report)
            self._send(wire.Started(run=number))
            job.check_cancelled()
            outcome = self._engine.run(job)
            final = _result(number, outcome, job, json)
        except BaseException as error:
            final = wire.RunFault(run=number, fault=fault_of(error))
        self._jobs.pop(number, None)
        try:
            self._send(final)
        except FramingError as error:
            self._send(wire.RunFault(run=number, fault=Fault("engine_failed", f"The result cannot be sent: {error}.")))

    def _job(self, message: wire.Run, json: bool, emit: Any, report: Any) -> Job:
        params = self._params(message.kind, message.params, json)
        job = Job(
            message.kind,
            params,
            inputs={name: Path(path) for name, path in message.inputs.items()},
            folder=Path(message.folder),
            stream=message.stream,
            emit=emit,
            report=report,
            log=message.log,
        )
        self._jobs[message.run] = job
        # A cancel may have come while this thread was starting.
        with self._lock:
            state = self._session.run_state(message.run)
        if state is not None and state.value == "cancelling":
            job.cancelled.set()
        self._engine.validate(message.kind, params)
        return job

    def _params(self, kind: str, raw: msgspec.Raw, json: bool) -> Any:
        if kind not in self._engine.kinds:
            raise FaultError(Fault("unsupported", f"This engine does not serve {kind}.", field="kind"))
        return work.parse_params(kind, msgspec.json.decode(raw) if json else raw)

    def _cancel(self, run: int) -> None:
        if job := self._jobs.get(run):
            job.cancelled.set()
            try:
                self._engine.cancel(job)
            except Exception:  # the flag is set all the same; an engine's mistake must not end its neighbours
                traceback.print_exc(file=sys.stderr)

    def _close(self) -> None:
        for job in list(self._jobs.values()):
            job.cancelled.set()
        with contextlib.suppress(Exception):
            self._engine.close()


def _result(number: int, outcome: Outcome, job: Job, json: bool) -> wire.Result:
    body = wire.pack(outcome.body, json)
    return wire.Result(run=number, body=body, files=tuple(job.files), usage=outcome.usage)


def fault_of(error: BaseException, default: str = "engine_failed") -> Fault:
    """Translate what engine code raised; the one place where foreign errors become faults."""
    if isinstance(error, FaultError):
        return error.fault
    if isinstance(error, CancelledRun):
        return Fault("cancelled", "The run was cancelled.")
    if isinstance(error, MemoryError):
        return Fault("out_of_memory", "The engine ran out of memory.")
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return Fault("worker_disk_full", "The worker's disk is full.")
    if isinstance(error, ImportError):
        return Fault("not_installed", f"A library of this engine is missing: {error}.")
    lines = traceback.format_exception(error)[-_TRACE_LINES:]
    sys.stderr.write("".join(lines))
    text = " ".join(str(error).split())[:500]
    return Fault(
        default, f"{type(error).__name__}: {text}" if text else type(error).__name__, detail={"traceback": lines}
    )


def peak_rss_bytes() -> int:
    """Peak resident memory of this process (Linux counts in KiB, macOS in bytes)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
