"""This box as the coordinator sees it: who it is, what it offers, whether it takes jobs.

The side of the link that a session speaks for. It holds the reasons for not taking jobs (a drain, the
coordinator's pause) and hands everything that speaks of an attempt to `Attempts`.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping

import msgspec
import trio

from protocol import link_wire as wire
from protocol.revision import LINK_WIRE
from supervisor.intake.admission import ModelState, Refuse, Situation, admit
from supervisor.link.attempts import Attempts
from supervisor.link.session import Post
from supervisor.observe.paced import QUOTED_CHARS, Paced
from supervisor.observe.tally import Tally

log = logging.getLogger(__name__)


# An order, and whom to tell what became of it.
OnOrder = Callable[[wire.Order, Callable[[wire.OrderDone], None]], None]


def _unknown_order(order: wire.Order, answer: Callable[[wire.OrderDone], None]) -> None:
    answer(wire.OrderDone(id=order.id, ok=False, message="This worker takes no orders."))


class Identity(msgspec.Struct, frozen=True, kw_only=True):
    """Who says hello. `boot` is new with every start of the supervisor."""

    name: str
    boot: str


class Worker:
    """See the module.

    Args:
        offered: what is announced now, given the reason for not taking jobs ("" when there is none).
        models: the models as admission sees them, without `taken`.
        on_shutdown: the coordinator asks the supervisor to drain and end.
        held: why this box takes no work now, as a phrase ("" when it does), and for how many more seconds (None when
            nobody knows).
        on_order: carries out what the coordinator orders besides, and answers when it is done.
        gpus, fetches: their state, and how far ordered models are, for heartbeats.
    """

    def __init__(
        self,
        identity: Identity,
        attempts: Attempts,
        *,
        offered: Callable[[str], wire.Capabilities],
        models: Callable[[], Mapping[str, ModelState]],
        on_shutdown: Callable[[str], None],
        held: Callable[[], tuple[str, float | None]] = lambda: ("", None),
        tally: Tally | None = None,
        on_order: OnOrder = _unknown_order,
        gpus: Callable[[], tuple[wire.GpuState, ...]] = tuple,
        fetches: Callable[[], tuple[wire.Fetch, ...]] = tuple,
    ) -> None:
        self._tally = tally or Tally()
        self._identity = identity
        self._attempts = attempts
        self._offered = offered
        self._models = models
        self._on_shutdown = on_shutdown
        self._on_order = on_order
        self._gpus, self._fetches = gpus, fetches
        self._held = held
        self._post: Post | None = None
        self._announced: wire.Capabilities | None = None
        self._draining = ""
        self._drain_asked = ""  # by the coordinator; its `resume` lifts it
        self._paused = ""
        self._paused_until = float("inf")
        self._pause_changed = trio.Event()
        self._said = Paced(log, "words of the coordinator")
        self.on_pause: Callable[[str, float | None], object] = lambda _reason, _for_s: None
        self.on_resume: Callable[[], object] = lambda: None

    # ---- what others ask of us

    def drain(self, reason: str) -> None:
        """Take no more jobs, and tell the coordinator so."""
        self._draining = reason
        if self._post is not None:
            self._post(wire.Draining(reason=reason), "", 0)

    def say(self, body: wire.Body) -> bool:
        """Send what speaks of no attempt, if there is a session; returns whether there was one."""
        if self._post is None:
            return False
        self._post(body, "", 0)
        return True

    @property
    def name(self) -> str:
        """Its id."""
        return self._identity.name

    @property
    def connected(self) -> bool:
        """Whether a session is open."""
        return self._post is not None

    @property
    def stopping(self) -> str:
        """Why it drains, or ""."""
        return self._draining or self._drain_asked

    def slept(self, seconds: float) -> None:
        """The machine did, and our clock stood still meanwhile; what ends at a certain time is that much nearer."""
        self._attempts.slept(seconds)
        if self._paused:
            self._paused_until -= seconds
            self._pause_changed.set()

    def announce(self) -> None:
        """Announce the capabilities again, when they differ from what was announced last."""
        if self._post is None:
            return
        now = self._offered(self._not_accepting())
        if now != self._announced:
            self._announced = now
            self._post(wire.Announce(capabilities=now), "", 0)

    def _not_accepting(self) -> str:
        if self._paused and trio.current_time() >= self._paused_until:
            self._paused = ""
        return self._draining or self._drain_asked or self._paused or self._held()[0]

    # ---- the side of a session

    def hello(self) -> wire.Hello:
        """The first message of a session."""
        self._announced = self._offered(self._not_accepting())
        return wire.Hello(
            worker=self._identity.name,
            low=LINK_WIRE.low,
            high=LINK_WIRE.high,
            boot=self._identity.boot,
            capabilities=self._announced,
            held=self._attempts.ledger.held(),
        )

    def opened(self, post: Post) -> None:
        """A session is open."""
        self._post = post
        self._tally.session_opened()
        self._attempts.attach(post)
        self.announce()  # what changed between hello and welcome
        if self._draining:
            post(wire.Draining(reason=self._draining), "", 0)

    def closed(self) -> None:
        """The session is over."""
        self._post = None
        self._said.flush()
        self._attempts.detach()

    def holds(self, job: str, attempt: int) -> bool:
        """Whether this attempt is claimed."""
        return self._attempts.ledger.get(job, attempt) is not None

    def leave(self, job: str, attempt: int) -> bool:
        """Leave what is kept of this attempt to the next start."""
        return self._attempts.leave(job, attempt)

    @property
    def running(self) -> int:
        """Attempts that have not ended."""
        return self._attempts.ledger.running

    def heartbeat(self, n: int) -> wire.Heartbeat:
        """How things are at this moment."""
        return wire.Heartbeat(n=n, running=self.running, gpus=self._gpus(), fetches=self._fetches())

    def broken_offer(self, job: str, attempt: int, reason: str) -> None:
        """Decline what cannot be read."""
        self._decline(job, attempt, Refuse("bad_offer", reason))

    def heard(self, body: wire.Body, job: str, attempt: int) -> None:
        """Act on a message."""
        self._tally.heard()
        self._note(body)
        match body:
            case wire.Offer():
                self._judge(job, attempt, body)
            case wire.Cancel(reason=reason):
                self._attempts.cancel(job, attempt, reason)
            case wire.Ack(verdict=verdict):
                self._attempts.acked(job, attempt, verdict)
            case wire.ChunkAck(seq=seq):
                self._attempts.chunk_acked(job, attempt, seq)
            case wire.Drain():
                self._drain_asked = "the coordinator asked for a drain"
                self.announce()
            case wire.Pause(reason=reason, for_ms=for_ms):
                reason = reason[:QUOTED_CHARS]  # it is kept, and announced
                self._paused = reason or "the coordinator paused it"
                self._paused_until = trio.current_time() + for_ms / 1000 if for_ms > 0 else float("inf")
                self._pause_changed.set()
                self.on_pause(reason, for_ms / 1000 if for_ms > 0 else None)
                self.announce()
            case wire.Resume():
                self._paused = self._drain_asked = ""
                self.on_resume()
                self._pause_changed.set()
                self.announce()
            case wire.Order():
                self._on_order(body, self._answer)
            case wire.ShutdownWorker(reason=reason):
                self._on_shutdown(reason[:QUOTED_CHARS] or "the coordinator asked for it")
            case _:
                pass  # heartbeat_ack: that it came is all it says

    def _answer(self, done: wire.OrderDone) -> None:
        self.say(done)  # in a later session nobody waits for it any more

    async def keep_announced(self) -> None:
        """Announce again when a pause runs out. Runs until cancelled."""
        while True:
            await self._pause_changed.wait()
            self._pause_changed = trio.Event()
            if self._paused and self._paused_until < float("inf"):
                with trio.move_on_at(self._paused_until):
                    await self._pause_changed.wait()
                self.announce()

    # ---- offers

    def _judge(self, job: str, attempt: int, offer: wire.Offer) -> None:
        if self._attempts.gave_back(job):
            # For good: a word that invites another try would bring it back for ever where there is no other worker.
            self._decline(job, attempt, Refuse("unsupported", "The owner of this worker wants this job elsewhere."))
            return
        verdict = admit(offer, job, attempt, self._situation())
        if isinstance(verdict, Refuse):
            self._decline(job, attempt, verdict)
        else:
            self._attempts.begin(job, attempt, offer)

    def _situation(self) -> Situation:
        self._not_accepting()  # lifts a pause that has run out
        paused, left_s = self._paused, self._paused_until - trio.current_time()
        if not paused:
            paused, held_s = self._held()
            left_s = float("inf") if held_s is None else held_s
        ledger = self._attempts.ledger
        models = {
            name: msgspec.structs.replace(state, taken=ledger.taken(name)) for name, state in self._models().items()
        }
        return Situation(
            models=models,
            draining=self._draining or self._drain_asked,
            paused=paused,
            paused_ms=int(left_s * 1000) if left_s < float("inf") else 0,
        )

    def _decline(self, job: str, attempt: int, verdict: Refuse) -> None:
        self._tally.declined(verdict.code)
        log.debug("declined: %s", verdict.reason, extra={"job": job, "attempt": attempt, "code": verdict.code})
        if self._post is not None:
            reason = verdict.reason[:QUOTED_CHARS]  # it may quote the offer
            body = wire.Decline(code=verdict.code, reason=reason, retry_after_ms=verdict.retry_after_ms)
            self._post(body, job, attempt)

    def _note(self, body: wire.Body) -> None:
        """An owner finds in the log what others did to this worker, and why."""
        say = functools.partial(self._said.say, logging.INFO)
        match body:
            case wire.Pause(reason=reason, for_ms=for_ms):
                span = f" for {for_ms / 1000:g} s" if for_ms > 0 else ""
                say("the coordinator pauses this worker%s: %s", span, reason[:200] or "no reason was given")
            case wire.Resume():
                say("the coordinator lifts its pause and its drain")
            case wire.Drain():
                say("the coordinator asks for a drain")
            case wire.ShutdownWorker(reason=reason):
                log.info("the coordinator ends this worker: %s", reason[:200] or "no reason was given")
            case _:
                pass
