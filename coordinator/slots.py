"""Which workers serve a model, what is free there, and who holds an attempt: kept as it changes.

A submission asks for the free slots of one model, a claimed job for the best worker, and both may come thousands of
times a second, while thousands of workers are connected. So nothing here looks at a worker that has not changed since
the last look, but for those that only the clock opens again, when their time has come.
"""

from __future__ import annotations

import heapq
import itertools
from collections import UserDict
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

from coordinator.store.needs import Labels
from protocol.link_wire import ModelOffer

if TYPE_CHECKING:
    from coordinator.worker import HeldAttempt, Worker

Key = tuple[str, int]  # (job, attempt)
# Model, kinds, labels that some job asks for, GPU memory: slots that are alike to the jobs that wait.
Alike = tuple[str, tuple[str, ...], Labels, float | None]
# Cold, load, order of connecting, number of the entry, worker, offer: the least is the best place for a job.
_Place = tuple[bool, float, int, int, str, ModelOffer]

_NEVER = float("inf")
_SPARE = 64  # stale entries of a heap that are not worth making it anew


class Holding(UserDict[Key, "HeldAttempt"]):
    """The attempts of one worker; tells `Slots` of each that comes or goes."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        super().__init__()

    def __setitem__(self, key: Key, held: HeldAttempt) -> None:
        self.data[key] = held
        if self._worker.slots_of is not None:
            self._worker.slots_of.holds(self._worker, key)

    def __delitem__(self, key: Key) -> None:
        del self.data[key]
        if self._worker.slots_of is not None:
            self._worker.slots_of.let_go(self._worker, key)


class Slots:
    """See the module. A worker is counted here from `add` to `remove`, and says itself when it has changed."""

    def __init__(self) -> None:
        self.holders: dict[Key, Worker] = {}
        self._serving: dict[str, dict[str, Worker]] = {}  # model -> workers that announce it
        self._announced: dict[str, frozenset[str]] = {}  # worker -> models
        self._order: dict[str, int] = {}  # worker -> when it connected
        self._numbers = itertools.count()
        self._asked: Labels = frozenset()  # with which labels was counted
        self._changed: dict[str, Worker] = {}  # to be counted again at the next look
        self._shut: dict[str, tuple[float, Worker]] = {}  # those of which the clock opens something, and when
        self._opens_at = _NEVER
        self._alike: dict[str, dict[Alike, dict[str, int]]] = {}  # model -> slots that are alike -> worker -> free
        self._sums: dict[Alike, int] = {}
        self._loaded: dict[Alike, dict[str, int]] = {}  # those of `_alike` whose model is loaded
        self._given: dict[str, tuple[Alike, ...]] = {}  # worker -> where it is counted
        self._since: dict[str, int] = {}  # worker -> number of its first entry that still holds
        self._places: dict[str, list[_Place]] = {}  # model -> heap; entries that do not hold any more are passed over

    def add(self, worker: Worker) -> None:
        """Its session is open; one of the same name was removed before."""
        self._order[worker.id] = next(self._numbers)
        worker.slots_of = self
        for key in worker.attempts:
            self.holders[key] = worker
        self.changed(worker)

    def remove(self, worker: Worker) -> None:
        """Its session is over."""
        worker.slots_of = None
        for key in worker.attempts:
            self._forget(worker, key)
        self._uncount(worker.id)
        self._announce(worker, frozenset())
        for kept in (self._changed, self._announced, self._order, self._since, self._shut):
            kept.pop(worker.id, None)

    def changed(self, worker: Worker) -> None:
        """Something that a look goes by has changed."""
        self._changed[worker.id] = worker
        self._announce(worker, frozenset(offer.name for offer in worker.capabilities.models if offer.kinds))

    def holds(self, worker: Worker, key: Key) -> None:
        """It was given an attempt."""
        self.holders[key] = worker
        self._changed[worker.id] = worker

    def let_go(self, worker: Worker, key: Key) -> None:
        """It has an attempt no more."""
        self._forget(worker, key)
        self._changed[worker.id] = worker

    def serving(self, model: str) -> Mapping[str, Worker]:
        """The workers that announce a model, busy, paused and draining ones, too."""
        return self._serving.get(model, {})

    def free(
        self, now: float, asked: Labels, model: str | None = None
    ) -> Iterator[tuple[Alike, int, Mapping[str, int]]]:
        """Slots that are alike, of a model or of all: their sum, and how many each worker has.

        Args:
            now: seconds, as in `Worker.blocked`.
            asked: labels that some waiting job asks for; others make no difference.
        """
        self._look(now, asked)
        for name in list(self._alike) if model is None else [model]:
            for alike, free in self._alike.get(name, {}).items():
                yield alike, self._sums[alike], free

    def loaded(self, alike: Alike) -> Mapping[str, int]:
        """Of slots that `free` has just told, those whose model is loaded: how many each worker has."""
        return self._loaded.get(alike, {})

    def best(
        self, model: str, now: float, asked: Labels, takes: Callable[[Worker, ModelOffer], bool | None]
    ) -> Worker | None:
        """The worker with a free slot of the model that `takes` a job: loaded before cold, then the least busy, then
        the one that connected first. Of those for which `takes` says None, one only when there is no other."""
        self._look(now, asked)
        heap = self._places.get(model, [])
        passed: list[_Place] = []
        second: Worker | None = None
        try:
            while heap:
                place = heapq.heappop(heap)
                if place[3] < self._since.get(place[4], place[3] + 1):
                    continue  # it was counted again since
                passed.append(place)
                worker = self._serving[model][place[4]]
                said = takes(worker, place[5])
                if said:
                    return worker
                if said is None and second is None:
                    second = worker
            return second
        finally:
            for place in passed:
                heapq.heappush(heap, place)

    # ---- inside --------------------------------------------------------------------------------------------

    def _forget(self, worker: Worker, key: Key) -> None:
        if self.holders.get(key) is worker:
            del self.holders[key]

    def _announce(self, worker: Worker, models: frozenset[str]) -> None:
        before = self._announced.get(worker.id, frozenset())
        for model in before - models:
            serving = self._serving[model]
            del serving[worker.id]
            if not serving:
                del self._serving[model]
                self._places.pop(model, None)
        for model in models:
            self._serving.setdefault(model, {})[worker.id] = worker
        self._announced[worker.id] = models

    def _look(self, now: float, asked: Labels) -> None:
        """Count again what has changed."""
        if asked != self._asked:
            self._asked = asked
            self._changed = {worker.id: worker for serving in self._serving.values() for worker in serving.values()}
        if now >= self._opens_at:
            self._changed |= {worker.id: worker for at, worker in self._shut.values() if at <= now}
            self._opens_at = min((at for at, _ in self._shut.values() if at > now), default=_NEVER)
        if not self._changed:
            return
        changed = sorted(self._changed.values(), key=lambda worker: self._order[worker.id])
        self._changed = {}
        for worker in changed:
            self._uncount(worker.id)
        for worker in changed:
            self._count(worker, now)

    def _uncount(self, worker: str) -> None:
        for alike in self._given.pop(worker, ()):
            slots = self._alike[alike[0]][alike]
            self._sums[alike] -= slots.pop(worker)
            if (loaded := self._loaded.get(alike)) is not None:
                loaded.pop(worker, None)
                if not loaded:
                    del self._loaded[alike]
            if not slots:
                del self._alike[alike[0]][alike], self._sums[alike]
                if not self._alike[alike[0]]:
                    del self._alike[alike[0]]

    def _count(self, worker: Worker, now: float) -> None:
        self._since[worker.id] = next(self._numbers)
        worker.unblock(now)
        self._shut.pop(worker.id, None)
        if (at := worker.opens_at(now)) is not None:
            self._shut[worker.id] = (at, worker)
            self._opens_at = min(self._opens_at, at)
        labels, room_gb = (worker.labels & self._asked if self._asked else self._asked), worker.room_gb
        given: dict[Alike, None] = {}
        for offer in worker.capabilities.models:
            if not offer.kinds or not worker.open_to(offer.name, now) or not (free := worker.free(offer)):
                continue
            alike = (offer.name, tuple(sorted(offer.kinds)), labels, room_gb)
            slots = self._alike.setdefault(offer.name, {}).setdefault(alike, {})
            slots[worker.id] = slots.get(worker.id, 0) + free
            self._sums[alike] = self._sums.get(alike, 0) + free
            if offer.resident:
                loaded = self._loaded.setdefault(alike, {})
                loaded[worker.id] = loaded.get(worker.id, 0) + free
            given[alike] = None
            self._enter(worker, offer)
        self._given[worker.id] = tuple(given)

    def _enter(self, worker: Worker, offer: ModelOffer) -> None:
        heap = self._places.setdefault(offer.name, [])
        if len(heap) > 4 * len(self._serving[offer.name]) + _SPARE:
            heap[:] = [place for place in heap if place[3] >= self._since.get(place[4], place[3] + 1)]
            heapq.heapify(heap)
        load = len(worker.attempts) / max(1, worker.slots)
        number = next(self._numbers)
        heapq.heappush(heap, (not offer.resident, load, self._order[worker.id], number, worker.id, offer))
