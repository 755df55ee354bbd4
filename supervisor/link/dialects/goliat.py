"""GOLIAT: a dashboard that is polled over HTTP, one study at a time, run by a model of the engine `command`.

Theory of operation. There is no connection, so a session is the time in which the dashboard answers heartbeats. It
lasts until `SILENT_BEATS` in a row went unanswered; then the link's one backoff says when to try again, and the study
goes on meanwhile. Within a session four loops run side by side:

    heart   heartbeats, also while a study runs
    poll    when idle, asks for an assignment, downloads its config and offers it to the side
    ends    results first, then the one message that says how it ended, then the acknowledgement to the side
    teller  lines and progress, at most five messages a second

After a sleep of the machine the heart and the poll do not wait for their time.

No assignment is asked for before the end of the last one was acknowledged: messages name the machine alone, so a
`finished` that came late would end the next study. What follows from each protocol is in goliat_claims.py and below.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import logging
import os
import platform
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import TypeVar

import msgspec
import psutil  # type: ignore[import-untyped]
import trio

from protocol import link_wire as wire
from protocol.faults import FaultError
from supervisor.link.causes import beside
from supervisor.link.dialects import goliat_wire as words
from supervisor.link.dialects.base import Delivery, Dialect, Features, Home, Spoken
from supervisor.link.dialects.goliat_claims import Ending, Studies
from supervisor.link.dialects.goliat_delivery import GoliatDelivery
from supervisor.link.dialects.goliat_http import Http, Trouble
from supervisor.link.dialects.goliat_notes import Notes
from supervisor.link.dialects.goliat_polls import Assigned, Claimed, Poll
from supervisor.link.dialects.goliat_tell import EVERY_S, Teller
from supervisor.link.dialects.goliat_wire import Message, Slip
from supervisor.link.ledger import Key
from supervisor.link.reconnect import Backoff
from supervisor.link.session import SessionEnd, Side, Why
from supervisor.suspend import Clocks, SleepWatch

log = logging.getLogger(__name__)

SILENT_BEATS = 3
HEARTBEAT_S = {"planned": 5.0, "shipped": 30.0}
REMIND_S = 1.0
MOST_NOT_FOUND = 10  # uploads that found no place although the assignment is listed as ours
_Value = TypeVar("_Value")


class Timing(msgspec.Struct, frozen=True, kw_only=True):
    """Times in seconds that the configuration does not set.

    Attributes:
        every_s: between two messages to the dashboard.
        settle_s: between a claim and the look at who has it.
        pause_s: first and longest pause after a request that failed.
        config_patience_s: for the download of a config.
    """

    every_s: float = EVERY_S
    settle_s: float = 1.0
    pause_s: tuple[float, float] = (1.0, 64.0)
    config_patience_s: float = 60.0


class _Over(Exception):
    """The dashboard is away."""


class _Refused(Exception):
    """An assignment is ours, and cannot be begun for the reason of this sentence."""


class Goliat:
    """The dialect in use."""

    def __init__(self, home: Home, http: Http, timing: Timing, clocks: Clocks | None = None) -> None:
        table, self._clocks = home.table.goliat, clocks
        self._woken = trio.Event()
        self._connect_s, self._http, self._timing = home.address.connect_s, http, timing
        self._machine = table.machine_id or home.name
        self._shipped = table.protocol == "shipped"
        self._beat_s = table.heartbeat_s or HEARTBEAT_S[table.protocol]
        self._poll_s = table.poll_s
        self._notes = Notes(home.folder / "assignments")
        kept = Path(table.results_dir) if table.results_dir else home.folder / "results"
        self._delivery = GoliatDelivery(http, kept)
        self._teller = Teller(
            self._say, utc=time.time, every_s=max(timing.every_s, 1 / table.updates_per_s), backoff=self._backoff
        )
        self._studies = Studies(
            table.model,
            env=table.env,
            reupload=table.reupload,
            tell=self._teller.add,
            lost=self._teller.lost,
            clock=trio.current_time,
            utc=time.time,
        )
        self._poll: Poll = (
            Claimed(http, self._machine, table.study, timing.settle_s)
            if self._shipped
            else Assigned(http, self._machine)
        )
        self._complained = ""
        self._not_found: collections.Counter[Key] = collections.Counter()

    @property
    def delivery(self) -> Delivery:
        """See `Spoken`."""
        return self._delivery

    @property
    def waits_for(self) -> str:
        """See `Spoken`: nobody has to let it in."""
        return ""

    async def warm_up(self) -> None:
        """See `Spoken`."""
        await self._http.client()

    def close(self) -> None:
        """Let go of files."""
        self._delivery.close()

    def _backoff(self) -> Backoff:
        return Backoff(*self._timing.pause_s)

    async def converse(self, side: Side) -> SessionEnd:
        """See `Spoken`."""
        hello = side.hello()
        try:
            with trio.fail_after(self._connect_s):
                await self._beat(hello.capabilities)
                slips = await self._notes.all()
        except (Trouble, OSError, trio.TooSlowError) as error:
            return SessionEnd(Why.LOST, str(error) or f"the dashboard did not answer in {self._connect_s:g} s")
        opened_at = trio.current_time()
        try:
            self._studies.begin(side, hello, slips)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._teller.run)
                nursery.start_soon(self._polls, side)
                nursery.start_soon(self._ends)
                nursery.start_soon(SleepWatch(self._slept, clocks=self._clocks).run)
                await self._heart(side)
        except BaseExceptionGroup as group:
            over, others = group.split(_Over)
            if over is None or others is not None:
                raise beside(group, (_Over,)) from None
            return SessionEnd(Why.LOST, str(_first(over)), trio.current_time() - opened_at)
        finally:
            self._studies.finish()
        raise AssertionError("a session ends by raising")  # pragma: no cover

    # ---- heart

    async def _heart(self, side: Side) -> None:
        missed = 0
        while True:
            await self._rest(self._beat_s)
            try:
                await self._beat(side.hello().capabilities)
            except Trouble as trouble:
                missed = missed + 1 if trouble.away else 0
                if missed >= SILENT_BEATS:
                    raise _Over(str(trouble)) from None
                if not trouble.away:
                    self._complain(f"the dashboard does not take our heartbeats: {trouble}")
                await trio.sleep(trouble.retry_after_s)
            else:
                missed = 0

    def _slept(self, seconds: float) -> None:
        log.info("the machine slept for %.0f s; is the dashboard still there?", seconds)
        self._woken.set()
        self._woken = trio.Event()

    async def _rest(self, seconds: float) -> bool:
        """Wait; False, and sooner, when the machine slept meanwhile."""
        with trio.move_on_after(seconds) as rest:
            await self._woken.wait()
        return rest.cancelled_caught

    async def _beat(self, capabilities: wire.Capabilities) -> None:
        body: dict[str, object] = {"machineId": self._machine}
        if self._shipped:
            body |= _machine(capabilities)
        await self._http.json("POST", "api/heartbeat", body=body)

    async def _say(self, message: Message) -> None:
        body = {"machineId": self._machine, "message": message, "timestamp": time.time()}
        await self._http.json("POST", "api/gui-update", body=body)

    def _complain(self, sentence: str) -> None:
        """A warning, once."""
        if sentence and sentence != self._complained:
            log.warning("%s", sentence)
        self._complained = sentence

    # ---- assignments in

    async def _polls(self, side: Side) -> None:
        backoff = self._backoff()
        while True:
            pause_s = self._poll_s
            if self._studies.free:
                try:
                    await self._ask()
                except (Trouble, words.Odd, OSError) as error:
                    self._complain(f"no assignment: {error}")
                    after_s = error.retry_after_s if isinstance(error, Trouble) else 0.0
                    pause_s = max(pause_s, backoff.pause_s(), after_s)
                else:
                    self._complain("")
                    backoff = self._backoff()
            elif not side.running:
                self._complain(f"no assignment is asked for: {why}" if (why := self._studies.why_not()) else "")
            until = trio.current_time() + pause_s
            while trio.current_time() < until:
                slept = not await self._rest(min(REMIND_S, until - trio.current_time()))
                self._studies.remind()
                if slept:
                    break

    async def _ask(self) -> None:
        """One poll, and what follows when there is an assignment. Raises Trouble, Odd, OSError."""
        found = await self._poll.next(self._notes, self._studies.next_attempt)
        if found is None:
            return
        slip = found.slip
        try:
            config = found.config if found.config is not None else await self._config(found.config_url)
        except _Refused as error:
            log.warning("the assignment cannot be begun: %s", error, extra={"job": slip.job})
            self._studies.refuse(slip, str(error))
            return
        self._studies.take(slip, self._delivery.offer(slip, config))

    async def _config(self, url: str) -> bytes:
        """Download a config. Raises _Refused."""
        backoff, until = self._backoff(), trio.current_time() + self._timing.config_patience_s
        if not url:
            raise _Refused("The assignment has no config.")
        while True:
            try:
                return await self._http.config(url)
            except Trouble as trouble:
                pause_s = max(backoff.pause_s(), trouble.retry_after_s)
                if not trouble.again or trio.current_time() + pause_s >= until:
                    raise _Refused(f"The config of the study cannot be downloaded: {trouble}.") from None
                await trio.sleep(pause_s)

    # ---- ends out

    async def _ends(self) -> None:
        while True:
            self._studies.changed = trio.Event()
            for ending in self._studies.endings():
                await self._conclude(ending)
            if not self._studies.endings():
                await self._studies.changed.wait()

    async def _conclude(self, ending: Ending) -> None:
        """Results, then the message, then the acknowledgement; for as long as it takes."""
        slip = self._delivery.slip(ending.slip.key) or ending.slip
        message = await self._persistently(ending, lambda: self._delivered(ending))
        done = message is not None and message["type"] == "finished"
        if done or message is None:  # told twice, it could end the next study
            await self._persistently(ending, lambda: self._notes.remove(slip.job))
        if message is not None and (refused := await self._teller.last(message)) is not None:
            log.error("the dashboard does not take the end of the study: %s", refused, extra={"job": slip.job})
        if done:
            again = functools.partial(self._teller.last, words.finished())
            await self._persistently(ending, lambda: self._poll.settle(slip, self._notes, again))
        elif message is not None:
            await self._persistently(ending, lambda: self._poll.note_failure(slip, self._notes))
        self._delivery.drop(ending.slip)
        self._not_found.pop(slip.key, None)
        self._studies.told(ending, fenced=message is None)

    async def _persistently(self, ending: Ending, act: Callable[[], Awaitable[_Value]]) -> _Value:
        backoff = self._backoff()
        while True:
            try:
                return await act()
            except (Trouble, words.Odd, OSError) as error:
                log.warning("the end of the study is told later: %s", error, extra={"job": ending.slip.job})
                after_s = error.retry_after_s if isinstance(error, Trouble) else 0.0
                await trio.sleep(max(backoff.pause_s(), after_s))

    async def _delivered(self, ending: Ending) -> Message | None:
        """What to say at the end, once the results are where they belong; None when the study went on without us.

        Raises:
            Trouble, Odd, OSError: not now.
        """
        if ending.fault is not None:
            return words.fatal(ending.sentence)
        slip = self._delivery.slip(ending.slip.key) or ending.slip
        if not await self._poll.ours(slip):
            await self._left(slip, ending)
            return None
        to_dashboard = self._shipped and self._not_found[slip.key] < MOST_NOT_FOUND
        try:
            where = await self._delivery.hand_over(slip, ending.files, to_dashboard=to_dashboard)
        except FaultError as error:
            return words.fatal(error.fault.message)
        except Trouble as trouble:
            # A proxy says the same of any page while the dashboard is put up anew: only its list is believed. Where
            # that is there and the place for results is not, other studies do not wait for ever.
            if trouble.status != 404:
                raise
            if slip.study and await self._poll.ours(slip):
                self._not_found[slip.key] += 1
                raise
            await self._left(slip, ending)
            return None
        if not where:
            return words.finished()
        sentence = self._kept(slip, where)
        if self._shipped:  # it has a place for results and did not take them: it must not count as completed
            return words.fatal(f"The dashboard refused the results. {sentence}")
        return words.finished()

    async def _left(self, slip: Slip, ending: Ending) -> None:
        """The study went on without us. What it cost is not thrown away: its results stay here. Raises OSError."""
        log.warning("this assignment is not ours any more: nothing is delivered", extra={"job": slip.job})
        try:
            where = await self._delivery.hand_over(slip, ending.files, to_dashboard=False)
        except FaultError as error:
            log.error("its results are not kept: %s", error.fault.message, extra={"job": slip.job})
            return
        if where:
            self._kept(slip, where)

    def _kept(self, slip: Slip, where: str) -> str:
        """Say where results are that the dashboard does not have; the sentence."""
        sentence = f"The results of assignment {slip.id} are kept on {self._machine} in {where}."
        log.info("%s", sentence, extra={"job": slip.job})
        self._teller.add(words.status(sentence, "highlight", time.time()))
        return sentence


def _machine(capabilities: wire.Capabilities) -> dict[str, object]:
    gpus = {"gpuName": capabilities.gpus[0].name} if capabilities.gpus else {}
    memory = round(psutil.virtual_memory().total / 2**30, 1)
    return {"cpuCores": os.cpu_count() or 1, "totalRamGB": memory, "hostname": platform.node(), **gpus}


def _first(group: BaseExceptionGroup[_Over]) -> BaseException:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


@contextlib.asynccontextmanager
async def open_goliat(home: Home, timing: Timing | None = None, clocks: Clocks | None = None) -> AsyncIterator[Spoken]:
    """The dialect for one life of the supervisor."""
    tls = home.address.tls
    if tls is None and home.address.url.startswith("https:"):
        tls = ssl.create_default_context(cafile=home.table.tls_ca or None)
    async with Http(home.address.url, tls) as http:
        goliat = Goliat(home, http, timing or Timing(), clocks)
        try:
            yield goliat
        finally:
            goliat.close()


GOLIAT = Dialect(
    Features(
        push=False, many=False, cancel=False, streaming=False, progress=True, resume=True, token=False, lines=True
    ),
    open_goliat,
)
