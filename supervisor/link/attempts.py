"""What happens to an offer that was taken: fetch, run, deliver, tell, until the coordinator has its end.

Theory of operation. Each claim has one task; sessions come and go beside it. What the task has to say is posted
when there is a session, and stays in the claim in any case, so that a later session can say it again: whether it
has started, the chunks that are not acknowledged, and the end. A claim leaves the ledger only by `ack`. What must not
be lost with the process is handed to `Keeping` before anybody is told of it.
"""

from __future__ import annotations

import collections
import functools
import logging
import math
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Protocol

import msgspec
import trio

from protocol import link_wire as wire
from protocol.faults import Fault, FaultError, Owner, refuse
from supervisor.host import work
from supervisor.host.ground import Attempt, Ground
from supervisor.link.dialects.base import Delivery
from supervisor.link.endings import mistaken, redacted
from supervisor.link.journal import Kept
from supervisor.link.keeping import InMemory, Keeping, Parcel
from supervisor.link.ledger import MAX_UNACKED_BYTES, Claim, Ledger
from supervisor.link.session import Post
from supervisor.link.transfer import UPLOAD_PATIENCE_S
from supervisor.link.tries import outlast
from supervisor.observe.context import about
from supervisor.observe.figures import span
from supervisor.observe.jobwatch import Watches
from supervisor.store import StoreProblem

log = logging.getLogger(__name__)

DECLINED_MS = 5000  # a disk that is full is rarely not full a moment later
PROGRESS_EVERY_S = 0.25  # progress is for eyes: more often only costs
MANY_GIVEN_BACK = 1024  # jobs that are remembered


class Runs(Protocol):
    """The part of the host that is used here."""

    async def run(self, request: work.RunRequest, on_event: work.OnEvent) -> work.RunEnd:
        """See `supervisor.host.host.Host.run`."""

    def cancel(self, label: str) -> None:
        """See `supervisor.host.host.Host.cancel`."""


