"""This replica among the others: a bus that reaches them, who their workers are, and who must be told of what.

Tokens go straight to the replica that the client hangs on (`jobs.origin`), and to those that have said that somebody
follows the job there. Whatever is lost on the way is found in the database: once a second this replica asks which of
the jobs that somebody follows here have ended. So nothing here is ever waited for.
"""

from __future__ import annotations

import logging
import time
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import anyio
from anyio.to_thread import run_sync

from coordinator.bus import HERE, LocalBus, Subscription, Whence
from coordinator.elsewhere import Reach, Upload, not_reached
from coordinator.fleet import Key, Worker
from coordinator.records import JobChunk, JobEnded, JobEvent, JobNudge, JobProgress, JobStarted
from coordinator.replicas import frames
from coordinator.replicas.door import door, serve
from coordinator.replicas.lines import ITSELF, Inquiry, answer
from coordinator.replicas.peer import Caller, Peer
from coordinator.replicas.remote import RemotePort, deliver, order_done, remote_worker, told_of, told_of_one
from coordinator.store import StoreError
from protocol.faults import FaultError, refuse

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anyio.abc import TaskGroup
    from starlette.requests import Request
    from starlette.responses import Response

    from coordinator.attempts import Attempts
    from coordinator.kept_lines import Lines
    from coordinator.records import JobRecord
    from coordinator.replicas.opening import Doorway

log = logging.getLogger(__name__)

LOOK_S = 1.0  # between two looks for replicas that came or went, and for ends that nobody told of
FLEET_S = 0.25  # a change of a worker is told within this
FLEET_AGAIN_S = 5.0  # what changes all the time (running jobs, temperatures) is told this often
WORKERS_PER_FRAME = 200
CLOSING_S = 0.1
MAX_FOLLOWED = 50_000  # jobs that one other replica may follow here


@runtime_checkable
class Directory(Protocol):
    """What the store knows of replicas; `PostgresStore` is one."""

    gateway: str
    advertised: str

    def peers(self) -> list[tuple[str, str]]:
        """(name, URL) of the others that live."""

    def ended_of(self, jobs: Sequence[str]) -> list[str]:
        """Those of these jobs that have ended."""


