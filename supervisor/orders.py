"""What the owner orders, carried to those who act.

Everything is checked here against what there is: a GPU, a model, a job or a source of holds that is not known is
refused with the list of those that are. Parts that a supervisor does not have are refused, too, by name.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

from protocol.work import is_kind
from supervisor.control import asked
from supervisor.control.exchange import Refused
from supervisor.intake.holds import Hold, Mode, Source
from supervisor.pausing import Pausing

log = logging.getLogger(__name__)

_MODES = {"stop": Mode.STOP, "unload": Mode.UNLOAD, "abort": Mode.ABORT}
# Held by rules that look at the machine once a second: lifted by hand, they would be back the next second.
_WATCHED = {
    Source.SCHEDULE: "schedule",
    Source.PRESENCE: "presence",
    Source.BATTERY: "battery",
    Source.THERMAL: "thermal",
    Source.FOREIGN_VRAM: "foreign_vram",
    Source.APPLICATION: "applications",
    Source.DISK: "disk",
    Source.NETWORK: "network",
}
MOST_LISTED = 20
_Part = TypeVar("_Part")


class Engines(Protocol):
    """The instances of the models (`supervisor.orders_engines.HostEngines`)."""

    def names(self) -> Sequence[str]:
        """Every configured model."""

    def why_not(self, model: str) -> str:
        """Why it cannot be loaded now, in a sentence; "" when it can."""

    def users(self, model: str) -> str:
        """Who uses it now, as a phrase; "" when nobody does."""

    def load(self, model: str) -> str:
        """Load it; what happens now, in a sentence."""

    def unload(self, model: str, reason: str) -> str:
        """End its instance after its last run."""

    def restart(self, model: str, reason: str, *, now: bool) -> str:
        """End its instance, and load it again."""


class Jobs(Protocol):
    """The attempts of this worker (`supervisor.orders_engines.LinkJobs`)."""

    def running(self) -> Iterable[str]:
        """Ids of the jobs that run or wait here."""

    def cancel(self, job: str, reason: str) -> int:
        """Ask its attempts to end; how many there were."""


class Downloads(Protocol):
    """See `supervisor.pulls.Pulls`."""

    def pull(self, order: asked.Pull) -> AsyncIterator[Mapping[str, Any] | None]:
        """Begin a pull, or follow the one under way."""

    async def remove(self, order: asked.Remove) -> str:
        """Take a model out of worker.toml, and its files away."""


class Parts(NamedTuple):
    """Who acts besides the holds and the drain; None for what a supervisor does not have.

    Attributes:
        ending: None before a drain, else whether it ends in a new start.
        hurry: gives back what runs, in a drain that has begun.
        gpus: UUIDs, in the order of their numbers.
        reload: reads the configuration again; a plain value as of `supervisor.reload.Outcome.plain`.
        register: see `supervisor.registration.register`.
        log_level: see `supervisor.notices.set_level`.
    """

    ending: Callable[[], bool | None] = lambda: None
    hurry: Callable[[], None] | None = None
    gpus: Callable[[], Sequence[str]] = list
    engines: Engines | None = None
    jobs: Jobs | None = None
    pulls: Downloads | None = None
    reload: Callable[[], Awaitable[Mapping[str, Any]]] | None = None
    register: Callable[[asked.Register], Awaitable[Mapping[str, Any]]] | None = None
    log_level: Callable[[str, float | None], None] | None = None


class Orders:
    """Implements `supervisor.control.surface.Requests`.

    Args:
        drain: begins the drain of the supervisor, with its reason, and whether it shall be started again.
    """

    def __init__(self, pausing: Pausing, drain: Callable[[str, bool], None], parts: Parts | None = None) -> None:
        self._pausing, self._drain = pausing, drain
        self._parts = parts or Parts()

    # ---- holds

    def pause(self, reason: str, *, for_s: float | None, free_vram: bool, kind: str = "", gpu: str = "") -> None:
        """See `Requests`."""
        mode = Mode.UNLOAD if free_vram else Mode.STOP
        self._put(Source.OPERATOR, reason, for_s, mode, kind, gpu)

    def resume(self, *, kind: str = "", gpu: str = "") -> bool:
        """See `Requests`."""
        return self._lift(Source.OPERATOR, kind, gpu)

    def put_hold(self, order: asked.PutHold) -> Hold:
        """See `Requests`."""
        self._not_watched(order.source)
        return self._put(order.source, order.reason, order.for_s, _MODES[order.mode], order.kind, order.gpu)

    def lift_hold(self, source: str, *, kind: str = "", gpu: str = "") -> bool:
        """See `Requests`."""
        try:
            known = Source(source)
        except ValueError:
            raise Refused(404, f"There is no source of holds {source[:100]!r}; there are {_listed(Source)}.") from None
        self._not_watched(known)
        return self._lift(known, kind, gpu)

    def cordon(self, gpu: str, order: asked.Cordon) -> Hold:
        """See `Requests`."""
        mode = Mode.UNLOAD if order.unload else Mode.STOP
        return self._put(Source.OPERATOR, order.reason, order.for_s, mode, "", self._gpu(gpu))

    def uncordon(self, gpu: str) -> bool:
        """See `Requests`."""
        return self._lift(Source.OPERATOR, "", self._held_gpu(gpu))

    def _put(self, source: Source, reason: str, for_s: float | None, mode: Mode, kind: str, gpu: str) -> Hold:
        if kind and not is_kind(kind):
            raise Refused(404, f"There is no task kind {kind[:100]!r}.")
        if kind and mode is not Mode.STOP:  # a model may serve other kinds as well
            raise Refused(400, f"A hold of {kind} alone cannot unload; unload the models that serve it instead.")
        uuid = self._gpu(gpu) if gpu else ""
        return self._pausing.put(source, reason, for_s=for_s, mode=mode, gpu=uuid, kind=kind)

    def _lift(self, source: Source, kind: str, gpu: str) -> bool:
        return self._pausing.lift(source, gpu=self._held_gpu(gpu) if gpu else "", kind=kind)

    @staticmethod
    def _not_watched(source: Source) -> None:
        if table := _WATCHED.get(source):
            raise Refused(
                409,
                f"The holds of {source} follow what the machine does, once a second; to be rid of them, set mode = "
                f'"off" in [holds.{table}] of worker.toml.',
            )

    def _gpu(self, text: str) -> str:
        """The UUID that is meant: by itself, by the beginning of it, or by its number."""
        return _meant(text, list(self._parts.gpus()))

    def _held_gpu(self, text: str) -> str:
        """The same; a GPU that is held and gone meanwhile can be meant, too."""
        held = [hold.gpu for hold in self._pausing.holds().items if hold.gpu]
        return _meant(text, list(dict.fromkeys([*self._parts.gpus(), *held])))

    # ---- the supervisor's life

    def drain(self, reason: str, *, restart: bool) -> None:
        """See `Requests`."""
        ending = self._parts.ending()
        if ending is not None and ending != restart:
            then = "starts again" if ending else "ends"
            raise Refused(409, f"A drain has begun already, after which the supervisor {then}; that stays so.")
        log.info("the owner asked for a %s: %s", "restart" if restart else "drain", reason)
        self._drain(reason, restart)

    def shutdown(self, reason: str) -> None:
        """See `Requests`."""
        hurry = _there(self._parts.hurry, "be ended at once")
        log.info("the owner asked for the end at once: %s", reason)
        self._drain(reason, False)
        hurry()

    async def reload(self) -> Mapping[str, Any]:
        """See `Requests`."""
        return await _there(self._parts.reload, "read its configuration again: it was started without a file")()

    async def register(self, order: asked.Register) -> Mapping[str, Any]:
        """See `Requests`."""
        return await _there(self._parts.register, "be registered from here: it was started without a file")(order)

    def log_level(self, level: str, for_s: float | None) -> None:
        """See `Requests`."""
        try:
            _there(self._parts.log_level, "change its log level")(level, for_s)
        except ValueError as problem:
            raise Refused(400, f"The body is wrong: {problem}.") from None

    # ---- models and jobs

    def load(self, model: str) -> str:
        """See `Requests`."""
        engines = self._engines(model)
        if why := engines.why_not(model):
            raise Refused(409, f"{model} cannot be loaded now: {why}")
        return engines.load(model)

    def unload(self, model: str, reason: str) -> str:
        """See `Requests`."""
        said = self._engines(model).unload(model, reason or "the operator asked for it")
        self._pausing.forget_warm([model])  # whoever unloads it does not want it back when a hold is lifted
        return said

    def restart(self, model: str, reason: str, *, now: bool) -> str:
        """See `Requests`."""
        engines = self._engines(model)
        if why := engines.why_not(model):
            raise Refused(409, f"{model} cannot be loaded now: {why}")
        return engines.restart(model, reason or "the operator asked for it", now=now)

    def pull(self, order: asked.Pull) -> AsyncIterator[Mapping[str, Any] | None]:
        """See `Requests`."""
        return _there(self._parts.pulls, "pull models: it was started without a file").pull(order)

    async def remove(self, order: asked.Remove) -> str:
        """See `Requests`."""
        pulls = _there(self._parts.pulls, "remove models: it was started without a file")
        engines = self._parts.engines
        if engines is not None and order.name in engines.names() and (users := engines.users(order.name)):
            raise Refused(
                409, f"{order.name} is in use: {users}; unload it first: `supervisor engines unload {order.name}`."
            )
        return await pulls.remove(order)

    def cancel_job(self, job: str, reason: str) -> int:
        """See `Requests`."""
        jobs = _there(self._parts.jobs, "cancel jobs")
        if count := jobs.cancel(job, reason or "the operator asked for it"):
            return count
        raise Refused(404, f"No job {job[:100]!r} runs here; there are: {_listed(jobs.running()) or 'none'}.")

    def _engines(self, model: str) -> Engines:
        engines = _there(self._parts.engines, "act on single models")
        if model not in engines.names():
            raise Refused(404, f"There is no model {model[:100]!r}; there are {_listed(engines.names()) or 'none'}.")
        return engines


def _there(part: _Part | None, what: str) -> _Part:
    if part is None:
        raise Refused(409, f"This supervisor cannot {what}.")
    return part


def _meant(text: str, known: Sequence[str]) -> str:
    if text in known:
        return text
    if text.isascii() and text.isdigit() and int(text[:9]) < len(known) and len(text) < 9:
        return known[int(text)]
    begun = [uuid for uuid in known if len(text) >= 4 and uuid.lower().startswith(text.lower())]
    if len(begun) == 1:
        return begun[0]
    there = f"there are {_listed(known)}" if known else "no GPU is known now"
    raise Refused(404, f"There is no GPU {text[:100]!r}{' alone' if begun else ''}; {there}.")


def _listed(names: Iterable[str]) -> str:
    found = [str(name) for name in names]
    more = f" and {len(found) - MOST_LISTED} more" if len(found) > MOST_LISTED else ""
    return ", ".join(found[:MOST_LISTED]) + more
