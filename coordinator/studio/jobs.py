"""The jobs of one studio session: claims out, and what the worker says about them in.

The contract names jobs and no attempts, so this remembers which attempt was offered: its number fences a late result
here as everywhere. There is no cancel in the contract: a job that was cancelled takes the worker's one slot until the
worker ends it, and what it delivers then is acknowledged and dropped. A frame may be lost on either side, too: a worker
that says without a break that it runs nothing has neither such a job any more, nor one that it had accepted.

Frames of the socket and results that come by HTTP take turns (`turn`): each step is whole before the next begins.
"""

from __future__ import annotations

import contextlib
import logging
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import anyio
import msgspec

from coordinator.attempts import Attempts
from coordinator.fleet import HeldAttempt, Key, Worker
from coordinator.studio.claims import Sources, claim_of
from coordinator.studio.results import from_json
from coordinator.studio.wire import MAX_LOG_CHARS, CompleteJson, Fail, Reject, Unreadable, declined, frame
from protocol import link_wire as wire
from protocol.faults import Fault, FaultError
from protocol.work import parse_params

log = logging.getLogger(__name__)

MAX_REMEMBERED = 4096  # jobs that a session has done with
_ACKS = {"completeJson": "completeAck", "fail": "failAck"}


class Given(NamedTuple):
    """A job that this worker was offered: the attempt, and what its result is judged by."""

    key: Key
    kind: str
    params: Any


class Past(NamedTuple):
    """What became of a job that this worker had.

    Attributes:
        verdict: stored or fenced.
        ack: the frame that acknowledges this end, when the worker says it once more; "" where there is none.
    """

    verdict: str
    ack: str = ""


class Stranger(Exception):
    """The worker speaks of a job that it does not hold, and what it says of it is not stored."""


