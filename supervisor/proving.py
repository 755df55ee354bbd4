"""Which models may be announced: files checked, engine probed, in the background from the start.

Each engine is probed once for all models that use it in the same way, in a child, with the shipped fixture
(supervisor/probe.py). A probe that was passed is remembered until something it depends on has changed, so that
the next start need not wait for it. What failed is tried again with growing pauses: a GPU may come up late.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import sys
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import msgspec
import trio

from protocol.faults import FaultError
from supervisor.host.launching import ROOT
from supervisor.host.work import EngineSpec, ModelSpec
from supervisor.link.reconnect import Backoff
from supervisor.link.register import Proof
from supervisor.probe import probe_engine
from supervisor.probe_verdict import Probe
from supervisor.state import write_atomically

log = logging.getLogger(__name__)

AT_ONCE = 2  # a probe has several threads of its own
PROBE_DEADLINE_S = 120.0
FIRST_RETRY_S, LAST_RETRY_S = 30.0, 900.0

Verify = Callable[[ModelSpec], Awaitable[str]]
ProbeEngine = Callable[..., Awaitable[Probe]]
OnProof = Callable[[ModelSpec, Proof], None]


class Verdicts:
    """Probes that were passed, across restarts. A damaged file only costs probing again."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._passed: dict[str, str] = {}
        with contextlib.suppress(OSError, msgspec.MsgspecError):
            self._passed = msgspec.json.decode(path.read_bytes(), type=dict[str, str])

    def holds(self, key: str, circumstances: str) -> bool:
        """Whether this was passed under the same circumstances."""
        return self._passed.get(key) == circumstances

    def record(self, key: str, circumstances: str, *, passed: bool) -> None:
        """Remember, or forget what no longer passes. A full disk is no reason to fail."""
        if passed:
            self._passed[key] = circumstances
        elif self._passed.pop(key, None) is None:
            return
        with contextlib.suppress(OSError):
            write_atomically(self._path, msgspec.json.encode(self._passed))


class Prover:
    """Proves models. `prove_all` is its only task.

    Args:
        verify: checks a model's files, returns its revision, raises FaultError.
        probe: as `supervisor.probe.probe_engine`.
    """

    def __init__(
        self,
        verify: Verify,
        verdicts: Verdicts,
        on_proof: OnProof,
        *,
        probe: ProbeEngine = probe_engine,
        backoff: Callable[[], Backoff] = lambda: Backoff(FIRST_RETRY_S, LAST_RETRY_S),
    ) -> None:
        self._verify = verify
        self._verdicts = verdicts
        self._on_proof = on_proof
        self._probe = probe
        self._backoff = backoff
        self._limiter = trio.CapacityLimiter(AT_ONCE)
        self._locks: dict[str, trio.Lock] = {}

    async def prove_all(self, specs: Sequence[ModelSpec]) -> None:
        """Prove all models side by side; returns when all are proved, which may be never."""
        async with trio.open_nursery() as nursery:
            for spec in specs:
                nursery.start_soon(self.prove, spec)

    async def again(self, spec: ModelSpec) -> str:
        """Prove a model that was proved before, whatever is remembered; why it fails, or "".

        Cancellation: the probe's child is ended.
        """
        try:
            await self._verify(spec)
        except FaultError as error:
            return error.fault.message
        return await self._engine(spec.engine, spec.model.backend, spec.model.device, remembered=False)

    async def prove(self, spec: ModelSpec) -> None:
        """Prove a model until it passes, with growing pauses; every proof is told to `on_proof`.

        Cancellation: the probe's child is ended.
        """
        backoff = self._backoff()
        while True:
            proof = await self.once(spec)
            self._on_proof(spec, proof)
            if proof.ok:
                return
            log.error("%s is not announced: %s", spec.name, proof.reason, extra={"engine": spec.engine.name})
            await trio.sleep(backoff.pause_s())

    async def once(self, spec: ModelSpec) -> Proof:
        """Check a model's files and prove its engine, unless that is remembered.

        Cancellation: the probe's child is ended.
        """
        try:
            revision = await self._verify(spec)
        except FaultError as error:
            return Proof(ok=False, reason=error.fault.message)
        reason = await self._engine(spec.engine, spec.model.backend, spec.model.device)
        return Proof(ok=not reason, reason=reason, revision=revision)

    async def _engine(self, engine: EngineSpec, backend: str, device: str, *, remembered: bool = True) -> str:
        """Why this engine must not serve; "" when it may."""
        key = "/".join((engine.name, backend, device))
        async with self._locks.setdefault(key, trio.Lock()):
            circumstances = await trio.to_thread.run_sync(circumstances_of, engine)
            if remembered and self._verdicts.holds(key, circumstances):
                return ""
            async with self._limiter:
                try:
                    probe = await self._probe(engine.name, engine, backend, device, deadline_s=PROBE_DEADLINE_S)
                except OSError as error:  # no room for its folder, say: that proves nothing
                    return f"the engine {engine.name} could not be probed: {error}"
            self._verdicts.record(key, circumstances, passed=probe.ok)
        if probe.ok:
            log.info("%s works on %s", engine.name, probe.device_executed or device)
            return ""
        words = " ".join(part for part in (probe.message, probe.hint) if part)
        return f"the probe of the engine {engine.name} says {probe.verdict}: {words}"


def circumstances_of(engine: EngineSpec) -> str:
    """A digest of what a probe's verdict depends on: interpreter, installed packages, our engine code, driver."""
    parts = [engine.module, engine.python, sys.platform, repr(sorted(engine.env.items()))]
    prefix = Path(engine.python).parent.parent
    watched = [Path(engine.python), *sorted(prefix.glob("lib*/python*/site-packages")), ROOT / "engines" / "launch.py"]
    folder = ROOT.joinpath(*engine.module.split(".")[:-1])
    shared = (ROOT / "engines" / name for name in ("runtime", "lockdown", "diffusion"))
    for code in (folder, *shared, ROOT / "protocol"):
        watched += sorted(code.glob("**/*.py")) if code.is_dir() and code != ROOT else []
    for path in watched:
        with contextlib.suppress(OSError):
            state = os.stat(path)
            parts.append(f"{path} {state.st_ino} {state.st_size} {state.st_mtime_ns}")
    for path in (Path("/proc/driver/nvidia/version"), Path("/proc/driver/nvidia/gpus")):
        with contextlib.suppress(OSError):
            parts.append(path.read_text() if path.is_file() else repr(sorted(os.listdir(path))))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
