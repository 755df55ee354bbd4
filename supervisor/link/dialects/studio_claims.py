"""What one worker and a studio say about claims, over all sessions of one life. No I/O here.

Theory of operation. A studio knows neither attempts nor resumption: a claim lives within one session, and dies with it
(the job is queued again, or has failed). A frame about a job that the session does not hold is a violation that costs
the session. So each end is judged by whether this session holds its claim:

    held here               complete: `completeJson`, or nothing after an upload, which is the end itself
                            fail: `fail`; both leave the ledger when they are acknowledged
    not held, fail          nobody waits for it: forgotten
    not held, a file        the upload tells the server; studio_uploads.py has what its answers mean
    not held, a result      told once, before any offer of that session is looked at and with nothing else at stake,
                            for the server may know better than its contract. When that costs the session, or is not
                            answered, the result is laid aside: it waits for its job to be offered here again, and
                            is forgotten after `aside_s`

A job that is offered again while it is still worked on here, or while its result waits, is accepted and not begun
again. So a result costs at most one session that it was not welcome in, and never two of them in a row. A jobId is any
string; here it goes by its native id, and only what is sent has the studio's word.

An end that is not acknowledged cannot be said again in the same session: if it did arrive, that would be a violation.
So after `ack_s` the session is ended, and the next one goes on as above. A drain leaves what waits to the next life.
"""

from __future__ import annotations

import collections
import logging
import math
from collections.abc import Callable
from typing import Any, Literal, cast

import msgspec
from msgspec import UNSET

from protocol import link_wire as wire
from protocol.framing import UNDECODABLE
from supervisor.intake.observed import Person
from supervisor.link.dialects import studio_frames as frames
from supervisor.link.dialects import studio_offers as offers
from supervisor.link.dialects.studio_models import Models, Source
from supervisor.link.dialects.studio_offers import MAX_JOB_CHARS, Facts, Slip, Unfit, native_job
from supervisor.link.dialects.studio_uploads import Uploads
from supervisor.link.ledger import Key
from supervisor.link.session import Side
from supervisor.observe.paced import QUOTED_CHARS, Paced

log = logging.getLogger(__name__)

ASIDE_S = 600.0
ANSWER_S = 5.0  # for a result of an earlier session; offers wait for so long at most
ACK_S = 60.0  # for the end of a job of this session; no shorter than what an upload's answer gets
MANY_JOBS = 1024  # whose last attempt is remembered
MANY_OFFERS = 8  # that wait behind an answer; a studio makes one at a time

BUSY = "worker already has an in-flight job"
_CODES: dict[str, Literal["busy", "paused"]] = {"busy": "busy", "paused": "paused", "draining": "paused"}

Send = Callable[[frames.Up], None]


