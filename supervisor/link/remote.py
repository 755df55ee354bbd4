"""What the coordinator may order besides pause, drain and shutdown, and how it is carried out.

The operator decides what a coordinator may change: `[coordinator] allow` names the keys of the configuration that it
may push, and nothing else is touched. An order is answered when it is done, with whether it was and a sentence.
"""

from __future__ import annotations

import fnmatch
import logging
from collections.abc import Awaitable, Callable, Collection, Mapping
from typing import Annotated, Any, Protocol

import msgspec
import trio
from msgspec import Meta

from protocol import link_wire as wire
from supervisor.observe.paced import Paced

log = logging.getLogger(__name__)

LONGEST_LEVEL_S = 86_400.0
LONGEST_WHY = 1000
MOST_ORDERS = 256
_LEVELS = ("debug", "info", "warning", "error")


class Refused(Exception):
    """The order is not carried out, for the reason of this sentence."""


class _Level(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    level: str
    for_s: Annotated[float, Meta(gt=0, le=LONGEST_LEVEL_S)] = 3600.0


class _Probe(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    model: str = ""


class _Configure(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    changes: dict[str, Any]


class Serve(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The arguments of `serve`."""

    name: Annotated[str, Meta(max_length=200)]
    source: Annotated[str, Meta(min_length=1, max_length=4096)]
    sha256: Annotated[str, Meta(pattern="^([0-9a-f]{64})?$")] = ""
    file: Annotated[str, Meta(max_length=4096)] = ""
    engine: Annotated[str, Meta(max_length=100)] = ""
    options: dict[str, Any] = {}


class Unserve(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The arguments of `unserve`."""

    name: Annotated[str, Meta(max_length=200)]


class Deploying(Protocol):
    """Serves models that the coordinator wants."""

    async def serve(self, order: Serve) -> str:
        """Fetch a model and serve it; a sentence once it is proved. Raises Refused."""

    async def unserve(self, order: Unserve) -> str:
        """Serve a model no more. Raises Refused."""


class Remote:
    """See the module.

    Args:
        set_level: sets the level of the log for so many seconds.
        probe: proves a model again and returns what came of it; "" for all. Raises Refused.
        configure: writes these keys into the configuration and returns what came of each. Raises Refused.
        allow: patterns of keys that may be pushed, such as "worker.labels" or "limits.*".
        deployed: carries out `serve` and `unserve`; without it both are refused.
    """

    def __init__(
        self,
        nursery: trio.Nursery,
        *,
        set_level: Callable[[str, float], None],
        probe: Callable[[str], Awaitable[dict[str, str]]],
        configure: Callable[[Mapping[str, Any]], Awaitable[dict[str, str]]],
        allow: Callable[[], Collection[str]],
        deployed: Deploying | None = None,
    ) -> None:
        self._nursery = nursery
        self._under_way = 0
        self._said = Paced(log, "words about orders")
        self._deployed = deployed
        self._set_level, self._probe, self._configure, self._allow = set_level, probe, configure, allow

    def begin(self, order: wire.Order, answer: Callable[[wire.OrderDone], None]) -> None:
        """Carry an order out and call `answer` once; a session that is over by then hears nothing."""

        async def work() -> None:
            try:
                done = await self._carry_out(order)
            except (Refused, msgspec.ValidationError) as problem:
                done = self._refused(order, str(problem))
            except Exception as error:  # an order is what somebody else made up: nothing ends of it but the order
                log.exception("an order could not be carried out, by a mistake of this program")
                done = self._refused(order, f"The worker made a mistake of its own: {type(error).__name__}.")
            finally:
                self._under_way -= 1
            answer(done)

        self._said.say(logging.INFO, "the coordinator orders: %s", order.verb[:50])
        if self._under_way >= MOST_ORDERS:
            answer(self._refused(order, f"{MOST_ORDERS} orders are under way here already."))
            return
        self._under_way += 1
        self._nursery.start_soon(work)

    def _refused(self, order: wire.Order, why: str) -> wire.OrderDone:
        why = why if len(why) <= LONGEST_WHY else f"{why[:LONGEST_WHY]}…"  # it may quote the order
        self._said.say(logging.WARNING, "the order %s is refused: %s", order.verb[:50], why)
        return wire.OrderDone(id=order.id, ok=False, message=why)

    async def _carry_out(self, order: wire.Order) -> wire.OrderDone:
        match order.verb:
            case "log_level":
                sentence, detail = self._level(msgspec.convert(order.arguments, _Level)), dict[str, str]()
            case "probe":
                detail = await self._probe(msgspec.convert(order.arguments, _Probe).model)
                sentence = f"{len(detail)} model{'s were' if len(detail) != 1 else ' was'} proved again."
            case "configure":
                detail = await self._pushed(msgspec.convert(order.arguments, _Configure).changes)
                sentence = "The configuration was changed."
            case "serve":
                sentence, detail = await self._deploying().serve(msgspec.convert(order.arguments, Serve)), {}
            case "unserve":
                sentence, detail = await self._deploying().unserve(msgspec.convert(order.arguments, Unserve)), {}
            case _:
                raise Refused(f"This worker does not know the order {order.verb[:50]!r}.")
        return wire.OrderDone(id=order.id, ok=True, message=sentence, detail=dict(detail))

    def _deploying(self) -> Deploying:
        if self._deployed is None:
            raise Refused("This worker has no configuration file that a model could be written into.")
        return self._deployed

    def _level(self, order: _Level) -> str:
        if order.level not in _LEVELS:
            raise Refused(f"level must be one of {', '.join(_LEVELS)}.")
        self._set_level(order.level, order.for_s)
        return f"The log is at {order.level} for {order.for_s:g} s."

    async def _pushed(self, changes: Mapping[str, Any]) -> dict[str, str]:
        if not changes:
            raise Refused("There is no change in it.")
        allowed = self._allow()
        if closed := sorted(key for key in changes if not any(fnmatch.fnmatchcase(key, each) for each in allowed)):
            named = ", ".join(allowed) or "nothing"
            raise Refused(
                f"The owner of this worker does not let a coordinator change {', '.join(closed)[:200]}; "
                f"coordinator.allow has {named}."
            )
        return await self._configure(changes)
