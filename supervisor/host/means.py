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
from supervisor.host.work import ModelSpec
from supervisor.intake import effects as fx

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
    """A model's lane, as the room sees it that measures what its instance holds."""

    spec: ModelSpec

    @property
    def pid(self) -> int:
        """Leader of its instance's family; 0 without one."""

    @property
    def idle_since(self) -> float | None:
        """trio time since when it has been loaded without work; None when it works or is not loaded."""


class Books(Protocol):
    """Who decides what is loaded, as the room sees it (`supervisor.deciding.Deciding`)."""

    def tell(self, event: fx.Event) -> None:
        """Something happened to the GPUs."""

    def waits(self) -> dict[str, str]:
        """Model -> why it is not loaded yet, for those that somebody waits for."""


class Room(Protocol):
    """The memory of the GPUs as it is measured.

    Attributes:
        measures: whether there may be anything to measure; without, every model fits.
        margin_bytes: what stays free on every GPU.
    """

    measures: bool
    margin_bytes: int

    def bind(self, books: Books) -> None:
        """Whom to tell."""

    async def open(self) -> None:
        """Tell which GPUs there are, as soon as that is known."""

    async def need(self, spec: ModelSpec) -> tuple[int, bool]:
        """What a load will take of a GPU in bytes, and whether that is a mere estimate. Raises OSError."""

    def place(self, who: Occupant, number: int, shares: Mapping[str, int]) -> AbstractAsyncContextManager[None]:
        """A block around the whole life of an instance: entered before the start, left after the process's end.

        Leaving waits (bounded) until the memory is back.
        """


class EverybodyFits:
    """A room without walls."""

    measures = False
    margin_bytes = 0

    def bind(self, _books: Books) -> None:
        """Nobody is told anything."""

    async def open(self) -> None:
        """Nothing is measured."""

    async def need(self, _spec: ModelSpec) -> tuple[int, bool]:
        """Nothing that is known."""
        return 0, True

    def place(self, _who: Occupant, _number: int, _shares: Mapping[str, int]) -> AbstractAsyncContextManager[None]:
        """Enter at once."""
        return contextlib.nullcontext()


class Witness(Protocol):
    """Is told of loads and of ends by force, for the log and the numbers; decides nothing, raises nothing."""

    def loaded(
        self, model: str, engine: str, seconds: float, *, device: str, vram_bytes: int = 0, rss_bytes: int = 0
    ) -> None:
        """An instance is ready, so many seconds after its process was started."""

    def forced(self, model: str, engine: str, force: str) -> None:
        """An instance was ended by SIGTERM, by SIGKILL, or is "unkillable"."""


class Nobody:
    """Is told and says nothing."""

    def loaded(
        self, model: str, engine: str, seconds: float, *, device: str, vram_bytes: int = 0, rss_bytes: int = 0
    ) -> None:
        """See `Witness`."""

    def forced(self, model: str, engine: str, force: str) -> None:
        """See `Witness`."""


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
        room: measures GPU memory, for whoever decides what is loaded beside what.
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
    witness: Witness = Nobody()
    reprobe: Callable[[ModelSpec], Awaitable[str]] = trust
    memory: Memory = Forgetful()
    wall: Callable[[], float] = time.time
    senses: Senses = Senses()
    cgroups: Cgroups | None = None
    ledger: Ledger | None = None
    incidents: Incidents | None = None


REAL_MEANS = Means()
