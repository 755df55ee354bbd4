"""What a dialect is: the way one kind of coordinator speaks, behind the two things that the rest of us uses.

Theory of operation. Everything behind this seam knows only native messages (`protocol.link_wire`): a dialect hears what
its coordinator says, hands native messages to the side (`supervisor.link.session.Side.heard`), and turns what the side
posts into its own words; files move through its `Delivery`. What a coordinator cannot say (a cancel, a token stream,
an acknowledgement) the dialect answers in its stead, so that a claim always comes to its end: a message that its
coordinator has no word for is dropped, and a `Complete` or `Fail` that was delivered is answered with a native `Ack`.

How to add one: see README.md in this folder.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import NamedTuple, Protocol

import msgspec

from protocol.engine_wire import OutputFile
from protocol.faults import Fault
from protocol.link_wire import FileRef
from supervisor.intake.observed import Person
from supervisor.link.session import Address, SessionEnd, Side
from supervisor.link.transfer import Output
from supervisor.link.tries import Moved
from supervisor.roster import Origin
from supervisor.settings import CoordinatorTable, ModelTable


class Features(msgspec.Struct, frozen=True, kw_only=True):
    """What can be said in a dialect. For people, for tests, and for what the supervisor must not expect.

    Attributes:
        push: offers come by themselves; else we ask for them.
        many: several attempts at once; else one, and the dialect declines or does not ask for more.
        cancel: the coordinator can cancel an attempt.
        streaming: chunks reach the client.
        progress: so does progress.
        resume: a new session takes up the attempts that the last one held.
        lines: progress that carries words is a log that people read, every line of it.
        token: `coordinator.token_file` has to be there; else the dialect brings its own way in, or needs none.
    """

    push: bool
    many: bool
    cancel: bool
    streaming: bool
    progress: bool
    resume: bool
    token: bool
    lines: bool = False


class Delivery(Protocol):
    """How files move. `supervisor.link.transfer.Transfer` is the native one; errors and cancellation as there."""

    async def fetch(self, file: FileRef, target: Callable[[], int], moved: Moved = ...) -> None:
        """Write an input file."""

    async def upload(
        self,
        template: str,
        file: OutputFile,
        source: Output,
        until: float | None = None,
        moved: Moved = ...,
        patience_s: float | None = None,
    ) -> None:
        """Deliver an output; `template` is `Offer.upload`, which the dialect itself has written."""


class Spoken(Protocol):
    """A dialect in use, for one life of the supervisor."""

    @property
    def delivery(self) -> Delivery:
        """For the files of attempts."""

    async def converse(self, side: Side) -> SessionEnd:
        """One session, or one span of polling, until it ends; never raises for what the network or the peer does.

        Cancellation: ends it properly, within a second.
        """

    @property
    def waits_for(self) -> str:
        """What it needs from a person before it can go on, as a sentence for this worker's owner; "" for nothing."""

    async def warm_up(self) -> None:
        """Whatever takes time and is needed at the first job at the latest."""


class Roll(Protocol):
    """The models of this worker, as a dialect may change them: `supervisor.roster.Roster`."""

    def origin(self, model: str) -> Origin | None:
        """Who wanted a model; None when it is not here."""

    async def take_on(self, table: ModelTable, origin: Origin = ...) -> Fault | None:
        """Serve one more, proved and announced; why not, when it cannot be."""

    async def let_go(self, model: str, reason: str) -> Fault | None:
        """Serve one no more; returns when its jobs are done and it has gone."""


class Home(NamedTuple):
    """What a dialect may use of this worker.

    Attributes:
        table: `[coordinator]`.
        address: where the coordinator is; its token is "" when the dialect needs none.
        folder: for what it has to remember (credentials), private to it; made by the dialect when it needs it.
        name: this worker's id.
        person: who sits here now, as far as a coordinator is told.
        roll: where models are taken on and let go while the supervisor runs.
    """

    table: CoordinatorTable
    address: Address
    folder: Path
    name: str
    person: Callable[[], Person] = Person
    roll: Roll | None = None


class Dialect(NamedTuple):
    """An entry of the table in __init__.py."""

    features: Features
    open: Callable[[Home], AbstractAsyncContextManager[Spoken]]
