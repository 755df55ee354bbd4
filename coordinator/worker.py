"""One connected worker and what it holds. No I/O; times are handed in, in seconds."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal, Protocol

from coordinator.quarantine import Models
from coordinator.records import WorkerView
from coordinator.slots import Holding, Key, Slots
from coordinator.store.needs import Labels, fits
from protocol.link_wire import Body, Capabilities, Fetch, GpuState, ModelOffer, OrderDone

_COUNTED = frozenset({"capabilities", "draining", "at_once", "vram_gb"})  # what `Slots` goes by, beside the methods


class Port(Protocol):
    """The way to a connected worker. Neither method waits."""

    def send(self, body: Body, job: str = "", attempt: int = 0) -> None:
        """Queue a message; a worker that does not read is disconnected instead."""

    def close(self, code: str, message: str) -> None:
        """Say `error` and end the session; `code` is one of `link_wire.Error`."""


@dataclasses.dataclass
class HeldAttempt:
    """One attempt that a worker has been offered or works on.

    Attributes:
        state: "abandoned" means the row went on without it: it still takes a slot until the worker ends it.
        next_seq: number of the next chunk to forward; None when it is unknown after a restart of ours.
        since: when it was offered.
        needs, vram_gb: what its job needs of a worker, as in the row.
        origin: the replica that the job's client asked.
    """

    job: str
    attempt: int
    kind: str
    model: str
    state: Literal["offered", "running", "abandoned"]
    stream: bool = False
    streamed: bool = False
    next_seq: int | None = 0
    since: float = 0.0
    needs: str = ""
    vram_gb: float = 0.0
    origin: str = ""

    @property
    def key(self) -> Key:
        """(job, attempt)."""
        return (self.job, self.attempt)


@dataclasses.dataclass(eq=False)
class Worker:
    """One connected worker.

    Attributes:
        protocol: what its session speaks.
        key_id: prefix of the key that it came with, where it came with one.
        at_once: how many jobs it takes at a time over all its models; None when only their slots count.
        vram_gb: its dialect's word for the most GPU memory that a job may be reckoned to need; None when the
            announcement says it.
        resumes: whether it keeps what it has accepted when its session ends, and goes on with it in the next one.
        view: of a worker that is connected to another replica: what that one told of it last.
        refuses: of such a one: jobs that it will never take.
        failing: how jobs have failed on it lately, by model; while it rests from a model it gets no offer of it.
        slots_of: where its free slots are counted, while it is in a fleet.
    """

    id: str
    port: Port
    capabilities: Capabilities
    attempts: Holding = dataclasses.field(init=False)
    draining: bool = False
    revision: int = 1  # of the link, in this session
    gpus: tuple[GpuState, ...] = ()  # as the last heartbeat told
    fetches: tuple[Fetch, ...] = ()  # the same
    orders: dict[str, Callable[[OrderDone], None]] = dataclasses.field(default_factory=dict)  # by id, who waits
    # Model -> no offer before this time; "" speaks of all models. A new announcement lifts them.
    blocked: dict[str, float] = dataclasses.field(default_factory=dict)
    protocol: str = "native"
    at_once: int | None = None
    vram_gb: float | None = None
    resumes: bool = True
    key_id: str = ""
    view: WorkerView | None = None
    refuses: frozenset[str] = frozenset()
    failing: Models = dataclasses.field(default_factory=dict)
    slots_of: Slots | None = None

    def __post_init__(self) -> None:
        self.attempts = Holding(self)

    def __setattr__(self, name: str, value: object) -> None:
        super().__setattr__(name, value)
        if name in _COUNTED and self.slots_of is not None:
            self.slots_of.changed(self)

    @property
    def slots(self) -> int:
        """Concurrent jobs over all its models."""
        slots = sum(offer.slots for offer in self.capabilities.models)
        return slots if self.at_once is None else min(slots, self.at_once)

    @property
    def room_gb(self) -> float | None:
        """Most GPU memory that a job may be reckoned to need here; None sets no limit.

        Without a word of the worker's own it is all its GPUs together: what one of them holds, only it can tell.
        """
        if self.vram_gb is not None:
            return self.vram_gb
        if self.capabilities.vram_threshold_gb > 0:
            return self.capabilities.vram_threshold_gb
        return sum(gpu.vram_bytes for gpu in self.capabilities.gpus) / 2**30 if self.capabilities.gpus else None

    @property
    def labels(self) -> Labels:
        """Its labels, as jobs ask for them."""
        return frozenset(self.capabilities.labels.items())

    def fits(self, needs: str, vram_gb: float) -> bool:
        """Whether it has what a job needs beside its model."""
        return fits(needs, vram_gb, self.labels, self.room_gb)

    def offer_of(self, kind: str, model: str) -> ModelOffer | None:
        """Its announcement of this model for this kind."""
        for offer in self.capabilities.models:
            if offer.name == model and kind in offer.kinds:
                return offer
        return None

    def free(self, offer: ModelOffer) -> int:
        """Free slots of an announced model."""
        slots = offer.slots
        if self.failing and (one := self.failing.get(offer.name)) is not None and one.rests:
            slots = min(slots, 1)
        if not self.attempts:  # as of most workers of a large fleet that waits
            return slots if self.at_once is None else min(slots, self.at_once)
        taken = sum(held.model == offer.name and held.kind in offer.kinds for held in self.attempts.values())
        free = slots - taken
        return max(0, free if self.at_once is None else min(free, self.at_once - len(self.attempts)))

    def open_to(self, model: str, now: float) -> bool:
        """Whether it takes offers of this model now."""
        if self.draining or not self.capabilities.accepting:
            return False
        if (self.failing or self.view is not None) and self.rests_from(model, now):
            return False
        return not self.blocked or all(self.blocked.get(name, 0.0) <= now for name in (model, ""))

    def rests_from(self, model: str, now: float) -> float:
        """Seconds for which it gets no offer of this model, because jobs failed there one after the other; 0 if none.

        Of a worker of another replica, as that one told last.
        """
        if self.view is not None:
            return max((one.for_s for one in self.view.resting if one.model == model), default=0.0)
        one = self.failing.get(model)
        return max(0.0, one.until - now) if one is not None else 0.0

    def opens_at(self, now: float) -> float | None:
        """When the next of its models that are blocked, or that it rests from, is open again; None when none is."""
        waits = [until for until in self.blocked.values() if until > now]
        waits += [one.until for one in self.failing.values() if one.until > now]
        return min(waits, default=None)

    def pardon(self) -> None:
        """Somebody says that it is in order: what has failed there does not count any more."""
        self.failing.clear()
        if self.slots_of is not None:
            self.slots_of.changed(self)

    def block(self, model: str, until: float) -> None:
        """No offers of this model ("" for all) before `until`."""
        self.blocked[model] = max(until, self.blocked.get(model, 0.0))
        if self.slots_of is not None:
            self.slots_of.changed(self)

    def unblock(self, now: float) -> None:
        """Forget blocks whose time is over."""
        if self.blocked:
            self.blocked = {model: until for model, until in self.blocked.items() if until > now}
