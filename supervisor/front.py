"""The front of a running supervisor: what its owner is shown, may follow and may order, by socket or page."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import NamedTuple

import trio

from supervisor.box import Box
from supervisor.config import control_socket
from supervisor.config_live import LiveConfig
from supervisor.control.events import Events
from supervisor.control.gather import Gathering, Sources
from supervisor.control.jobs_seen import JobBook
from supervisor.control.login import Logins
from supervisor.control.loopback import open_page
from supervisor.control.server import open_control
from supervisor.control.snapshot import Link
from supervisor.control.surface import Surface
from supervisor.drain import Drain
from supervisor.host.host import Host
from supervisor.link.attempts import Attempts
from supervisor.link.worker import Worker
from supervisor.notices import Log
from supervisor.observe.tally import Tally
from supervisor.orders import Orders
from supervisor.orders_engines import HostEngines
from supervisor.orders_wiring import Around, complete
from supervisor.pulls import Pulls
from supervisor.reload import Outcome, Reloader
from supervisor.served import Served
from supervisor.settings import Settings
from supervisor.state import StateFolder


class Behind(NamedTuple):
    """What stands behind the front, of one life.

    Attributes:
        settings: those in force.
        url: of the coordinator.
        path: of worker.toml, when it can be changed.
        pulls: of models, where there is a worker.toml for them.
        slow: why a model is slower than it was; "" when it is not.
    """

    settings: Callable[[], Settings]
    state: StateFolder
    path: Path | None
    box: Box
    host: Host
    served: Served
    worker: Worker
    attempts: Attempts
    drain: Drain
    url: str
    waits_for: Callable[[], str]
    tally: Tally
    notices: Log | None
    jobs: JobBook
    pulls: Pulls | None
    slow: Callable[[str], str]


class Front:
    """See the module. `open` is its life.

    Attributes:
        reloader: set before `open` where the configuration is followed.
    """

    def __init__(self, behind: Behind) -> None:
        self._behind = behind
        self.reloader: Reloader | None = None
        gathering = self._gathering()
        self._snapshot = gathering.snapshot
        box, worker = behind.box, behind.worker
        self._events = Events(
            gathering.snapshot,
            behind.jobs.changes,
            # What nobody calls `look` for: the session, a drain that the coordinator asked for, what waits for room.
            watched=lambda: (
                worker.connected,
                worker.stopping,
                behind.waits_for(),
                dict(box.room.waiting()),
                dict(box.gpu_faults()),
            ),
        )
        behind.jobs.on_change = self._events.look

    def look(self) -> None:
        """Something that is shown has changed."""
        self._events.look()

    def reloaded(self, outcome: Outcome) -> None:
        """The configuration was read again."""
        self._events.add("config", outcome.plain())

    @contextlib.asynccontextmanager
    async def open(self) -> AsyncIterator[None]:
        """Answer on the socket, and on the page where it is wanted; the last event says why it ends."""
        behind = self._behind
        surface = self._surface()
        settings = behind.settings()
        async with (
            trio.open_nursery() as nursery,
            open_control(control_socket(settings), surface),
            open_page(settings.page, surface),
        ):
            nursery.start_soon(self._events.run)
            yield
            await self._events.end(behind.drain.reason)
            behind.jobs.on_change = lambda: None
            nursery.cancel_scope.cancel()

    def _gathering(self) -> Gathering:
        behind = self._behind
        box, worker, drain = behind.box, behind.worker, behind.drain

        def link() -> Link:
            up = worker.connected
            why = behind.waits_for() or "the coordinator does not answer"
            return Link(url=behind.url, connected=up, reason="" if up else why)

        return Gathering(
            Sources(
                worker=worker.name,
                specs=behind.served.specs,
                instances=behind.host.snapshot,
                holds=box.pausing.holds,
                room=box.room,
                watch=box.watch,
                link=link,
                jobs=lambda: worker.running,
                draining=lambda: drain.reason or worker.stopping,
                gpu_faults=box.gpu_faults,
                incidents=box.recent_incidents,
                ends=box.ends,
                refused=behind.served.refused,
                slow=behind.slow,
                drain_until=lambda: drain.until,
                sights=lambda: (*box.pausing.sights(), *box.watch_holds.sights()),
                coming=box.watch_holds.coming,
            )
        )

    def _surface(self) -> Surface:
        behind, reloader = self._behind, self.reloader
        box, notices, path = behind.box, behind.notices, behind.path
        surface = Surface(
            self._snapshot,
            Orders(box.pausing, behind.drain.ask),
            lambda: [*box.gpu_metrics(), *behind.tally.lines()],
            logins=Logins(),
            specs=lambda: behind.served.specs,
            events=self._events,
            jobs=behind.jobs,
            lines=notices.ring if notices else None,
            log_level=(lambda: notices.levels.now) if notices else None,
            config=LiveConfig(path, reloader) if path is not None and reloader is not None else None,
        )
        around = Around(
            pausing=box.pausing,
            drain=behind.drain.ask,
            ending=lambda: behind.drain.ending,
            hurry=behind.drain.hurried.cancel,
            gpus=lambda: list(box.watch.readings()),
            engines=HostEngines(behind.host, behind.attempts.stop_models, behind.served.why_not),
            attempts=behind.attempts,
            pulls=behind.pulls,
            config=path,
            reloader=reloader,
            state=behind.state.root,
            name=behind.worker.name,
            connected=lambda: behind.url if behind.worker.connected else "",
        )
        return complete(surface, around, behind.settings, box.recent_incidents, box.watch_holds.findings)
