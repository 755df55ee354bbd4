"""Carries deployments out: plans with the other replicas over the store, orders the workers that are connected here.

Theory of operation. Every `TICK_S` each replica writes which workers it has, plans every deployment that no other
replica plans just now, and looks at the placements of its own workers: it orders `serve` and `unserve`, and writes what
came of it. Nothing that matters is in memory: a replica that dies leaves placements that the worker's next replica
finds, and an order that was given twice is carried out once (a pull of the same file follows the one under way). What a
worker that is away is to let go of waits for it the same way, longer than its deployment.

A placement is ready when its worker announces the model, that is after it was fetched, loaded and proved there.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import anyio
import msgspec
from anyio.abc import TaskGroup

from coordinator.deploy.plan import due, plan
from coordinator.deploy.spec import Candidate, Deployment, Placement, PlacementState, how_far, model_name
from coordinator.fleet import FOREVER, Fleet, Worker
from coordinator.logs import trouble
from coordinator.store import Store, StoreError
from coordinator.store.deployments import Wish
from coordinator.store.threads import StoreThreads
from protocol.faults import FaultError
from protocol.link_wire import Capabilities, OrderDone

log = logging.getLogger(__name__)

TICK_S = 2.0
SERVE_S = 6 * 3600.0  # a large model over a slow line
UNSERVE_S = 120.0
TELL_MS = 10_000  # between two words of how far a download is
AGAIN_S = 15.0  # before a worker that cannot be ordered to let go is tried again
ANNOUNCE_S = 30.0  # between the answer to `serve` and the announcement
MOST_AT_ONCE = 64  # orders under way from here: those who wait do not all ask one server for a model
MOST_OF_ONE = 4  # of these for one worker: one that is slow, or never answers, keeps no other waiting

Give = Callable[[Worker, str, dict[str, Any], float], Awaitable[OrderDone]]
_Key = tuple[str, str]  # (worker, model)


@dataclasses.dataclass
class _Errand:
    """An order under way, or answered `until` a moment ago."""

    worker: Worker
    verb: str
    scope: anyio.CancelScope = dataclasses.field(default_factory=anyio.CancelScope)
    until: float = FOREVER


class Deployer:
    """See the module. Everything is called on the event loop.

    Args:
        give: orders a connected worker and returns its answer; raises FaultError when there is none.
    """

    def __init__(self, store: Store, threads: StoreThreads, fleet: Fleet, give: Give) -> None:
        self._store, self._threads, self._fleet, self._give = store, threads, fleet, give
        self._names: dict[str, str] = {}
        self._hidden: frozenset[str] = frozenset()
        self._written: dict[str, tuple[Worker, Capabilities, bool]] = {}
        self._errands: dict[_Key, _Errand] = {}
        self._bell = anyio.Event()

    # ---- names ---------------------------------------------------------------------------------------------

    def model_of(self, name: str) -> str:
        """What workers call the model that clients ask for by this name."""
        return self._names.get(name, name)

    def name_of(self, model: str) -> str | None:
        """What clients call a model of workers; None when it is a revision that does not answer clients."""
        if model not in self._hidden:
            return model
        return next((name for name, current in self._names.items() if current == model), None)

    def ring(self) -> None:
        """Something was asked for: do not wait for the next tick."""
        self._bell.set()

    # ---- for admins ----------------------------------------------------------------------------------------

    async def deploy(self, name: str, wish: Wish) -> Deployment:
        """Ask for a model to be served, see `Deployments.deploy`. Raises StoreError, and what `wish` raises."""
        made = await self._threads.write(self._store.deploy, name, wish)
        asked = made.asked
        log.info("%s is to be served by %d workers, revision %s", name, asked.replicas, asked.revision)
        self.ring()
        return made

    async def undeploy(self, name: str) -> Deployment | None:
        """Let all workers go of it; None when there is no such deployment."""
        left = await self._threads.write(self._store.undeploy, name)
        if left is not None:
            log.info("%s is not to be served any more", name)
            self.ring()
        return left

    async def find(self, name: str) -> Deployment | None:
        """The deployment of this name."""
        found = await self._threads.read(self._store.deployments)
        return next((one for one in found if one.name == name), None)

    async def state(self) -> tuple[list[Deployment], list[Placement], dict[str, Candidate], int]:
        """All deployments, placements and workers, and the store's clock in ms."""

        def read() -> tuple[list[Deployment], list[Placement], dict[str, Candidate], int]:
            store = self._store
            return store.deployments(), store.placements(), store.candidates(), store.now_ms()

        return await self._threads.read(read)

    # ---- the loop ------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Plan and order until cancelled. Trouble with the store is logged and tried again."""
        async with anyio.create_task_group() as tasks:
            first = True
            while True:
                try:
                    if first:
                        await self._threads.write(self._store.all_lost)
                        first = False
                    await self.tick(tasks)
                except (StoreError, FaultError, OSError) as error:
                    trouble(log, error, "The deployments wait for the store")
                self._bell = anyio.Event()
                with anyio.move_on_after(TICK_S):
                    await self._bell.wait()

    async def tick(self, tasks: TaskGroup) -> None:
        """One look at everything; orders are given in `tasks`."""
        await self._write_presence()
        began = anyio.current_time()
        standing = await self._threads.read(self._store.standing, plan)
        if not standing.settled:
            await self._threads.write(self._store.replan, plan)
            standing = await self._threads.read(self._store.standing, plan)
        # Always: a replica that had not heard of a change yet has queued jobs by the old name; others come back to the
        # queue, also long after their deployment has gone.
        await self._threads.write(self._store.redirect)
        known, placements, now_ms = standing.deployments, standing.placements, standing.now_ms
        self._learn(known, placements)
        self._forget_errands(began)
        for placement in placements:
            worker = self._fleet.workers.get(placement.worker)
            if worker is not None and worker.protocol == "native":
                await self._look(placement, worker, known, now_ms, tasks)

    async def _write_presence(self) -> None:
        there = {worker.id: worker for worker in self._fleet.workers.values() if worker.protocol == "native"}
        for name in [name for name in self._written if name not in there]:
            await self._threads.write(self._store.lost, name)
            del self._written[name]
        # Another coordinator may have had the worker meanwhile, and a database that failed over may have lost the row.
        present = await self._threads.read(self._store.present) if there else set[str]()
        for worker in there.values():
            now = (worker, worker.capabilities, worker.draining)
            if worker.id not in present or self._written.get(worker.id) != now:
                await self._threads.write(self._store.seen, worker.id, worker.capabilities, draining=worker.draining)
                self._written[worker.id] = now

    def _learn(self, known: Sequence[Deployment], placements: Sequence[Placement]) -> None:
        """A deployment takes its name when a revision of it answers for the first time, and gives it back when it goes.

        Until then, and from then on, a model of that name which an owner serves by himself is what clients get.
        """
        without = {one.name for one in known if one.leaving or not one.current}
        owners = self._announced(without) if without else set()
        answering = [one for one in known if one.name not in owners]
        self._names = {one.name: model_name(one.name, one.current or one.asked.revision) for one in answering}
        self._hidden = frozenset(one.model for one in placements).union(self._names)

    def _announced(self, names: set[str]) -> set[str]:
        workers = self._fleet.all_workers().values()
        offers = (offer for worker in workers if not worker.draining for offer in worker.capabilities.models)
        return {offer.name for offer in offers if offer.kinds and offer.name in names}

    def _forget_errands(self, began: float) -> None:
        """Those that ended before this look began to read: what came of the others may not be in what it read."""
        for key, errand in list(self._errands.items()):
            if self._fleet.workers.get(key[0]) is not errand.worker:
                errand.scope.cancel()
                del self._errands[key]
            elif errand.until < began:
                del self._errands[key]

    async def _look(
        self, placement: Placement, worker: Worker, known: Sequence[Deployment], now_ms: int, tasks: TaskGroup
    ) -> None:
        key = (worker.id, placement.model)
        announced = any(offer.name == placement.model and offer.kinds for offer in worker.capabilities.models)
        state = placement.state
        errand = self._errands.get(key)
        if (
            errand is not None
            and errand.verb == "serve"
            and (
                state == "leaving"  # a download of hours that nobody wants any more
                or (announced and errand.until < FOREVER)  # that it was served is what the rest was for
            )
        ):
            errand.scope.cancel()
            del self._errands[key]
        if announced and state in ("wanted", "fetching", "failed"):
            await self._write(placement, "ready", "")
        elif announced and state == "ready":
            return
        elif key in self._errands:
            await self._tell(placement, worker, now_ms)
        elif state == "leaving":
            if not any(held.model == placement.model for held in worker.attempts.values()):
                self._begin(key, worker, "unserve", tasks, self._unserve, placement, worker)
        elif self._has_enough_to_do(worker):
            return
        # One that was ready and is not announced is asked for, too: the worker has begun anew, and proves it again.
        elif state in ("ready", "fetching") or due(placement, now_ms):
            deployment = next((one for one in known if one.name == placement.deployment), None)
            asked = deployment.of(placement.revision) if deployment is not None else None
            if asked is not None and await self._write(placement, "fetching", ""):
                arguments = {
                    "name": placement.model,
                    "source": asked.source,
                    "sha256": asked.sha256,
                    "file": asked.file,
                    "engine": asked.engine,
                    "options": asked.options,
                }
                self._begin(key, worker, "serve", tasks, self._serve, placement, worker, arguments)

    async def _tell(self, placement: Placement, worker: Worker, now_ms: int) -> None:
        """Write what the worker says of how far it is, where all replicas see it; not at every beat."""
        fetch = next((one for one in worker.fetches if one.model == placement.model), None)
        words = how_far(fetch) if fetch is not None else ""
        soon = placement.reason and now_ms < placement.changed_ms + TELL_MS
        if placement.state == "fetching" and words not in ("", placement.reason) and not soon:
            await self._write(placement, "fetching", words)

    def _has_enough_to_do(self, worker: Worker) -> bool:
        serving = [errand.worker for errand in self._errands.values() if errand.verb == "serve"]
        return len(serving) >= MOST_AT_ONCE or serving.count(worker) >= MOST_OF_ONE

    def _begin(
        self,
        key: _Key,
        worker: Worker,
        verb: str,
        tasks: TaskGroup,
        step: Callable[..., Awaitable[float]],
        *arguments: Any,
    ) -> None:
        errand = self._errands[key] = _Errand(worker, verb)

        async def go() -> None:
            with errand.scope:
                rest_s = 0.0
                try:
                    rest_s = await step(*arguments)
                except (StoreError, FaultError, OSError) as error:
                    if isinstance(error, FaultError):  # no answer, or a full disk: it will be no other at once
                        rest_s = AGAIN_S
                    log.warning("%s of %s at %s: %s", verb, key[1], key[0], error)
                errand.until = anyio.current_time() + rest_s
            self.ring()

        tasks.start_soon(go)

    async def _serve(self, placement: Placement, worker: Worker, arguments: dict[str, Any]) -> float:
        """How long nothing more needs to be asked, in seconds."""
        log.info("%s is to serve %s", worker.id, placement.model)
        fetching = msgspec.structs.replace(placement, state="fetching")
        try:
            done = await self._give(worker, "serve", arguments, SERVE_S)
        except FaultError as error:
            await self._write(fetching, "failed", error.fault.message, failed=True)
            return 0.0
        if not done.ok:
            log.warning("%s cannot serve %s: %s", worker.id, placement.model, done.message)
            await self._write(fetching, "failed", done.message, failed=True)
            return 0.0
        return ANNOUNCE_S

    async def _unserve(self, placement: Placement, worker: Worker) -> float:
        done = await self._give(worker, "unserve", {"name": placement.model}, UNSERVE_S)
        if not done.ok:  # its owner decides what lies on his disk
            log.warning("%s does not let go of %s: %s", worker.id, placement.model, done.message)
        await self._threads.write(self._store.unplaced, placement)
        return 0.0

    async def _write(self, placement: Placement, state: PlacementState, reason: str, *, failed: bool = False) -> bool:
        failures = placement.failures + 1 if failed else 0 if state == "ready" else placement.failures
        words = reason.replace("\0", "")  # a worker's; a database takes any other text
        changed = msgspec.structs.replace(placement, state=state, reason=words, failures=failures)
        return await self._threads.write(self._store.placed, changed, [placement.state])
