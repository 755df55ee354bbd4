"""The models of a running supervisor: how they come, how they are proved, and how they go.

Theory of operation. A model comes at the start, with a reload of worker.toml (`follow`), or because somebody asks for
it (`take_on`: an order of the coordinator, a job that brings the address of its model). It gets its lanes at once and
is announced when its files were checked and its engine was proved, as at the start. What worker.toml names is proved
again and again until it passes; what somebody asked for is proved once, and goes again when that fails.

A model that goes takes no more jobs from that moment on. Those that were accepted finish (or get until a deadline),
then its instances end, its folders are removed and its name is free. A model whose settings have changed goes and comes
again, under the same name: the last change counts.

    coming   proof under way      `take_on` of the same settings waits along; of others is refused
    here     proved, or (worker.toml) not yet proved
    leaving  no way back          `take_on` waits for the end, then begins; `let_go` waits along

Who asks may give up: a model that nobody else waits for goes again, a model that leaves goes on leaving. All methods
belong to the trio thread.
"""

from __future__ import annotations

import enum
import logging
import math
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import msgspec
import trio

from protocol.faults import Fault, refuse
from supervisor.config import build_models
from supervisor.config_models import check_models
from supervisor.host.work import ModelSpec
from supervisor.link.ledger import Ledger
from supervisor.link.register import Proof
from supervisor.served import Served
from supervisor.settings import ModelTable, Settings

log = logging.getLogger(__name__)


class Origin(enum.StrEnum):
    """Who wants a model."""

    CONFIG = "worker.toml"
    ORDER = "an order"
    DOWNLOAD = "a job"


class Lanes(Protocol):
    """The part of the host that is used here."""

    def take_on(self, spec: ModelSpec) -> None:
        """See `Host.take_on`."""

    async def let_go(self, model: str, reason: str) -> None:
        """See `Host.let_go`."""

    def preload(self, model: str, *, ordered: bool = False) -> None:
        """See `Host.preload`."""


class Proving(Protocol):
    """The part of `Prover` that is used here. Proofs of `prove` are told to `Roster.proved`."""

    async def once(self, spec: ModelSpec) -> Proof:
        """Prove a model once."""

    async def prove(self, spec: ModelSpec) -> None:
        """Prove a model until it passes."""


class Jobs(Protocol):
    """The part of `Attempts` that is used here."""

    ledger: Ledger

    def stop_models(self, models: Collection[str], fault: Fault) -> None:
        """See `Attempts.stop_models`."""


class Around(NamedTuple):
    """Whom a change concerns, besides the host.

    Attributes:
        joined: told of every model that comes later than the start, before it is served.
        changed: what is announced or shown is another.
        keep_files: told the files and folders of the models that are left, when one has gone.
        stopping: why no model is taken on any more; "" while one may be.
    """

    joined: Callable[[ModelSpec], None] = lambda _spec: None
    changed: Callable[[], None] = lambda: None
    keep_files: Callable[[set[Path]], None] = lambda _paths: None
    stopping: Callable[[], str] = lambda: ""


class _Entry:
    """One model. `told`: how its proof went is known; `gone`: it has left, and its name is free.

    Attributes:
        fault: why it is not served, once `told`; None when it is.
        leaving: why it goes; "" while it stays.
        heir: what comes under its name when it has left.
        patience: how long its jobs may take once it leaves.
    """

    def __init__(self, table: ModelTable, spec: ModelSpec, origin: Origin) -> None:
        self.table, self.spec, self.origin = table, spec, origin
        self.scope, self.patience = trio.CancelScope(), trio.CancelScope()
        self.told, self.gone = trio.Event(), trio.Event()
        self.fault: Fault | None = None
        self.leaving = ""
        self.heir: tuple[ModelTable, ModelSpec] | None = None
        self.waiting = 0

    def lasting(self) -> bool:
        """Whether worker.toml names it: it may come to do so at any time."""
        return self.origin is Origin.CONFIG

    def tell(self, fault: Fault | None) -> None:
        if not self.told.is_set():
            self.fault = fault
            self.told.set()


