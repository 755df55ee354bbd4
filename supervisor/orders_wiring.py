"""What the control API asks of a running supervisor, put together: orders, the bundle, the examination of itself."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import trio

from supervisor import notices
from supervisor.control import asked
from supervisor.control.snapshot import IncidentView, Snapshot
from supervisor.control.surface import Surface
from supervisor.diagnostics import MAX_LINES, Seen, bundle
from supervisor.doctor_run import SelfExamination
from supervisor.link.attempts import Attempts
from supervisor.observe.ring import Ring
from supervisor.orders import Engines, Orders, Parts
from supervisor.orders_engines import LinkJobs
from supervisor.pausing import Pausing
from supervisor.pulls import Pulls
from supervisor.registration import register
from supervisor.reload import Reloader
from supervisor.settings import Settings


class Around(NamedTuple):
    """Who acts, as `app` knows them.

    Attributes:
        drain: begins the drain, with its reason, and whether it ends in a new start.
        ending: None before a drain, else whether it ends in a new start.
        hurry: gives back what runs, in a drain that has begun.
        gpus: UUIDs, in the order of their numbers.
        name: this worker's id.
        connected: address of the coordinator while there is a session, else "".
    """

    pausing: Pausing
    drain: Callable[[str, bool], None]
    ending: Callable[[], bool | None]
    hurry: Callable[[], None]
    gpus: Callable[[], Sequence[str]]
    engines: Engines | None
    attempts: Attempts
    pulls: Pulls | None
    config: Path | None
    reloader: Reloader | None
    state: Path
    name: str
    connected: Callable[[], str]


def orders(around: Around) -> Orders:
    """The owner's orders; what needs a file is left out where there is none."""

    async def reload() -> Mapping[str, Any]:
        assert around.reloader is not None
        return (await around.reloader.reload("asked over the control API")).plain()

    async def registered(order: asked.Register) -> Mapping[str, Any]:
        assert around.config is not None
        return await register(
            order, config=around.config, state=around.state, name=around.name, connected=around.connected
        )

    parts = Parts(
        ending=around.ending,
        hurry=around.hurry,
        gpus=around.gpus,
        engines=around.engines,
        jobs=LinkJobs(around.attempts.ledger, around.attempts.give_back),
        pulls=around.pulls,
        reload=reload if around.reloader is not None else None,
        register=registered if around.config is not None else None,
        log_level=notices.set_level,
    )
    return Orders(around.pausing, around.drain, parts)


class Sources(NamedTuple):
    """What is shown; all are asked on the trio thread, and answer at once.

    Attributes:
        holds: what each rule sees now, and what it cannot tell: any plain value.
        reload: how the last reload went.
    """

    snapshot: Callable[[], Snapshot]
    settings: Callable[[], Settings]
    metrics: Callable[[], str]
    lines: Ring | None
    incidents: Callable[[int], Sequence[IncidentView]]
    holds: Callable[[], Any] = dict
    reload: Callable[[], Any] = lambda: None


def bundles(config: Path | None, state: Path, sources: Sources) -> Callable[[], Awaitable[bytes]]:
    """Makes the bundle: what is seen is gathered here, the rest happens in a thread. One at a time."""
    one = trio.CapacityLimiter(1)

    async def made() -> bytes:
        seen = Seen(
            status=sources.snapshot(),
            holds=sources.holds(),
            metrics=sources.metrics(),
            lines=sources.lines.since(0, limit=MAX_LINES) if sources.lines is not None else (),
            incidents=sources.incidents(50),
            reload=sources.reload(),
        )
        settings = sources.settings()
        return await trio.to_thread.run_sync(
            lambda: bundle(config, state, seen, settings=settings), abandon_on_cancel=True, limiter=one
        )

    return made


def examination(config: Path | None, state: Path, sources: Sources) -> Callable[[], Awaitable[Mapping[str, Any]]]:
    """The doctor, from inside."""
    return SelfExamination(config, sources.settings, state, sources.snapshot).examined


def complete(
    surface: Surface,
    around: Around,
    settings: Callable[[], Settings],
    incidents: Callable[[int], Sequence[IncidentView]],
    holds: Callable[[], Mapping[Any, str]],
) -> Surface:
    """A surface that only shows, with everybody who acts.

    Args:
        holds: what each rule sees now (`WatchHolds.findings`).
    """
    reloader = around.reloader
    sources = Sources(
        snapshot=surface.snapshot,
        settings=settings,
        metrics=lambda: "\n".join(surface.more_metrics()),
        lines=surface.lines,
        incidents=incidents,
        holds=lambda: {" ".join(map(str, scope)).strip(): text for scope, text in holds().items()},
        reload=lambda: None if reloader is None or reloader.outcome is None else reloader.outcome.plain(),
    )
    return surface._replace(
        requests=orders(around),
        diagnostics=bundles(around.config, around.state, sources),
        doctor=examination(around.config, around.state, sources),
    )
