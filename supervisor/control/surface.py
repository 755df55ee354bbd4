"""What the routes of the control API work on: everything that they show, and everybody whom they ask to act."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from supervisor.control import asked
from supervisor.control.events import Events
from supervisor.control.jobs_seen import JobBook
from supervisor.control.login import Logins
from supervisor.control.snapshot import Snapshot
from supervisor.host.work import ModelSpec
from supervisor.intake.holds import Hold
from supervisor.observe.ring import Ring


class Requests(Protocol):
    """Who is asked to act (`supervisor.orders.Orders`).

    What is not async returns at once; its effect shows in the next snapshot. What cannot be done raises `Refused`, with
    a sentence for whoever asked.
    """

    # ---- holds

    def pause(self, reason: str, *, for_s: float | None, free_vram: bool, kind: str = "", gpu: str = "") -> None:
        """Take no new jobs, for a while or until `resume`; also end loaded models when `free_vram`."""

    def resume(self, *, kind: str = "", gpu: str = "") -> bool:
        """Lift the operator's hold of this scope; False when there was none."""

    def put_hold(self, order: asked.PutHold) -> Hold:
        """Hold in somebody's name."""

    def lift_hold(self, source: str, *, kind: str = "", gpu: str = "") -> bool:
        """Lift somebody's hold of this scope; False when there was none."""

    def cordon(self, gpu: str, order: asked.Cordon) -> Hold:
        """Take no jobs on one GPU."""

    def uncordon(self, gpu: str) -> bool:
        """Take jobs on it again; False when it was not cordoned."""

    # ---- the supervisor's life

    def drain(self, reason: str, *, restart: bool) -> None:
        """Finish what runs, take nothing new, then end; with `restart` so that the service manager starts us again."""

    def shutdown(self, reason: str) -> None:
        """End now: what runs is given back to the coordinator, also when a drain has begun already."""

    async def reload(self) -> Mapping[str, Any]:
        """Read the configuration again; what was applied, what waits for a restart, all problems."""

    async def register(self, order: asked.Register) -> Mapping[str, Any]:
        """Try another coordinator, and write it into the configuration."""

    def log_level(self, level: str, for_s: float | None) -> None:
        """Change the log level, for good or for a while."""

    # ---- models and jobs

    def load(self, model: str) -> str:
        """Load a model before anybody asks for it; what happens now, in a sentence."""

    def unload(self, model: str, reason: str) -> str:
        """End its instance after its last run."""

    def restart(self, model: str, reason: str, *, now: bool) -> str:
        """End its instance and load it again; with `now` its jobs are given back first."""

    def pull(self, order: asked.Pull) -> AsyncIterator[Mapping[str, Any] | None]:
        """Bring a model here: its events, from the beginning or from where a pull under way is.

        None comes when there was nothing to say for `KEEP_ALIVE_S`.

        Closing the iterator ends the looking on, never the pull.
        """

    async def remove(self, order: asked.Remove) -> str:
        """Take a model out of the configuration, and its files away."""

    def cancel_job(self, job: str, reason: str) -> int:
        """Cancel a job that runs here; how many attempts of it were asked to end."""


class Configuration(Protocol):
    """The configuration of the running supervisor (`supervisor.config_live.LiveConfig`)."""

    async def shown(self) -> tuple[dict[str, Any], str]:
        """What there is to see, masked, and its etag; "" when there is none."""

    async def edit(self, changes: Mapping[str, Any], etag: str) -> tuple[dict[str, Any], str]:
        """Change it, if it is still what `etag` names ("" names any); what came of it, and the new etag."""


class Surface(NamedTuple):
    """What the routes work on.

    Attributes:
        snapshot: everything at this moment, explained.
        requests: who acts.
        more_metrics: lines of further families (the GPUs').
        specs: the models that are served.
        events: what happened, for those who follow.
        jobs: attempts that wait, run, and have ended lately.
        lines: the latest lines of the log.
        log_level: the level in force.
        config: worker.toml and what is in force of it.
        logins: who may use the page.
        diagnostics: makes the bundle for whoever helps: a tar.gz, redacted.
        doctor: checks everything that a person would; one plain value for programs.
    """

    snapshot: Callable[[], Snapshot]
    requests: Requests
    more_metrics: Callable[[], Iterable[str]] = tuple
    specs: Callable[[], Sequence[ModelSpec]] = tuple
    events: Events | None = None
    jobs: JobBook | None = None
    lines: Ring | None = None
    log_level: Callable[[], str] | None = None
    config: Configuration | None = None
    logins: Logins | None = None
    diagnostics: Callable[[], Awaitable[bytes]] | None = None
    doctor: Callable[[], Awaitable[Mapping[str, Any]]] | None = None