class Roster:
    """See the module. `run` is its task; `take_on` waits until it was started, `follow` and `let_go` come later.

    Args:
        settings: those in force.
        served: what is announced; it has the models of the start already.
        prover: proves models.
    """

    def __init__(self, settings: Callable[[], Settings], served: Served, prover: Proving) -> None:
        self._settings, self._served, self._prover = settings, served, prover
        tables = {table.name: table for table in settings().models}
        self._entries = {spec.name: _Entry(tables[spec.name], spec, Origin.CONFIG) for spec in served.specs}
        self._dismissed: dict[str, ModelSpec] = {}  # of worker.toml, let go by somebody else's word
        self._around = Around()
        self._begun = trio.Event()
        self._over = False
        self._lanes: Lanes
        self._jobs: Jobs
        self._nursery: trio.Nursery

    @property
    def specs(self) -> Sequence[ModelSpec]:
        """All models that have lanes, those included that are not proved, or leave."""
        return self._served.specs

    def origin(self, model: str) -> Origin | None:
        """Who wanted a model; None when there is none of this name. One that leaves is still there."""
        entry = self._entries.get(model)
        return None if entry is None else entry.origin

    def leaving(self, model: str) -> str:
        """Why a model goes; "" when it stays, or there is none."""
        entry = self._entries.get(model)
        return "" if entry is None else entry.leaving

    async def run(
        self, lanes: Lanes, jobs: Jobs, around: Around, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Prove the models of the start, and see to all others. Runs until cancelled."""
        self._lanes, self._jobs, self._around = lanes, jobs, around
        try:
            async with trio.open_nursery() as self._nursery:
                for entry in self._entries.values():
                    self._nursery.start_soon(self._prove, entry)
                self._begun.set()
                task_status.started()
                await trio.sleep_forever()
        finally:
            self._over = True
            self._begun.set()
            for entry in self._entries.values():
                entry.tell(_stopping("the worker stops"))
                entry.gone.set()

    # ---- coming

    async def take_on(self, table: ModelTable, origin: Origin = Origin.ORDER) -> Fault | None:
        """Serve one more model, proved and announced; why not, when it cannot be.

        Twice the same is one; the same name with other settings is refused. A model that was taken on and did not pass
        its proof has gone when this returns.

        Cancellation: at once; the model goes again, unless somebody else waits for it or it is proved already.
        """
        problems = [
            f"{'.'.join(map(str, at[2:]))} {words}" for at, words in check_models([table], self._settings().engines)
        ]
        if problems:
            return refuse("invalid_request", f"The model {table.name!r} cannot be served: {'; '.join(problems)}.").fault
        spec = self._spec(table)
        await self._begun.wait()
        while (entry := self._entries.get(spec.name)) is not None and entry.leaving:
            if self._over:
                break
            await entry.gone.wait()
        if why := "the worker stops" if self._over else self._around.stopping():
            return _stopping(why)
        if entry is None:
            entry = self._enlist(table, spec, origin)
        elif not _alike(entry.spec, spec):
            text = f"There is a model {spec.name!r} here already, with other settings; let it go first."
            return refuse("conflict", text, "name").fault
        return await self._proof_of(entry)

    async def _proof_of(self, entry: _Entry) -> Fault | None:
        entry.waiting += 1
        try:
            await entry.told.wait()
        except trio.Cancelled:
            if entry.waiting == 1 and not entry.told.is_set() and entry.origin is not Origin.CONFIG:
                self._leave(entry, "nobody waits for it any more")
            raise
        finally:
            entry.waiting -= 1
        return entry.fault

    def _enlist(self, table: ModelTable, spec: ModelSpec, origin: Origin) -> _Entry:
        entry = self._entries[spec.name] = _Entry(table, spec, origin)
        self._dismissed.pop(spec.name, None)
        log.info("the model %s is taken on, as %s wants it", spec.name, origin.value)
        self._around.joined(spec)
        self._served.take_on(spec)
        self._lanes.take_on(spec)
        self._nursery.start_soon(self._prove, entry)
        self._around.changed()
        return entry

    async def _prove(self, entry: _Entry) -> None:
        name = entry.spec.name
        proof = Proof(ok=False)
        with entry.scope:
            if entry.lasting():
                await self._prover.prove(entry.spec)
                return
            proof = await self._prover.once(entry.spec)
            if not proof.ok and entry.lasting():  # worker.toml has come to name it meanwhile
                self.proved(entry.spec, proof)
                await self._prover.prove(entry.spec)
                return
        if proof.ok:
            self.proved(entry.spec, proof)
        elif not entry.leaving:  # else it was let go meanwhile, and whoever waits was told so
            log.error("%s is not taken on: %s", name, proof.reason, extra={"engine": entry.spec.engine.name})
            self._leave(entry, "it did not pass its proof", told=False)
            await entry.gone.wait()
            entry.tell(refuse("load_failed", f"The model {name} did not pass its proof: {proof.reason}").fault)

    def proved(self, spec: ModelSpec, proof: Proof) -> None:
        """How a proof went: of a model that is still the one it was."""
        entry = self._entries.get(spec.name)
        if entry is None or entry.spec is not spec or entry.leaving:
            return
        self._served.proved(spec.name, proof)
        if proof.ok:
            log.info("%s is served (%s)", spec.name, ", ".join(spec.model.kinds))
            entry.fault = None
        entry.tell(None if proof.ok else refuse("load_failed", f"{spec.name} is not served: {proof.reason}").fault)
        self._around.changed()
        if proof.ok and (entry.table.preload or spec.pin):
            self._lanes.preload(spec.name)

    # ---- going

    async def let_go(self, model: str, reason: str, *, within_s: float = math.inf) -> Fault | None:
        """Serve a model no more; returns when it has gone, or why it cannot go.

        Args:
            within_s: from now on; jobs that are not done then fail, and may be tried again elsewhere.

        Cancellation: at once; the model goes all the same.
        """
        entry = self._entries.get(model)
        if entry is None:
            return refuse("model_not_found", f"There is no model {model!r} here.").fault
        if entry.heir is not None:
            self._dismissed[model] = entry.heir[1]
        elif entry.origin is Origin.CONFIG and not entry.leaving:
            self._dismissed[model] = entry.spec
        entry.heir = None
        self._leave(entry, reason)
        entry.patience.deadline = min(entry.patience.deadline, trio.current_time() + within_s)
        await entry.gone.wait()
        return None

    def _leave(self, entry: _Entry, reason: str, *, told: bool = True) -> None:
        if entry.leaving:
            return
        entry.leaving = reason
        if told:
            entry.tell(_stopping(f"the model {entry.spec.name} is let go: {reason}"))
            entry.scope.cancel()
        log.info("the model %s is let go: %s", entry.spec.name, reason)
        self._served.proved(entry.spec.name, Proof(ok=False, reason=f"it is let go: {reason}"))
        self._around.changed()
        self._nursery.start_soon(self._see_off, entry)

    async def _see_off(self, entry: _Entry) -> None:
        name = entry.spec.name
        ledger = self._jobs.ledger
        with entry.patience:
            await ledger.wait_without(name)
        if ledger.taken(name):
            self._jobs.stop_models({name}, _stopping(f"the model {name} is let go: {entry.leaving}"))
            await ledger.wait_without(name)
        await self._lanes.let_go(name, entry.leaving)
        del self._entries[name]
        self._served.let_go(name)
        self._around.keep_files({Path(text) for spec in self.specs for text in spec.model.files.values()})
        log.info("the model %s has gone", name)
        if entry.heir is not None:
            self._enlist(*entry.heir, Origin.CONFIG)
        entry.gone.set()
        self._around.changed()

    # ---- worker.toml

    def follow(self, settings: Settings) -> None:
        """Have the models that worker.toml names by now, as it describes them. What others wanted stays.

        Returns at once: what comes is proved meanwhile, what goes finishes its jobs.
        """
        specs = {spec.name: spec for spec in build_models(settings)}
        tables = {table.name: table for table in settings.models}
        for entry in list(self._entries.values()):
            if entry.spec.name not in specs and entry.origin is Origin.CONFIG:
                entry.heir = None
                self._leave(entry, "worker.toml does not name it any more")
        for name in [name for name in self._dismissed if name not in specs]:
            del self._dismissed[name]
        for name, spec in specs.items():
            self._follow(tables[name], spec)
        self._served.sort(list(specs))

    def _follow(self, table: ModelTable, spec: ModelSpec) -> None:
        entry = self._entries.get(spec.name)
        dismissed = self._dismissed.get(spec.name)
        if dismissed is not None and _alike(dismissed, spec):
            if entry is not None:
                entry.heir = None  # of a change that was taken back
            return
        if entry is None:
            self._enlist(table, spec, Origin.CONFIG)
        elif not entry.leaving and _alike(entry.spec, spec):
            entry.table, entry.origin = table, Origin.CONFIG
        else:
            entry.heir = table, spec
            self._leave(entry, "its settings have changed")

    # ---- small parts

    def _spec(self, table: ModelTable) -> ModelSpec:
        (spec,) = build_models(msgspec.structs.replace(self._settings(), models=[table]))
        return spec


def _alike(one: ModelSpec, other: ModelSpec) -> bool:
    """Whether two are the same but for what the host changes while it runs (live_settings.MODEL_KEYS)."""
    return one == msgspec.structs.replace(other, stall_s=one.stall_s, keep_alive_s=one.keep_alive_s)


def _stopping(reason: str) -> Fault:
    return Fault("worker_stopping", f"{reason[:1].upper()}{reason[1:]}.")
