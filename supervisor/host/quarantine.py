"""A lane's record of bad ends, and the quarantine that follows too many; see restart.py for the rules.

A quarantine outlives the supervisor: a model that takes the GPU down must not get a fresh chance with each restart of
the service. It belongs to the model as it is configured: a changed file, option or interpreter is another model.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import trio

from protocol.faults import Fault, FaultError
from supervisor.host import restart
from supervisor.host.child import Child
from supervisor.host.means import Means
from supervisor.host.restart import Next, Record
from supervisor.host.work import ModelSpec
from supervisor.settings import LimitsTable
from supervisor.state import write_atomically

log = logging.getLogger(__name__)


class Kept(msgspec.Struct, frozen=True, kw_only=True):
    """One quarantine as it is kept.

    Attributes:
        identity: of the model as it was configured.
        until: seconds since the epoch.
        reason: one sentence: the last cause.
        code: of its fault.
        times: quarantines in a row.
    """

    identity: str
    until: float
    reason: str
    code: str = ""
    times: int = 1


class Quarantines:
    """A file with every model's quarantine: the `Means.memory` of a real supervisor."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def load(self, model: str) -> Mapping[str, Any]:
        """What was saved for a model; a file that cannot be read holds nothing."""
        found = self._all().get(model)
        return found if isinstance(found, dict) else {}

    def save(self, model: str, what: Mapping[str, Any]) -> None:
        """Keep it, or forget it when it is empty; a disk that refuses costs the memory, never the lane."""
        known = self._all()
        if not what and model not in known:
            return
        known.pop(model, None)
        if what:
            known[model] = dict(what)
        try:
            write_atomically(self._path, msgspec.json.format(msgspec.json.encode(known)) + b"\n")
        except OSError as error:
            log.warning("The quarantine of %s could not be kept in %s: %s.", model, self._path, error.strerror)

    def _all(self) -> dict[str, Any]:
        with contextlib.suppress(OSError, msgspec.MsgspecError):
            found = msgspec.json.decode(self._path.read_bytes())
            if isinstance(found, dict):
                return found
        return {}


class Standing:
    """How one lane stands: its record, and the quarantine that it is in.

    Attributes:
        record: bad ends and quarantines in a row.
        fault: what new runs get while it is in quarantine; None while it is not.
    """

    def __init__(self, spec: ModelSpec, limits: LimitsTable, means: Means) -> None:
        self.record = Record()
        self.fault: Fault | None = None
        self._spec, self._limits, self._means = spec, limits, means
        self._table = limits.restart
        self._abandoned: Child | None = None  # a process that could not be killed
        self._late_death = trio.Event()  # of that one; never set without one

    def recalled(self) -> float | None:
        """Seconds that a quarantine of an earlier life still lasts; None when there is none."""
        saved = self._means.memory.load(self._spec.name)
        if not saved:
            return None
        try:
            kept = msgspec.convert(saved, type=Kept)
        except msgspec.ValidationError:
            return None
        if kept.identity != identity(self._spec):
            self._means.memory.save(self._spec.name, {})
            return None
        self.record = Record(self._table.quarantine_after, kept.times)
        self._bar(kept.reason, kept.code)
        longest = max(restart.LONGEST_QUARANTINE_S, self._table.reprobe_s)
        return min(max(0.0, kept.until - self._means.wall()), longest)  # somebody may have set the clock

    def apply(self, limits: LimitsTable) -> None:
        """Go on with other limits, from the next bad end on."""
        self._limits, self._table = limits, limits.restart

    def bad_end(self, fault: Fault, *, well: bool, loading: bool) -> Next:
        """One more bad end; what follows."""
        jitter = self._means.jitter()
        following = restart.after_bad_end(self.record, self._table, well=well, loading=loading, jitter=jitter)
        return self._follow(following, fault)

    def barred(self, fault: Fault) -> Next:
        """Into quarantine, or into another one, whatever the record says."""
        return self._follow(restart.barred(self.record, self._table, self._means.jitter()), fault)

    def abandon(self, child: Child) -> None:
        """Take note of a process that nobody can kill: no probe passes while it is there."""
        self._abandoned, self._late_death = child, child.gone

    async def serve(self, pause_s: float) -> None:
        """Sit out a quarantine and its prolongations until a probe passes, then lift it."""
        while True:
            with trio.move_on_after(pause_s):
                await self._late_death.wait()
            problem = await self._probe()
            if not problem:
                break
            code = self.fault.detail.get("cause", "") if self.fault is not None else ""
            pause_s = self.barred(Fault(code or "load_failed", problem)).pause_s
            log.warning("%s stays in quarantine for another %.0f s: %s", self._spec.name, pause_s, problem)
        self._lift()

    async def _probe(self) -> str:
        """Try the model; "" when it passed, else why not."""
        if self._abandoned is not None:
            if not self._abandoned.gone.is_set():
                return f"Process {self._abandoned.stuck_pid} of engine {self._spec.engine.name} still cannot be killed."
            self._abandoned, self._late_death = None, trio.Event()
        limit_s = self._limits.start_s + self._limits.load_s + self._limits.first_output_s
        with trio.move_on_after(limit_s):
            try:
                return await self._means.reprobe(self._spec)
            except FaultError as error:
                return error.fault.message
        return f"Its probe did not end within {limit_s:g} s."

    def _lift(self) -> None:
        """A probe has passed: the next load decides."""
        self.record = restart.lifted(self.record, self._table)
        self.fault = None
        self._means.memory.save(self._spec.name, {})

    def _follow(self, following: Next, fault: Fault) -> Next:
        self.record = following.record
        if following.quarantined:
            self._bar(fault.message, fault.code)
            kept = Kept(
                identity=identity(self._spec),
                until=self._means.wall() + following.pause_s,
                reason=fault.message,
                code=fault.code,
                times=self.record.quarantines,
            )
            self._means.memory.save(self._spec.name, msgspec.to_builtins(kept))
        return following

    def _bar(self, cause: str, code: str) -> None:
        text = f"Model {self._spec.name} is out of service here until a probe of it passes. The last cause: {cause}"
        self.fault = Fault("quarantined", text, detail={"cause": code})


def identity(spec: ModelSpec) -> str:
    """Tells one configuration of a model from another: what is loaded, by which engine, on what."""
    files = {role: _stamp(path) for role, path in sorted(spec.model.files.items())}
    whole = (spec.engine, spec.model, files, _stamp(spec.engine.python))
    return hashlib.sha256(msgspec.json.encode(whole, order="sorted")).hexdigest()[:32]


def _stamp(path: str) -> tuple[int, int]:
    """Size and time of a file, so that a new one under the old name is noticed."""
    try:
        found = Path(path).stat()
    except OSError:
        return 0, 0
    return found.st_size, found.st_mtime_ns