class Attempts:
    """All claims of this worker and their tasks, which live in `nursery`.

    Args:
        ground: model -> where its engine works; below it each attempt has its folders.
        watches: for metrics and traces.
        keeping: where claims and results outlive the process; in memory without it.

    Attributes:
        every_line: progress that carries words is never left out: this coordinator shows them as a log.
        on_done: called after every job that succeeded.
    """

    def __init__(
        self,
        host: Runs,
        delivery: Delivery,
        ground: Callable[[str], Ground],
        nursery: trio.Nursery,
        watches: Watches | None = None,
        keeping: Keeping | None = None,
    ) -> None:
        self._watches = watches or Watches()
        self._keeping = keeping or InMemory()
        self.ledger = Ledger()
        self._host = host
        self._delivery = delivery
        self._ground = ground
        self._nursery = nursery
        self._given_back: collections.deque[str] = collections.deque(maxlen=MANY_GIVEN_BACK)
        self._post: Post | None = None
        self._present_since = math.inf  # in trio time; inf without a session
        self.every_line = False
        self.on_done: Callable[[], None] = lambda: None

    # ---- sessions

    def attach(self, post: Post) -> None:
        """A session opened: say again what the coordinator may not know."""
        self._post, self._present_since = post, trio.current_time()
        for claim in self.ledger:
            if not claim.accepted:
                continue
            if claim.started:
                self._tell(claim, wire.Started())
            for chunk in claim.unacked:
                self._tell(claim, chunk)
            if claim.end is not None:
                self._tell(claim, claim.end)

    def detach(self) -> None:
        """The session is over; the work goes on."""
        self._post, self._present_since = None, math.inf

    def _tell(self, claim: Claim, body: wire.Body) -> None:
        if self._post is not None and not claim.forgotten:
            self._post(body, claim.job, claim.attempt)

    # ---- what the coordinator says

    def begin(self, job: str, attempt: int, offer: wire.Offer) -> None:
        """Claim an offer: it is written down, accepted, and worked on, in this order."""
        now = trio.current_time()
        deadline = now + offer.deadline_ms / 1000 if offer.deadline_ms > 0 else None
        claim = self._claim(job, attempt, offer, deadline)
        self._nursery.start_soon(self._work, claim)

    def _claim(self, job: str, attempt: int, offer: wire.Offer, deadline: float | None = None) -> Claim:
        watch = self._watches.begin(
            job=job, attempt=attempt, kind=offer.kind, model=offer.model, traceparent=offer.traceparent
        )
        claim = Claim(job, attempt, offer, deadline, watch)
        self.ledger.record(claim)
        return claim

    def restore(self, found: Iterable[tuple[Kept, Parcel | None]]) -> None:
        """Take up what an earlier life left, before the first session: results are delivered, the rest has failed."""
        for kept, parcel in found:
            claim = self._claim(kept.job, kept.attempt, kept.offer)
            claim.accepted = claim.started = True
            claim.streamed = kept.streamed
            lost = Fault("worker_lost", "The worker ended while it ran the job, and has started again.")
            if parcel is None:
                claim.end = wire.Fail(fault=kept.fault or lost, streamed=kept.streamed)
            elif kept.offer.stream:
                # Its pieces went with that life, and nobody knows which of them were read: a result behind a gap would
                # make a torn answer look whole.
                self._nursery.start_soon(self._end, claim, wire.Fail(fault=lost, streamed=kept.streamed))
            else:
                claim.kept = True
                self._nursery.start_soon(self._work, claim, parcel)

    def cancel(self, job: str, attempt: int, reason: str) -> None:
        """Its owner wants no more of the job: ask the attempt to end; it still ends with `complete` or `fail`."""
        self._stop(job, attempt, Fault("cancelled", f"The job was cancelled{f': {reason}' if reason else ''}."))

    def give_back(self, job: str, attempt: int, reason: str) -> None:
        """The owner of this box wants no more of the job here. That is no word on the job: it runs elsewhere.

        Offered here again in this life of the supervisor, it is declined.
        """
        if job not in self._given_back:
            self._given_back.append(job)
        told = f"The owner of the worker took the job off it{f': {reason}' if reason else ''}."
        self._stop(job, attempt, Fault("worker_stopping", told))

    def gave_back(self, job: str) -> bool:
        """Whether `give_back` was called for any attempt of this job."""
        return job in self._given_back

    def slept(self, seconds: float) -> None:
        """The machine did, and our clock stood still meanwhile; deadlines did not."""
        for claim in self.ledger:
            if claim.deadline is not None:
                claim.deadline -= seconds

    def _stop(self, job: str, attempt: int, fault: Fault) -> None:
        claim = self.ledger.get(job, attempt)
        if claim is not None and claim.end is None and claim.stopped is None:
            claim.stopped = fault
            if claim.at_host:
                self._host.cancel(claim.label)
            else:
                claim.scope.cancel()

    def chunk_acked(self, job: str, attempt: int, seq: int) -> None:
        """The coordinator has the chunks up to `seq`."""
        if claim := self.ledger.get(job, attempt):
            claim.acked(seq)

    def acked(self, job: str, attempt: int, verdict: str) -> None:
        """The coordinator has the end of this attempt, or does not want it ("fenced")."""
        claim = self.ledger.get(job, attempt)
        if claim is None:
            return
        if verdict == "fenced":
            log.warning("fenced: the job went on without us", extra={"job": job, "attempt": attempt})
        claim.forgotten = True
        claim.scope.cancel()
        self.ledger.forget(claim)
        self._nursery.start_soon(self._keeping.forget, job, attempt)

    def leave(self, job: str, attempt: int) -> bool:
        """Nobody asks for this result before the worker ends: it is delivered after the next start.

        Returns:
            False where it is not on disk, and nothing was done.
        """
        claim = self.ledger.get(job, attempt)
        if claim is None or not claim.kept or isinstance(claim.end, wire.Fail):
            return False
        if claim.end is None:
            claim.leaving = claim.leaving or claim.stopped is None
            self._stop(job, attempt, Fault("worker_stopping", "The worker is stopping."))
        else:
            self._left(claim)
        return True

    def _left(self, claim: Claim) -> None:
        log.info("the result is kept, and is delivered after the next start")
        self.ledger.forget(claim)

    def stop_all(self, fault: Fault) -> None:
        """End what has not ended, with `fault`; each says so as its end. What is kept is left to the next life."""
        for claim in self.ledger:
            claim.leaving = claim.leaving or claim.stopped is None
            self._stop_now(claim, fault)

    def stop_models(self, models: Collection[str], fault: Fault) -> None:
        """End what runs on these models, or waits for them, in the same way. What is kept is delivered without them."""
        for claim in self.ledger:
            if claim.offer.model in models and not claim.kept:
                self._stop_now(claim, fault)

    def _stop_now(self, claim: Claim, fault: Fault) -> None:
        if claim.end is None:
            claim.stopped = claim.stopped or fault
            claim.scope.cancel()

    # ---- the task of one claim

    async def _work(self, claim: Claim, parcel: Parcel | None = None) -> None:
        with about(job=claim.job, attempt=claim.attempt, model=claim.offer.model):
            if parcel is not None:
                await self._end(claim, await self._delivered(claim, parcel))
            elif await self._accepted(claim):
                await self._work_on(claim)

    async def _accepted(self, claim: Claim) -> bool:
        """Write the claim down and accept; False when it cannot be taken, or nobody waits for the answer any more."""
        post = self._post
        sentence = ""
        try:
            await self._keeping.claimed(claim.job, claim.attempt, claim.offer)
        except StoreProblem as problem:
            sentence = str(problem)
        if self._post is post and not sentence:
            claim.accepted = True
            self._tell(claim, wire.Accept())
            about_it = {
                "job": claim.job,
                "attempt": claim.attempt,
                "model": claim.offer.model,
                "kind": claim.offer.kind,
            }
            log.debug("taken", extra=about_it)
            return True
        self.ledger.forget(claim)
        claim.watch.end("cancelled")
        if sentence:
            log.warning("declined: %s", sentence)
            if self._post is post:
                self._tell(claim, wire.Decline(code="paused", reason=sentence, retry_after_ms=DECLINED_MS))
        else:
            # The session in which it was offered is over: the coordinator has taken the offer back.
            await self._keeping.forget(claim.job, claim.attempt)
        return False

    async def _work_on(self, claim: Claim) -> None:
        end: wire.Complete | wire.Fail | None = None
        folders: Attempt | None = None
        try:
            with claim.scope:
                open_attempt = self._ground(claim.offer.model).open_attempt
                # Not abandoned when cancelled: what it made has to be removed.
                folders = await trio.to_thread.run_sync(open_attempt, f"{claim.job}.{claim.attempt}")
                end = await self._run(claim, folders)
        except FaultError as error:
            end = wire.Fail(fault=error.fault, streamed=claim.streamed)
        except OSError as error:
            fault = refuse("worker_failed", f"The attempt's folder cannot be used: {error}.").fault
            end = wire.Fail(fault=fault, streamed=claim.streamed)
        except Exception as error:
            end = mistaken(error, claim.streamed)
        if not isinstance(end, wire.Complete):
            # Before anybody is told: what it left may be what fills the disk, and a coordinator on the same disk
            # could then not even record the failure.
            await _remove(folders)
        await self._end(claim, end)
        if isinstance(end, wire.Complete):
            await _remove(folders)

    async def _end(self, claim: Claim, end: wire.Complete | wire.Fail | None) -> None:
        """Say how it ended: None means that it was stopped."""
        if claim.forgotten:
            await self._unwanted(claim)
            return
        if end is None:
            if claim.kept and claim.leaving:
                self._left(claim)
                return
            fault = claim.stopped or Fault("worker_stopping", "The worker is stopping.")
            end = wire.Fail(fault=fault, streamed=claim.streamed)
        if isinstance(end, wire.Fail):
            end = msgspec.structs.replace(end, fault=redacted(end.fault))
            await self._keeping.failed(claim.job, claim.attempt, end.fault, end.streamed)
            if self.ledger.get(claim.job, claim.attempt) is not claim:
                await self._unwanted(claim)
                return
        claim.end = end
        self.ledger.moved()
        _log_end(claim, end)
        if isinstance(end, wire.Complete):
            self.on_done()
            claim.watch.end("succeeded", usage=end.usage)
        else:
            ours = end.fault.code == "worker_stopping" and self.gave_back(claim.job)
            code = "cancelled" if ours else end.fault.code  # whoever took it off us knows why
            claim.watch.end("cancelled" if code == "cancelled" else "failed", code)
        self._tell(claim, end)

    async def _unwanted(self, claim: Claim) -> None:
        """The coordinator has said that it wants no end, while one was on its way."""
        claim.watch.end("cancelled")
        await self._keeping.forget(claim.job, claim.attempt)  # what was kept after it said so

    async def _run(self, claim: Claim, folders: Attempt) -> wire.Complete | wire.Fail:
        claim.watch.enter("fetch")
        inputs = await self._fetch(claim, folders)
        claim.watch.enter("queue")
        request = work.RunRequest(
            model=claim.offer.model,
            kind=claim.offer.kind,
            params=bytes(claim.offer.params),
            folder=folders.outputs,
            inputs=inputs,
            stream=claim.offer.stream,
            deadline_s=None if claim.deadline is None else max(0.0, claim.deadline - trio.current_time()),
            label=claim.label,
            alone=claim.offer.alone,
            priority=claim.offer.priority,
            vram_bytes=int(claim.offer.vram_gb_estimate * 2**30),
        )
        claim.at_host = True
        try:
            end = await self._host.run(request, lambda event: self._event(claim, event))
        finally:
            claim.at_host = False
        match end:
            case work.Failed(fault=fault, streamed=streamed):
                # When we asked for the end, the reason is ours; a cancelled run is not the engine's failure.
                ours = claim.stopped if fault.code == "cancelled" else None
                return wire.Fail(fault=ours or fault, streamed=streamed or claim.streamed)
            case work.Done():
                return await self._deliver(claim, end, folders)

    async def _fetch(self, claim: Claim, folders: Attempt) -> Mapping[str, Path]:
        for file in claim.offer.inputs:
            target = functools.partial(folders.create_input, file.name)
            await self._delivery.fetch(file, target, claim.watch.fetched)
        return {file.name: folders.inputs / file.name for file in claim.offer.inputs}

    def _event(self, claim: Claim, event: work.RunEvent) -> None:
        """Called by the host for each event of a run; must not block."""
        if claim.forgotten:
            return
        match event:
            case work.Started():
                claim.started = True
                claim.watch.enter("run")
                self._tell(claim, wire.Started())
            case work.Chunk(seq=seq, data=data):
                claim.watch.output()
                chunk = wire.Chunk(seq=seq, data=msgspec.Raw(data))
                if not claim.keep(chunk) and claim.stopped is None:
                    mib = MAX_UNACKED_BYTES // 2**20
                    claim.stopped = Fault("worker_failed", f"The stream ran {mib} MiB ahead of its reader.")
                    self._host.cancel(claim.label)
                self._tell(claim, chunk)
            case work.Progress():
                if not claim.started and event.phase != "room":
                    claim.watch.enter("load")
                claim.watch.progress(event.n, event.total)
                now = trio.current_time()
                if (self.every_line and event.text) or now - claim.progress_at >= PROGRESS_EVERY_S:
                    claim.progress_at = now
                    progress = wire.Progress(n=event.n, total=event.total, phase=event.phase, text=event.text)
                    self._tell(claim, progress)

    async def _deliver(self, claim: Claim, done: work.Done, folders: Attempt) -> wire.Complete:
        parcel = await self._keeping.done(claim.job, claim.attempt, done, folders)
        claim.kept = parcel.durable
        self.ledger.moved()
        return await self._upload(claim, parcel)

    async def _upload(self, claim: Claim, parcel: Parcel) -> wire.Complete:
        claim.watch.enter("upload")
        # What is kept waits for the coordinator as long as it takes; it says itself when nobody wants it any more. What
        # a full disk kept from being kept waits as well while it is away, until its deadline, where it has one.
        until = None if parcel.durable else claim.deadline
        patience_s = math.inf if parcel.durable else UPLOAD_PATIENCE_S
        upload, moved = functools.partial(self._delivery.upload, claim.offer.upload), claim.watch.delivered
        for file, source in parcel.items:
            once = functools.partial(upload, file, source, until, moved, patience_s)
            await outlast(once, lambda: self._present_since, patience_s)
        return parcel.complete

    async def _delivered(self, claim: Claim, parcel: Parcel) -> wire.Complete | wire.Fail | None:
        """Deliver what an earlier life has kept."""
        try:
            with claim.scope:
                return await self._upload(claim, parcel)
        except FaultError as error:
            return wire.Fail(fault=error.fault, streamed=claim.streamed)
        except Exception as error:
            return mistaken(error, claim.streamed)
        return None


def _log_end(claim: Claim, end: wire.Complete | wire.Fail) -> None:
    """The one line of a job. Of a fault only its code is told: its sentence may quote what the caller wrote."""
    kind, took = claim.offer.kind, span(claim.watch.seconds)
    if isinstance(end, wire.Complete):
        log.info("%s job done in %s", kind, took)
        return
    fault = end.fault
    if fault.code == "cancelled":
        log.info("%s job cancelled after %s", kind, took)
        return
    ours = fault.owner is not Owner.CALLER and fault.code != "worker_stopping"
    level = logging.WARNING if ours else logging.INFO
    log.log(level, "%s job failed after %s: %s, the %s's fault", kind, took, fault.code, fault.owner)


async def _remove(folders: Attempt | None) -> None:
    """Remove an attempt's folders, in a thread: they may hold gigabytes."""
    if folders is None:
        return
    with trio.CancelScope(shield=True):
        if not await trio.to_thread.run_sync(folders.remove):
            log.warning("the folders of attempt %s could not be removed yet", folders.name)