class Claims:
    """See the module. `begin` and `finish` bracket a session.

    Args:
        clock: seconds, monotonic.
        utc: the time of day in RFC 3339.
        person: who sits here now.
        aside_s, answer_s, ack_s: see the module.
        models: fetches models that jobs bring the address of; None where that is not wanted.

    Attributes:
        on_change: called when what is announced may be another.
        uploads: what delivery asks of claims.
    """

    def __init__(
        self,
        facts: Facts,
        *,
        clock: Callable[[], float],
        utc: Callable[[], str],
        person: Callable[[], Person] = Person,
        aside_s: float = ASIDE_S,
        answer_s: float = ANSWER_S,
        ack_s: float = ACK_S,
        models: Models | None = None,
    ) -> None:
        self._facts, self._clock, self._utc, self._person = facts, clock, utc, person
        self._aside_s, self._answer_s, self._ack_s, self._models = aside_s, answer_s, ack_s, models
        self.on_change: Callable[[], None] = lambda: None
        self._native, self._draining = wire.Capabilities(), False
        # Of this life.
        self._attempts: collections.OrderedDict[str, int] = collections.OrderedDict()
        self._names: collections.OrderedDict[str, str] = collections.OrderedDict()  # native id -> theirs, for the log
        self._slips: dict[Key, Slip] = {}
        self._large: dict[Key, bytes] = {}
        self._results: dict[Key, wire.Complete] = {}
        self._aside: dict[Key, float] = {}
        self.uploads = Uploads(
            held=lambda: self._held,
            fail=lambda key, why: self._fail(key, why, True),
            leave=self._leave,
            on_fewer=self._proceed,
            aside_s=aside_s,
        )
        self._said = Paced(log, "words about offers", clock)
        # Of this session.
        self._side: Side | None = None
        self._send: Send = lambda _frame: None
        self._offered: Key | None = None  # with the side, which has not answered yet
        self._held: Key | None = None
        self._told: Key | None = None  # its result went out, and is not acknowledged
        self._failing: Key | None = None  # the same of its failure
        self._fetching: Key | None = None  # accepted, and its model is being fetched
        self._fetched: set[Key] = set()  # of these, what the side has to judge now
        self._answer_by = 0.0  # of what was told, or has failed
        self._strays: collections.deque[Key] = collections.deque()
        self._waiting: collections.deque[frames.Offered] = collections.deque()

    # ---- sessions

    def begin(self, side: Side, send: Send, hello: wire.Hello) -> None:
        """Welcome came."""
        self._side, self._send = side, send
        self._native = hello.capabilities
        for held in hello.held:
            self._remember(held.job, held.attempt)
        side.opened(self.post)

    def finish(self, violated: bool) -> None:
        """The session is over; `violated`: because the server found that we broke its rules."""
        if violated and self._told is not None:
            log.warning("the studio does not want this result now", extra={"job": self._told[0]})
            self._lay_aside(self._told)
        if self._offered is not None:
            self._slips.pop(self._offered, None)
        self._said.flush()
        side, self._side = self._side, None
        self._send = lambda _frame: None
        self._offered = self._held = self._told = self._failing = self._fetching = None
        self.uploads.over()
        self._fetched.clear()
        self._strays.clear()
        self._waiting.clear()
        if side is not None:
            side.closed()

    @property
    def capabilities(self) -> frames.Capabilities:
        """As they are now."""
        found = offers.capabilities(self._native, self._facts, self._draining, self._person())
        kinds = {*found.task_kinds, *(self._models.kinds if self._models is not None else ())}
        return msgspec.structs.replace(found, task_kinds=[kind for kind in frames.KINDS if kind in kinds])

    def greeting(self, hello: wire.Hello) -> frames.Capabilities:
        """Those for the first frame."""
        self._native = hello.capabilities
        return self.capabilities

    @property
    def current_job(self) -> str:
        """The job of this session in the studio's word, or ""."""
        return self._theirs(self._held) if self._held else ""

    def tick(self) -> str:
        """Let go of what has waited long enough. Called about once a second.

        Returns:
            Why the session has to end, as a sentence; "" where it may go on.
        """
        now = self._clock()
        if self._held in (self._told, self._failing) and self._held is not None and now >= self._answer_by:
            return f"the studio does not acknowledge the end of job {self._held[0]!r} within {self._ack_s:g} s"
        if self._told is not None and now >= self._answer_by:
            log.warning("the studio does not answer to a result", extra={"job": self._told[0]})
            self._lay_aside(self._told)
            self._told = None
            self._proceed()
        for key in [key for key, until in self._aside.items() if now >= until]:
            log.warning("the result is given up: its job was not offered here again", extra={"job": key[0]})
            self._forget(key, "fenced")
        return ""

    def large(self, slip: Slip, body: bytes) -> None:
        """The body of a result that is too large to be posted."""
        self._slips[slip.key], self._large[slip.key] = slip, body

    # ---- what the side posts

    def post(self, body: wire.Body, job: str = "", attempt: int = 0) -> None:
        """Say it in the studio's words, or drop what has none."""
        key = job, attempt
        match body:
            case wire.Accept():
                self._offered, self._held = None, key
                if key in self._fetched:
                    self._fetched.discard(key)  # accepted when its model was begun to be fetched
                else:
                    self._send(frames.Accept(job_id=self._theirs(key)))
            case wire.Decline() if key in self._fetched:
                self._fetched.discard(key)
                self._fail(key, body.reason, True)
            case wire.Decline():
                self._offered = None
                theirs = self._theirs(key)
                self._slips.pop(key, None)
                # What will be over by itself is told as busy: any other refusal sends the job elsewhere for good.
                soon: Literal["busy"] | None = "busy" if body.retry_after_ms else None
                self._reject(theirs, body.reason, _CODES.get(body.code) or soon)
            case wire.Complete():
                self._completed(key, body)
            case wire.Fail():
                self._failed(key, body)
            case wire.Announce():
                self._native = body.capabilities
                self.on_change()
            case wire.Draining():
                self._draining = True
                self._give_back_fetching()
                for aside in list(self._aside):
                    self._let_go(aside)
                self.uploads.drain()
                self.on_change()
            case wire.LogBatch():
                self._send(offers.log_batch(body, self._utc(), self._names))
            case _:
                pass  # started, progress: a studio has no words for them

    def _completed(self, key: Key, complete: wire.Complete) -> None:
        slip = self._slips.get(key)
        if complete.files or (slip is not None and slip.kind not in frames.JSON_KINDS):
            self.uploads.delivered(key)  # which was its end
            self._forget(key, "stored")
            self._proceed()
            return
        self._results[key] = complete
        if key == self._held:
            self._tell(key)
        elif key in self._aside:
            pass
        elif slip is None:
            self._lay_aside(key)  # of an earlier life: what it was for comes with the next offer of its job
        else:
            self._strays.append(key)
            self._proceed()

    def _failed(self, key: Key, fail: wire.Fail) -> None:
        told = self.uploads.has_failed(key)
        if told or key != self._held or not self.uploads.may_fail(key):
            self._forget(key, "stored" if told else "fenced")
            self._proceed()
            return
        self._fail(key, fail.fault.message or fail.fault.code, fail.fault.may_retry)

    def _fail(self, key: Key, error: str, retryable: bool) -> None:
        """Of the claim that is held, and once: the second would break the rules."""
        if self._failing != key:
            self._failing, self._answer_by = key, self._clock() + self._ack_s
            self._send(frames.Fail(job_id=self._theirs(key), error=error, retryable=retryable))

    def _tell(self, key: Key) -> None:
        slip, complete = self._slips[key], self._results[key]
        body = self._large.get(key, b"") if complete.inline is None else complete.inline
        try:
            result = offers.json_result(slip, body, complete.usage)
            msgspec.json.encode(result)  # an engine may say what JSON cannot
        except (*UNDECODABLE, TypeError, ValueError, OverflowError) as error:
            log.error("the result cannot be told to a studio: %s", error, extra={"job": slip.job})
            if key == self._held:
                self._fail(key, "The engine's result is not what its kind has.", True)
            else:
                self._forget(key, "fenced")
            return
        self._told = key
        self._answer_by = self._clock() + (self._ack_s if key == self._held else self._answer_s)
        self._send(frames.CompleteJson(job_id=slip.theirs, result=result, prompt=slip.prompt or UNSET))

    def _proceed(self) -> None:
        """The next result of an earlier session, or else the offers that have waited behind them."""
        while self._strays and self._told is None and self._held is None:
            self._tell(self._strays.popleft())
        while self._waiting and not self._offers_wait:
            self._take(self._waiting.popleft())

    @property
    def _offers_wait(self) -> bool:
        """Whether an offer has to wait: for the answer to a result of an earlier session, or to an upload."""
        return (self._told is not None and self._told != self._held) or self.uploads.keeps_offers_waiting(self._held)

    def _lay_aside(self, key: Key) -> None:
        self._aside.setdefault(key, self._clock() + self._aside_s)
        if self._draining:
            self._let_go(key)

    def _let_go(self, key: Key) -> None:
        """Nothing is offered here again."""
        if not self._leave(key):
            log.warning("the result is given up: it could not be written to disk", extra={"job": key[0]})
            self._forget(key, "fenced")

    def _leave(self, key: Key) -> bool:
        """Leave a result to the next life, now or when the next session drains; False where it is not on disk."""
        if self._side is not None:
            if not self._side.leave(*key):
                return False
            self._clear(key)
        return True

    def _forget(self, key: Key, verdict: str) -> None:
        """Its end is told, or nobody waits for it."""
        self._clear(key)
        if self._side is not None:
            self._side.heard(wire.Ack(verdict="stored" if verdict == "stored" else "fenced"), *key)

    def _clear(self, key: Key) -> None:
        for book in (self._slips, self._large, self._results, self._aside):
            cast("dict[Key, Any]", book).pop(key, None)
        self.uploads.forget(key)
        self._held = None if self._held == key else self._held
        self._told = None if self._told == key else self._told
        self._failing = None if self._failing == key else self._failing

    # ---- what the studio says

    def hear(self, frame: frames.Down) -> None:
        """Act on a frame."""
        match frame:
            case frames.Offered():
                if self._offers_wait and len(self._waiting) >= MANY_OFFERS:
                    self._reject(frame.job, BUSY, "busy")
                elif self._offers_wait:
                    self._waiting.append(frame)
                else:
                    self._take(frame)
            case frames.CompleteAck(job_id=job) | frames.FailAck(job_id=job):
                for key in (self._told, self._held):
                    if key is not None and key[0] == native_job(job):
                        if self.uploads.acknowledged(key):
                            self._answer_by = math.inf  # its own end is on its way
                        else:
                            self._forget(key, "stored")
                        break
                self._proceed()
            case _:
                pass  # that a heartbeat was answered is all that its answer says

    def _take(self, offered: frames.Offered) -> None:
        assert self._side is not None  # nothing is heard without a session
        theirs = offered.job
        if len(theirs) > MAX_JOB_CHARS:
            self._reject(theirs, f"jobId: it has more than {MAX_JOB_CHARS:,} characters.")
            return
        job = native_job(theirs)
        self._names[job] = theirs
        _trim(self._names)
        key = job, self._attempts.get(job, 0)
        if key in (self._held, self._offered):
            self._said.say(logging.WARNING, "offered again what is held already", extra={"job": job})
            return
        if self._held is not None or self._offered is not None or self.uploads.overtook(job):
            self._reject(theirs, BUSY, "busy")
        elif offered.claim is None:
            self._reject(theirs, offered.reason)
        elif self._side.holds(*key):
            self._take_up(key, offered.claim)
        elif self._side.running > self.uploads.waiting:  # those only wait, as results that are laid aside
            self._reject(theirs, BUSY, "busy")
        else:
            self._begin(offered.claim)

    def _take_up(self, key: Key, claim: frames.Claim) -> None:
        """A job that is worked on here since an earlier session, or whose result waits."""
        try:
            _offer, slip, _left = offers.offer(claim, key[1], self._engines())
        except Unfit as error:
            self._reject(claim.job_id, str(error))
            return
        log.info("taken up again: it was begun in an earlier session", extra={"job": key[0]})
        self._slips.setdefault(key, slip)
        self._held = key
        self._aside.pop(key, None)
        self._send(frames.Accept(job_id=claim.job_id))
        self.uploads.taken(key)
        if key in self._results:
            self._tell(key)

    def _begin(self, claim: frames.Claim) -> None:
        assert self._side is not None
        job = native_job(claim.job_id)
        attempt = self._attempts.get(job, 0) + 1
        try:
            offer, slip, left = offers.offer(claim, attempt, self._engines())
            missing = self._models.missing(claim, offer.kind) if self._models is not None else None
        except Unfit as error:
            self._reject(claim.job_id, str(error))
            return
        for sentence in left:
            log.warning("%s", sentence, extra={"job": job})
        self._remember(job, attempt)
        self._slips[job, attempt] = slip
        if missing is not None and not self._draining and self._native.accepting:
            self._fetch(missing, offer, (job, attempt))
            return
        self._offered = job, attempt
        self._side.heard(offer, job, attempt)

    def _fetch(self, source: Source, offer: wire.Offer, key: Key) -> None:
        """Hold a claim while its model is fetched. A claim that the session has lost meanwhile is nobody's any more."""
        assert self._models is not None
        self._held = self._fetching = key
        self._send(frames.Accept(job_id=self._theirs(key)))

        def done(problem: str | None) -> None:
            if self._fetching != key or self._side is None:
                return
            self._fetching = None
            if problem is not None:
                log.warning("the job's model cannot be had: %s", problem, extra={"job": key[0]})
                self._fail(key, problem, True)
                return
            self._fetched.add(key)
            self._side.heard(offer, *key)

        self._models.begin(source, key[0], done)

    def _give_back_fetching(self) -> None:
        key, self._fetching = self._fetching, None
        if key is not None:
            self._fail(key, "The worker is stopping.", True)

    def _engines(self) -> set[str]:
        return {model.engine for model in self._native.models}

    def _remember(self, job: str, attempt: int) -> None:
        self._attempts[job] = max(attempt, self._attempts.pop(job, 0))
        _trim(self._attempts)

    def _theirs(self, key: Key) -> str:
        """What the studio calls a job that it has offered in this session."""
        return self._slips[key].theirs if key in self._slips else key[0]

    def _reject(self, theirs: str, reason: str, code: Literal["busy", "paused"] | None = None) -> None:
        reason = reason[:QUOTED_CHARS]  # it may quote the offer
        self._said.say(logging.INFO, "declined: %s", reason, extra={"job": native_job(theirs)})
        self._send(frames.Reject(job_id=theirs, reason=reason, code=code or UNSET))


def _trim(book: collections.OrderedDict[str, Any]) -> None:
    while len(book) > MANY_JOBS:
        book.popitem(last=False)