class StudioJobs:
    """See the module. Unless said otherwise, `turn` is held by who calls a coroutine here.

    Attributes:
        turn: held for one step of an attempt.
    """

    def __init__(
        self,
        worker: Worker,
        attempts: Attempts,
        sources: Sources,
        url: Callable[[str], str],
        say: Callable[[str], None],
        refused: Callable[[str], None],
        busy_s: float,
    ) -> None:
        """Begin with none.

        Args:
            worker: whose they are.
            attempts: hears what becomes of them.
            sources: where the models' files are.
            url: makes the relative URL of an input one that the worker can fetch.
            say: queues a frame.
            refused: told of a model, of which the worker has rejected a job for good.
            busy_s: pause before the next offer to a worker that rejected one as busy or paused.
        """
        self.turn = anyio.Lock()
        self._worker, self._attempts, self._sources = worker, attempts, sources
        self._url, self._say, self._refused, self._busy_s = url, say, refused, busy_s
        self._given: dict[str, Given] = {}
        self._done: dict[str, Past] = {}
        self._acks: dict[Key, tuple[str, bool]] = {}  # the frame that acknowledges an end, and whether to say it
        self._idle_since: float | None = None  # the first of its words in a row that it runs nothing
        self._uploads: Counter[Key] = Counter()  # under way
        self._begun: set[Key] = set()  # their watchers were told that the work has begun

    # ---- looking -------------------------------------------------------------------------------------------

    def given(self, job: str) -> Given | None:
        """The job, when the worker has it."""
        given = self._given.get(job)
        return given if given is not None and given.key in self._worker.attempts else None

    def abandoned(self, job: str) -> bool:
        """Whether nobody waits any more for the job that the worker has."""
        given = self.given(job)
        return given is not None and self._held(given.key).state == "abandoned"

    # ---- out -----------------------------------------------------------------------------------------------

    def offer(self, offer: wire.Offer, key: Key) -> None:
        """Offer a job. Raises FaultError(unsupported) for what the contract has no word for."""
        claim = claim_of(key[0], offer, self._sources, self._url)
        self._done.pop(key[0], None)
        self._idle_since = None  # what it said before knew nothing of this
        self._given[key[0]] = Given(key, offer.kind, parse_params(offer.kind, offer.params))
        self._say(frame("offer", claim=claim))

    async def refuse(self, key: Key, fault: Fault) -> None:
        """Decline in the worker's stead what cannot be offered to it."""
        if key in self._worker.attempts:
            await self._attempts.decline(self._worker, key, wire.Decline(code="unsupported", reason=fault.message))

    def ended(self, key: Key, verdict: str) -> None:
        """An end is stored, or not wanted: say so in the worker's words, if it came by the socket."""
        word, said = self._acks.pop(key, ("", False))
        self._forget(key, Past(verdict, word))
        if said:
            self._say(frame(word, jobId=key[0]))

    # ---- in ------------------------------------------------------------------------------------------------

    async def take(self, type_: str, job: str, body: Any) -> None:
        """Act on a frame about a job; `Unreadable` stands for a body that does not fit.

        Raises:
            Stranger: the worker does not hold the job.
            StoreError, FaultError, OSError: nothing was stored.
        """
        given = self.given(job)
        if given is None:
            self._of_another(type_, job)
            return
        match body:
            case Reject():
                await self._decline(given, declined(body))
            case CompleteJson():
                await self._end(given, "completeAck", self._judged(given, body))
            case Fail():
                fault = Fault("engine_failed", body.error[:MAX_LOG_CHARS], retryable=body.retryable)
                await self._end(given, "failAck", fault)
            case Unreadable():
                await self._unreadable(type_, given, str(body))
            case _:
                await self._accepted(given)

    async def uploaded(self, given: Given, end: wire.Complete | Fault) -> bool:
        """End a job with what came by HTTP: a result, or why it is none.

        Returns whether it is kept as the job's result, or wanted by nobody any more.

        Raises:
            StoreError, FaultError, OSError: nothing was stored.
        """
        now = self.given(given.key[0])
        if now is None or now.key != given.key:
            return False
        good = await self._end(given, "failAck" if isinstance(end, Fault) else "", end, say=False)
        return good and self._done[given.key[0]].verdict == "stored"

    def works_on(self, job: str) -> None:
        """The worker runs this job, it says: whoever waits for a stream may have its headers now."""
        self._idle_since = None
        given = self.given(job)
        if given is not None and given.key not in self._begun:
            self._begun.add(given.key)
            self._attempts.started(self._worker, given.key)

    def idle(self, now: float, let_go_s: float) -> bool:
        """The worker runs nothing, it says. Returns whether it has said so for so long that `let_go` is due."""
        if self._idle_since is None:
            self._idle_since = now
        return now - self._idle_since > let_go_s and bool(self._forgotten)

    async def let_go(self, now: float, let_go_s: float) -> None:
        """What the worker runs no more takes its slot no more; what it had accepted fails by its loss.

        Arguments are those of `idle`, which may have another answer when it is our turn.

        Raises:
            StoreError, FaultError, OSError: nothing was stored.
        """
        for held in self._forgotten if self.idle(now, let_go_s) else ():
            if held.state == "abandoned":
                self._forget(held.key, Past("fenced"))
                self._attempts.let_go(self._worker, held.key)
                continue
            log.warning("%s#%d on %s: the worker runs nothing, it says", *held.key, self._worker.id)
            fault = Fault("worker_lost", "The worker says that it runs nothing, and has not delivered the job.")
            await self._attempts.fail(self._worker, held.key, wire.Fail(fault=fault))

    @property
    def _forgotten(self) -> list[HeldAttempt]:
        """What the worker cannot have, if it runs nothing. An offer that waits for its answer it may have."""
        return [
            held for held in self._worker.attempts.values() if held.state != "offered" and not self._uploads[held.key]
        ]

    @contextlib.contextmanager
    def uploading(self, given: Given) -> Iterator[None]:
        """A result of the job comes by HTTP meanwhile, whatever the worker says of itself."""
        self._uploads[given.key] += 1
        try:
            yield
        finally:
            self._uploads[given.key] -= 1
            self._uploads += Counter()  # without what is 0
            self._idle_since = None

    def _judged(self, given: Given, body: CompleteJson) -> wire.Complete | Fault:
        try:
            return from_json(given.kind, body.result, getattr(given.params, "task", "transcribe"))
        except FaultError as error:
            log.warning("%s#%d on %s: %s", *given.key, self._worker.id, error.fault.message)
            return error.fault

    async def _end(self, given: Given, word: str, end: wire.Complete | Fault, *, say: bool = True) -> bool:
        """End the attempt; `word` is the frame that acknowledges it, "" for none. Returns whether it has a result.

        Unless it is to `say` so now, it does when the worker itself says that end.
        """
        await self._accepted(given)
        self._acks[given.key] = (word, say and bool(word))
        if isinstance(end, Fault):
            await self._attempts.fail(self._worker, given.key, wire.Fail(fault=end))
            return False
        return await self._attempts.complete(self._worker, given.key, end)

    async def _decline(self, given: Given, said: wire.Decline) -> None:
        if self._held(given.key).state == "running":
            # It had accepted: this is no answer to an offer any more.
            fault = Fault("engine_failed", f"The worker gave the job back: {said.reason}", retryable=True)
            await self._end(given, "", fault)
            return
        if said.code != "unsupported":
            self._worker.block("", anyio.current_time() + self._busy_s)
            said = msgspec.structs.replace(said, retry_after_ms=int(self._busy_s * 1000))
        model = self._held(given.key).model
        self._forget(given.key, Past("fenced"))
        await self._attempts.decline(self._worker, given.key, said)
        if said.code == "unsupported":
            self._refused(model)

    async def _unreadable(self, type_: str, given: Given, error: str) -> None:
        """The job fails, the session goes on."""
        log.warning("Worker %s sent a frame that cannot be read: %s", self._worker.id, error)
        self._attempts.counters.events["unreadable"] += 1
        if type_ == "reject":
            await self._decline(given, wire.Decline(code="busy", reason=error[:MAX_LOG_CHARS]))
            return
        fault = Fault("engine_protocol", f"The worker sent a frame about this job that cannot be read: {error}")
        await self._end(given, "failAck" if type_ == "fail" else "completeAck", fault)

    def _of_another(self, type_: str, job: str) -> None:
        """About a job that the worker does not hold: an end said twice is stored, of all else nothing is.

        To give up what one does not hold is no offence. Raises Stranger.
        """
        if type_ == "reject":
            return
        past = self._done.get(job)
        if past is None or not past.ack or past.ack != _ACKS.get(type_):
            raise Stranger(f"The job {job[:128]!r} is not held by this session.")
        self._say(frame(past.ack, jobId=job))

    async def _accepted(self, given: Given) -> None:
        """The worker has the job, whether it says so or ends it at once."""
        if self._held(given.key).state == "offered":
            self._idle_since = None  # what it said before was true
            await self._attempts.accept(self._worker, given.key)

    def _forget(self, key: Key, past: Past) -> None:
        self._begun.discard(key)
        given = self._given.get(key[0])
        if given is not None and given.key == key:
            del self._given[key[0]]
        self._done[key[0]] = past
        if len(self._done) > MAX_REMEMBERED:
            del self._done[next(iter(self._done))]

    def _held(self, key: Key) -> HeldAttempt:
        return self._worker.attempts[key]
