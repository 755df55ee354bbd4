"""What an answer to an upload means to the claim it is of: delivery asks, the claims know. No I/O here.

Theory of operation. An upload has no acknowledgement but its own answer, and goes over another connection than the
claim, so the two may overtake each other. What is not a yes is judged by whether this session holds the claim:

    held, 409               said before the offer that it is held by, perhaps: one more try tells. Then the server has
                            ended its claim within this very session, and nobody wants the result
    held, another no        after two more tries where another try can help, `fail`: said nothing, the server would
                            hold the job for this session, and offer it nothing more
    not held, 404, 409, 410 waits for its job to be offered here again, for `aside_s`
    not held, another no    tried again without end: the server is in trouble, or away. After the third such answer
                            the result keeps no other job away any more
    not held, a yes         the server has just offered the job again. That offer, when it comes, is declined as busy:
                            there is nothing left to do for it, and to accept what is done breaks the rules

A result is kept until the server has acknowledged the `fail`: where the session breaks before that, it goes on waiting
for its job as any other, and needs no other run.
"""

from __future__ import annotations

from collections.abc import Callable

import trio

from supervisor.link.dialects.studio_offers import Slip
from supervisor.link.ledger import Key

TRIES = 3  # that a server answers with something that may pass: within one claim of one session, or without any claim


class Uploads:
    """See the module.

    Args:
        held: the claim of this session.
        fail: says `fail` of the claim that is held, for this reason.
        leave: nobody will ask for this result in this life; returns whether it was left to the next one.
        on_fewer: called when fewer uploads keep offers waiting.
        aside_s: for how long a result waits for its job.
    """

    def __init__(
        self,
        *,
        held: Callable[[], Key | None],
        fail: Callable[[Key, str], None],
        leave: Callable[[Key], bool],
        on_fewer: Callable[[], None],
        aside_s: float,
    ) -> None:
        self._held, self._fail, self._leave, self._on_fewer = held, fail, leave, on_fewer
        self._aside_s = aside_s
        self._draining = False
        self._under_way: set[Key] = set()
        self._gone: set[Key] = set()
        self._waiting: dict[Key, trio.Event] = {}
        self._settled: set[Key] = set()
        self._unwelcome: dict[Key, int] = {}  # how often the server did not take it, answering, without its claim
        # Of this session.
        self._doubted: set[Key] = set()
        self._answers: dict[Key, int] = {}
        self._failing: dict[Key, trio.Event] = {}
        self._overtaken: set[str] = set()  # jobs whose offer is on its way, and is of no use any more

    # ---- what delivery tells and asks

    def uploading(self, slip: Slip, now: bool) -> None:
        """An upload is under way, or did not succeed.

        The server's next offer overtakes its answer to an upload: meanwhile another offer is no mistake, but waits.
        """
        if now:
            self._under_way.add(slip.key)
        else:
            self._under_way.discard(slip.key)
            self._on_fewer()

    async def refused(self, slip: Slip, why: str, at_once: bool) -> bool:
        """An upload was answered, and neither with yes nor with 409: whether its job has failed, as the server knows.

        Args:
            why: the sentence for the server.
            at_once: no other try helps.

        Returns:
            False when it may be tried again, or its claim has ended with its session.

        Cancellation: at any moment; the server may have been told by then.
        """
        key = slip.key
        if key != self._held():
            self._unwelcome[key] = self._unwelcome.get(key, 0) + 1
            return False
        self._answers[key] = self._answers.get(key, 0) + 1
        if self._answers[key] < TRIES and not at_once:
            return False
        event = self._failing[key] = trio.Event()
        try:
            self._fail(key, why)
            await event.wait()
        finally:
            del self._failing[key]
        return key in self._settled

    async def taken_up(self, slip: Slip) -> bool:
        """An upload had no claim: wait until its job is offered here again; False when it is not.

        Cancellation: at any moment.
        """
        key = slip.key
        if key == self._held():
            fresh = key not in self._doubted
            self._doubted.add(key)
            return fresh
        event = self._waiting[key] = trio.Event()
        self._on_fewer()
        try:
            if self._draining:
                self._let_go(key)
            with trio.move_on_after(self._aside_s):
                await event.wait()
                return key == self._held()
            return False
        finally:
            del self._waiting[key]

    def gone(self, slip: Slip) -> None:
        """The server says that this claim is not ours any more."""
        self._gone.add(slip.key)

    # ---- what the claims tell and ask

    @property
    def waiting(self) -> int:
        """How many only wait, for their jobs or for a better time of the server, and keep no other job away."""
        return len(self._waiting.keys() | {key for key, count in self._unwelcome.items() if count >= TRIES})

    def keeps_offers_waiting(self, held: Key | None) -> bool:
        """Whether the end of a claim is on its way here, or may be."""
        return held in self._under_way or bool(self._settled)

    def may_fail(self, key: Key) -> bool:
        """Whether `fail` may be said of a claim that is held."""
        return key not in self._gone

    def has_failed(self, key: Key) -> bool:
        """Whether the server has acknowledged that it failed."""
        return key in self._settled

    def taken(self, key: Key) -> None:
        """Its job was offered here again."""
        self._unwelcome.pop(key, None)
        if key in self._waiting:
            self._waiting[key].set()

    def delivered(self, key: Key) -> None:
        """The server took the upload."""
        if key != self._held():
            self._overtaken.add(key[0])

    def overtook(self, job: str) -> bool:
        """Whether this offer is one that was made before its job's upload was taken; no later one is."""
        overtaken = job in self._overtaken
        self._overtaken.discard(job)
        return overtaken

    def acknowledged(self, key: Key) -> bool:
        """The server knows that this claim has failed. False: it was not for an upload."""
        if key not in self._failing:
            return False
        self._settled.add(key)
        self._failing[key].set()
        return True

    def over(self) -> None:
        """The session is, and its claim with it."""
        self._doubted.clear()
        self._answers.clear()
        self._overtaken.clear()
        for event in self._failing.values():
            event.set()

    def drain(self) -> None:
        """Nothing is offered here again."""
        self._draining = True
        for key in list(self._waiting):
            self._let_go(key)

    def _let_go(self, key: Key) -> None:
        # One that was offered here again a moment ago, and has not gone on yet, is delivered in this life.
        if key != self._held() and not self._leave(key):
            self._waiting[key].set()

    def forget(self, key: Key) -> None:
        """It has ended."""
        for marks in (self._under_way, self._gone, self._doubted, self._settled):
            marks.discard(key)
        for counts in (self._answers, self._unwelcome):
            counts.pop(key, None)
