"""By which means the host reaches the outside; tests under a virtual clock replace them."""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import trio

from supervisor.host import removal
from supervisor.host.cgroups import Cgroups
from supervisor.host.child import open_child
from supervisor.host.incidents import Incidents
from supervisor.host.leftovers import Ledger
from supervisor.host.senses import Senses
from supervisor.host.work import ModelSpec, Progress

OpenChild = Callable[..., AbstractAsyncContextManager[Any]]


async def trust(_spec: ModelSpec) -> str:
    """Verify nothing."""
    return ""


async def remove_tree(folder: Path) -> None:
    """Remove a folder and all in it, in a thread: an engine may have left gigabytes.

    Cancellation: at once; the thread goes on by itself.
    """
    await trio.to_thread.run_sync(removal.remove_tree, folder, abandon_on_cancel=True)


class Occupant(Protocol):
    """A model's lane, as those see it who decide what is loaded."""

    spec: ModelSpec

    @property
    def pid(self) -> int:
        """Leader of its instance's family; 0 without one."""

    @property
    def wanted(self) -> bool:
        """Whether runs wait for it or run on it."""

    @property
    def idle_since(self) -> float | None:
        """trio time since when it has been loaded without work; None when it works or is not loaded."""

    @property
    def ready_since(self) -> float | None:
        """trio time since when its model is loaded, with or without work; None while it is not."""

    def evict(self, reason: str) -> None:
        """End the instance as soon as it has no run; the lane goes back to cold, uncounted as a failure."""

    def tell(self, progress: Progress) -> None:
        """Pass a sign of progress to whoever waits for the model ("waits for 3.1 GiB of GPU memory")."""


class Room(Protocol):
    """Who may be loaded at once."""

    def place(self, who: Occupant) -> AbstractAsyncContextManager[None]:
        """A block around the whole life of an instance: entered before the start, left after the process's end.

        Entering waits until there is room, ending idle ones if need be. Leaving waits (bounded) until the memory is
        back. Raises FaultError when there can never be room. Cancellation: nothing was changed.
        """


class EverybodyFits:
    """A room without walls."""

    def place(self, _who: Occupant) -> AbstractAsyncContextManager[None]:
        """Enter at once."""
        return contextlib.nullcontext()


class Memory(Protocol):
    """What outlives the supervisor: per model, the quarantine that it is in."""

    def load(self, model: str) -> Mapping[str, Any]:
        """What was saved; empty for nothing."""

    def save(self, model: str, what: Mapping[str, Any]) -> None:
        """Keep it; empty forgets. Nothing is raised."""


class Forgetful:
    """A memory without one."""

    def load(self, _model: str) -> Mapping[str, Any]:
        """Nothing."""
        return {}

    def save(self, _model: str, _what: Mapping[str, Any]) -> None:
        """Keep nothing."""


class Means(NamedTuple):
    """What to call.

    Attributes:
        verify: checks a model's files before anything is started; returns its revision, raises FaultError.
        spawn: `open_child`, or `FakeEngines`.
        remove: removes a scratch folder.
        jitter: a number in [0, 1).
        room: decides what may be loaded beside what.
        reprobe: tries a model that is in quarantine; "" when it passed, else one sentence.
        memory: keeps quarantines.
        wall: seconds since the epoch.
        senses: what is seen of an instance from outside.
        cgroups: where instances get a cgroup of their own; None where nobody gave us that right.
        ledger: where children are written down, for the next life of the supervisor.
        incidents: where reports of bad ends are kept.
    """

    verify: Callable[[ModelSpec], Awaitable[str]] = trust
    spawn: OpenChild = open_child
    remove: Callable[[Path], Awaitable[None]] = remove_tree
    jitter: Callable[[], float] = random.random
    room: Room = EverybodyFits()
    reprobe: Callable[[ModelSpec], Awaitable[str]] = trust
    memory: Memory = Forgetful()
    wall: Callable[[], float] = time.time
    senses: Senses = Senses()
    cgroups: Cgroups | None = None
    ledger: Ledger | None = None
    incidents: Incidents | None = None


REAL_MEANS = Means()
