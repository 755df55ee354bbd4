"""The ledger: every attempt that this worker claimed and that the coordinator has not yet acknowledged.

The end of an attempt stays in its claim until the acknowledgement. What of it outlives the process is keeping.py's.
"""

from __future__ import annotations

import collections
from collections.abc import Iterator

import trio

from protocol.faults import Fault
from protocol.link_wire import Chunk, Complete, Fail, Held, Offer
from supervisor.observe.jobwatch import JobWatch, Watches

# Chunks are kept until acknowledged; a reader that is this far behind for one attempt is not coming back.
MAX_UNACKED_BYTES = 16 * 2**20
CHUNK_BYTES = 256  # what a kept chunk costs besides its data: most tokens are a few bytes long

Key = tuple[str, int]


class Claim:
    """One accepted offer.

    Attributes:
        deadline: trio time after which nobody wants the result; None when the offer set none.
        watch: told of each phase, for metrics and traces.
        scope: around everything that is done for the attempt.
        accepted: it is written down, and the coordinator was told so; before that, no session but the first knows it.
        kept: its result is on disk, so that only delivery is left, in this life or the next.
        at_host: whether `Host.run` has it now, which ends it more gently than the scope.
        stopped: why it was told to stop; None when it was not.
        leaving: it was told so because this life ends: what is kept is for the next one.
        forgotten: the coordinator refuses its result for good.
    """

    def __init__(
        self, job: str, attempt: int, offer: Offer, deadline: float | None, watch: JobWatch | None = None
    ) -> None:
        self.job, self.attempt, self.offer = job, attempt, offer
        self.deadline = deadline
        self.watch = watch or Watches().begin(job=job, attempt=attempt, kind=offer.kind, model=offer.model)
        self.scope = trio.CancelScope()
        self.accepted = self.kept = False
        self.at_host = False
        self.stopped: Fault | None = None
        self.leaving = False
        self.forgotten = False
        self.started = False
        self.streamed = False
        self.end: Complete | Fail | None = None
        self.progress_at = float("-inf")
        self._chunks: collections.deque[Chunk] = collections.deque()
        self._chunk_bytes = 0

    @property
    def key(self) -> Key:
        """What names it on the link."""
        return self.job, self.attempt

    @property
    def label(self) -> str:
        """What names it towards the host and in logs."""
        return f"{self.job}#{self.attempt}"

    @property
    def unacked(self) -> tuple[Chunk, ...]:
        """Chunks that the coordinator may not have yet, in order."""
        return tuple(self._chunks)

    def keep(self, chunk: Chunk) -> bool:
        """Keep a chunk until it is acknowledged; False when that is more than memory may hold."""
        self._chunks.append(chunk)
        self._chunk_bytes += len(chunk.data) + CHUNK_BYTES
        self.streamed = True
        return self._chunk_bytes <= MAX_UNACKED_BYTES

    def acked(self, seq: int) -> None:
        """Forget all chunks up to and including `seq`."""
        while self._chunks and self._chunks[0].seq <= seq:
            self._chunk_bytes -= len(self._chunks.popleft().data) + CHUNK_BYTES


class Ledger:
    """Claims by job and attempt."""

    def __init__(self) -> None:
        self._claims: dict[Key, Claim] = {}
        self._empty, self._moved = trio.Event(), trio.Event()
        self._empty.set()

    def __iter__(self) -> Iterator[Claim]:
        return iter(list(self._claims.values()))

    def __len__(self) -> int:
        return len(self._claims)

    def get(self, job: str, attempt: int) -> Claim | None:
        """The claim, or None when it is unknown or was acknowledged."""
        return self._claims.get((job, attempt))

    def record(self, claim: Claim) -> None:
        """Write a claim down, before anything is started for it."""
        self._claims[claim.key] = claim
        if self._empty.is_set():  # never replaced while somebody waits on it
            self._empty = trio.Event()

    def forget(self, claim: Claim) -> None:
        """The coordinator has its end, or wants none."""
        self._claims.pop(claim.key, None)
        self.moved()
        if not self._claims:
            self._empty.set()

    def held(self) -> tuple[Held, ...]:
        """What `hello` tells of."""
        claims = self._claims.values()
        return tuple(Held(job=c.job, attempt=c.attempt, started=c.started) for c in claims if c.accepted)

    def taken(self, model: str) -> int:
        """Attempts of a model that are still to run, or run."""
        return sum(
            claim.offer.model == model and claim.end is None and not claim.kept for claim in self._claims.values()
        )

    @property
    def running(self) -> int:
        """Attempts that have not ended."""
        return sum(claim.end is None for claim in self._claims.values())

    def moved(self) -> None:
        """A claim has ended, or its result is kept: its model is not needed for it any more."""
        self._moved.set()
        self._moved = trio.Event()

    async def wait_without(self, model: str) -> None:
        """Return when no attempt of a model is still to run, or runs."""
        while self.taken(model):
            await self._moved.wait()

    async def wait_empty(self) -> None:
        """Return when no claim is left."""
        while self._claims:
            await self._empty.wait()