class Replicas:
    """See the module: the `Bus` of a coordinator that is one of several, and its `Elsewhere`.

    Not thread-safe: everything happens on the event loop.

    Attributes:
        uploaded: takes an upload for a session that is here; None where there can be none.
    """

    uploaded: Callable[[Request, str, str], Awaitable[Response]] | None = None

    def __init__(self, directory: Directory, doorway: Doorway) -> None:
        from coordinator.replicas.uploads import Uploads  # with httpx, which only one of several replicas needs

        self.name = directory.gateway
        self._directory, self._doorway = directory, doorway
        directory.advertised = doorway.url
        self._caller = Caller(self.name, doorway.secret, doorway.trust)
        self._local = LocalBus()
        self._peers: dict[str, Peer] = {}
        self._inbound: Counter[str] = Counter()  # replica -> its open connections
        self._fleets: dict[str, dict[str, Worker]] = {}  # replica -> worker id -> it
        self._followers: defaultdict[str, set[str]] = defaultdict(set)  # job -> replicas where somebody follows it
        self._followed: Counter[str] = Counter()  # replica -> how many jobs it follows here
        self._following: dict[str, Subscription] = {}  # job that came in elsewhere -> the last who follows it here
        self._fleet_news = anyio.Event()
        self._told_lately: set[str] = set()  # workers of ours that the others were told of within `FLEET_S`
        self._untold: dict[str, Worker] = {}  # of these, those that have changed since
        self._dropped = 0  # by peers that are gone
        self._attempts: Attempts | None = None
        self._inquiry = Inquiry(self._order)
        self._uploads = Uploads(self._caller)

    def attach(self, attempts: Attempts) -> None:
        """From now on these attempts hear of the other replicas, and the other way round."""
        self._attempts = attempts
        attempts.elsewhere = self
        attempts.fleet.elsewhere, attempts.fleet.tell = self._workers_elsewhere, self._tell_of

    @property
    def peers(self) -> list[Peer]:
        """The other replicas that live."""
        return list(self._peers.values())

    # ---- Bus -----------------------------------------------------------------------------------------------

    def publish(self, topic: str, event: JobEvent, whence: Whence = HERE) -> None:
        """Hand the event to all that follow the job now, here and elsewhere. Never waits."""
        self._local.publish(topic, event)
        targets = {whence.origin, *self._followers.get(topic, ())} - {"", self.name}
        if targets and (frame := _frame(topic, event, whence.attempt)) is not None:
            urgent = not isinstance(event, JobProgress) and not (isinstance(event, JobChunk) and event.seq)
            for name in targets:
                if peer := self._peers.get(name):
                    peer.push(frame, urgent=urgent)
        if isinstance(event, JobEnded):
            for name in self._followers.pop(topic, ()):
                self._followed[name] -= 1

    def subscribe(self, topic: str, *, everywhere: bool = False) -> Subscription:
        """Events from the moment of this call on; `everywhere`: the others are asked to tell of the job, too."""
        subscription = self._local.subscribe(topic)
        if everywhere and topic not in self._following:
            self._following[topic] = subscription
            self._tell(frames.WatchFrame(topic, True), urgent=True)
        return subscription

    def close(self) -> None:
        """End all subscriptions with BusClosed."""
        self._local.close()

    # ---- Elsewhere -----------------------------------------------------------------------------------------

    def stop(self, gateway: str, key: Key, reason: str) -> None:
        """A replica holds an attempt that its row went on without."""
        if peer := self._peers.get(gateway):
            peer.push(frames.StopFrame(*key, reason), urgent=True)

    def joined(self, worker: str) -> None:
        """A worker has connected here."""
        self._tell(frames.JoinedFrame(worker), urgent=True)
        self._fleet_news.set()

    def reach(self) -> Reach:
        """How the others are reached, and what was lost on the way since the start."""
        peers = self._peers.values()
        connected, dropped = sum(peer.connected for peer in peers), sum(peer.dropped for peer in peers)
        return Reach(len(peers), connected, self._dropped + dropped)

    async def lines(self, job: str, worker: str, limit: int) -> tuple[list[Lines], list[str]]:
        """What workers' logs said of a job at the others, and the names of those that did not answer in time."""
        return await self._inquiry.ask(list(self._peers), job, worker, limit)

    async def upload(self, record: JobRecord, upload: Upload) -> Response | None:
        """Have an upload for this job judged where the worker's session is. See `Elsewhere`."""
        if record.gateway in ("", self.name) or record.worker not in ("", upload.worker):
            return None
        if (peer := self._peers.get(record.gateway)) is not None:
            return await self._uploads.pass_on(peer, upload)
        # A row that waits has no worker: who was offered it may have accepted it, and the row does not say so yet.
        if record.state == "running" or (record.state == "queued" and not record.worker):
            raise not_reached()
        return None

    def _workers_elsewhere(self) -> Iterator[Worker]:
        for fleet in self._fleets.values():
            yield from fleet.values()

    def _tell_of(self, worker: Worker) -> None:
        """Something of a worker of ours has changed that others go by when they place jobs.

        They are told at once, and of what follows with the next turn of `_tell_of_workers`.
        """
        if worker.id in self._told_lately:
            self._untold[worker.id] = worker
            return
        self._told_lately.add(worker.id)
        assert self._attempts is not None
        fleet = self._attempts.fleet
        if fleet.workers.get(worker.id) is worker:
            frame = frames.FleetFrame((told_of_one(fleet, worker, anyio.current_time()),), first=False)
            for peer in self._peers.values():
                if peer.connected:  # who connects later is told of all first, and this would be old by then
                    peer.push(frame, urgent=True)

    def _tell(self, frame: frames.Frame, *, urgent: bool = False) -> None:
        for peer in self._peers.values():
            peer.push(frame, urgent=urgent)

    # ---- what others tell ----------------------------------------------------------------------------------

    def take(self, sender: str, told: Sequence[frames.AnyFrame]) -> None:
        """Act on the frames of one message."""
        for frame in told:
            match frame:
                case frames.StartedFrame():
                    self._local.publish(frame.job, JobStarted())
                case frames.ChunkFrame():
                    self._local.publish(frame.job, JobChunk(frame.seq, frame.data, time.monotonic()))
                case frames.ProgressFrame():
                    event = JobProgress(frame.n, frame.total, frame.phase, frame.text)
                    self._local.publish(frame.job, event)
                case frames.EndedFrame():
                    self._local.publish(frame.job, JobNudge(frame.chunks))
                case frames.WatchFrame():
                    self._follow(sender, frame)
                case _:
                    self._take_of_workers(sender, frame)

    def _take_of_workers(self, sender: str, frame: frames.AnyFrame) -> None:
        attempts = self._attempts
        assert attempts is not None
        fleet = attempts.fleet
        match frame:
            case frames.StopFrame():
                if held := fleet.holder((frame.job, frame.attempt)):
                    attempts.abandon(*held, frame.reason)
            case frames.JoinedFrame():
                if stale := fleet.workers.get(frame.worker):
                    stale.port.close("", "")  # 1001: if it is not so dead after all, it comes again
            case frames.FleetFrame():
                known = {} if frame.first else self._fleets.get(sender, {})
                before = self._fleets.get(sender, {})
                for one in frame.workers:
                    name = one.view.id
                    known[name] = remote_worker(one, self._port(sender, name), before.get(name))
                self._fleets[sender] = known
            case frames.OrderFrame(worker=name) if name == ITSELF:
                if found := answer(frame, attempts.kept):
                    self._answer(sender, found)
            case frames.AnswerFrame(worker=name) if name == ITSELF:
                self._inquiry.answered(sender, frame)
            case frames.OrderFrame():
                if worker := fleet.workers.get(frame.worker):
                    deliver(worker, frame, lambda answer: self._answer(sender, answer))
            case frames.AnswerFrame():
                self._answered(sender, frame)
            case _:
                raise AssertionError(frame)

    def left(self, sender: str) -> None:
        """A connection of another replica's has ended; with its last one, what it told is void."""
        self._inbound[sender] -= 1
        if self._inbound[sender] <= 0:
            del self._inbound[sender]
            self._fleets.pop(sender, None)
            self._followed.pop(sender, None)
            for job in [job for job, names in self._followers.items() if sender in names]:
                self._unfollow(sender, job)

    async def take_upload(self, request: Request, worker: str, job: str) -> Response:
        """An upload that another replica passes on: judged by the sessions that are here."""
        if self.uploaded is None:
            raise refuse("conflict", "No studio worker is connected here.", "jobId")
        return await self.uploaded(request, worker, job)

    def came(self, sender: str) -> None:
        """Another replica has connected."""
        self._inbound[sender] += 1

    def _follow(self, sender: str, frame: frames.WatchFrame) -> None:
        if not frame.on:
            self._unfollow(sender, frame.job)
        elif sender not in self._followers.get(frame.job, ()) and self._followed[sender] < MAX_FOLLOWED:
            self._followers[frame.job].add(sender)
            self._followed[sender] += 1

    def _unfollow(self, sender: str, job: str) -> None:
        names = self._followers.get(job, set())
        if sender in names:
            names.discard(sender)
            self._followed[sender] -= 1
        if not names:
            self._followers.pop(job, None)

    def _port(self, replica: str, worker: str) -> RemotePort:
        return RemotePort(worker, lambda frame: self._order(replica, frame))

    def _order(self, replica: str, frame: frames.OrderFrame) -> bool:
        peer = self._peers.get(replica)
        return peer is not None and peer.connected and peer.push(frame, urgent=True)

    def _answer(self, replica: str, frame: frames.AnswerFrame) -> None:
        if peer := self._peers.get(replica):
            peer.push(frame, urgent=True)

    def _answered(self, sender: str, frame: frames.AnswerFrame) -> None:
        worker = self._fleets.get(sender, {}).get(frame.worker)
        done = order_done(frame.message)
        if worker is not None and done is not None and (waits := worker.orders.pop(done.id, None)):
            waits(done)

    # ---- loops ---------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Keep the door open and the connections up until cancelled."""
        try:
            await self._run()
        finally:
            # A TLS connection that is cut while it is being made is closed in later turns of the event loop; uvloop
            # cannot be closed before (EBUSY).
            with anyio.CancelScope(shield=True):
                await anyio.sleep(CLOSING_S)
                for peer in self._peers.values():
                    peer.cut()
                await anyio.sleep(CLOSING_S)

    async def _run(self) -> None:
        app = door(self.name, self._doorway.secret, self)
        async with anyio.create_task_group() as group:
            group.start_soon(serve, app, self._doorway.listener, self._doorway.certificate)
            group.start_soon(self._tell_of_workers)
            while True:
                try:
                    self._meet(await run_sync(self._directory.peers), group)
                    await self._find_ends()
                except (StoreError, FaultError) as error:
                    log.warning("The other replicas are not looked for while the store is in trouble: %s", error)
                self._forget_who_left()
                await anyio.sleep(LOOK_S)

    def _meet(self, found: Sequence[tuple[str, str]], group: TaskGroup) -> None:
        """Connect to who is new, let go of who is gone."""
        urls = {name: url for name, url in found if url != self._doorway.url}
        if len(urls) < len(found):
            log.debug("A replica advertises this replica's own URL: an earlier life of this one, or a mistake")
        for name, peer in list(self._peers.items()):
            if urls.get(name) != peer.url:
                peer.scope.cancel()
                peer.cut()  # who is gone takes no leave, and nobody would drop the connection later
                del self._peers[name]
                self._dropped += peer.dropped
                log.info("Replica %s is gone", name)
        for name, url in urls.items():
            if name not in self._peers:
                self._peers[name] = peer = Peer(name, url, self._caller, self._first)
                group.start_soon(peer.run)

    async def _find_ends(self) -> None:
        """Repair ends that nobody told of: the database knows them."""
        if topics := self._local.topics():
            for job in await run_sync(self._directory.ended_of, topics):
                self._local.publish(job, JobNudge())

    def _forget_who_left(self) -> None:
        for job in [job for job in self._following if not self._local.watched(job)]:
            del self._following[job]
            self._tell(frames.WatchFrame(job, False))

    async def _tell_of_workers(self) -> None:
        told: object = None
        again_at = 0.0
        while True:
            assert self._attempts is not None
            workers = list(self._attempts.fleet.workers.values())
            now = anyio.current_time()
            news = [(one.id, id(one), id(one.capabilities), one.draining) for one in workers]
            if news != told or now >= again_at:
                told, again_at = news, now + FLEET_AGAIN_S
                for frame in self._fleet_frames():
                    self._tell(frame)
            with anyio.move_on_after(FLEET_S):
                await self._fleet_news.wait()
            self._fleet_news = anyio.Event()
            untold, self._untold, self._told_lately = self._untold, {}, set()
            for worker in untold.values():
                self._tell_of(worker)

    def _fleet_frames(self) -> list[frames.FleetFrame]:
        assert self._attempts is not None
        all_of_them = told_of(self._attempts.fleet, anyio.current_time())
        lots = [all_of_them[at : at + WORKERS_PER_FRAME] for at in range(0, len(all_of_them), WORKERS_PER_FRAME)]
        return [frames.FleetFrame(tuple(lot), first=n == 0) for n, lot in enumerate(lots or [[]])]

    def _first(self) -> Iterable[frames.Frame]:
        """What a replica is told first on every new connection."""
        yield from self._fleet_frames()
        for job in self._following:
            yield frames.WatchFrame(job, True)


def _frame(job: str, event: JobEvent, attempt: int) -> frames.Frame | None:
    match event:
        case JobChunk():
            return frames.ChunkFrame(job, attempt, event.seq, event.data)
        case JobStarted():
            return frames.StartedFrame(job, attempt)
        case JobProgress():
            return frames.ProgressFrame(job, attempt, event.n, event.total, event.phase, event.text)
        case JobEnded():
            return frames.EndedFrame(job, event.chunks)
    return None
