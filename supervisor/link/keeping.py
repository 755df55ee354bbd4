"""Where claims and results are kept until the coordinator has acknowledged them: on disk, or in memory.

Theory of operation. The order is the whole point, and it is here in one place:

    claimed    the row, then `accept`
    done       the files and their folder, then the row, then the upload, then `complete`
    failed     the row, then `fail`
    forgotten  the row, then the files

A disk that is full loses nothing: a claim that cannot be written is not taken, and a result that cannot be kept is
delivered from where the engine left it, which a crash in between would cost.
"""

from __future__ import annotations

import functools
import hashlib
import logging
from collections.abc import Awaitable, Callable
from typing import NamedTuple, Protocol

import msgspec
import trio

from protocol import link_wire as wire
from protocol.engine_wire import OutputFile
from protocol.faults import Fault, refuse
from supervisor.host.ground import Attempt
from supervisor.host.work import Done
from supervisor.link.journal import Journal, Kept, Result
from supervisor.link.outbox import Item, Outbox
from supervisor.store import Store, StoreProblem

log = logging.getLogger(__name__)

TRY_AGAIN_S = 5.0  # after a write that failed


class Parcel(NamedTuple):
    """What is to be delivered.

    Attributes:
        items: files to upload first.
        complete: what is said then.
        durable: it is on disk: delivery may take as long as it takes, this life or the next.
    """

    items: tuple[Item, ...]
    complete: wire.Complete
    durable: bool


class Keeping(Protocol):
    """See the module."""

    async def claimed(self, job: str, attempt: int, offer: wire.Offer) -> None:
        """Before an offer is accepted. Raises StoreProblem: it must not be."""

    async def done(self, job: str, attempt: int, done: Done, folders: Attempt) -> Parcel:
        """Before a result is delivered. Raises FaultError: it is not what the engine said."""

    async def failed(self, job: str, attempt: int, fault: Fault, streamed: bool) -> None:
        """Before a failure is told."""

    async def forget(self, job: str, attempt: int) -> None:
        """The coordinator has the end, or wants none."""


def parcel(body: bytes, items: tuple[Item, ...], usage: dict[str, float], durable: bool) -> Parcel:
    """The parcel of a result; a body above the inline limit has become a file of its own already."""
    files = tuple(file for file, _source in items if file.name != wire.RESULT_FILE)
    result = msgspec.Raw(body) if len(files) == len(items) else wire.NO_RESULT
    return Parcel(items, wire.Complete(result=result, files=files, usage=usage), durable)


def items_of(done: Done, folders: Attempt) -> tuple[Item, ...]:
    """The files of a result as the engine left them, and its body when that is too large to go inline.

    Raises:
        FaultError: engine_protocol.
    """
    items: list[Item] = []
    for file in done.files:
        if file.name == wire.RESULT_FILE:
            raise refuse("engine_protocol", f"The engine named an output {wire.RESULT_FILE!r}, which is ours.")
        items.append((file, functools.partial(folders.open_output, file)))
    if len(done.body) > wire.INLINE_BYTES:
        digest = hashlib.sha256(done.body).hexdigest()
        items.append((OutputFile(wire.RESULT_FILE, "application/msgpack", len(done.body), digest), done.body))
    return tuple(items)


class InMemory:
    """Nothing outlives the process."""

    async def claimed(self, _job: str, _attempt: int, _offer: wire.Offer) -> None:
        """See `Keeping`."""

    async def done(self, _job: str, _attempt: int, done: Done, folders: Attempt) -> Parcel:
        """See `Keeping`."""
        return parcel(done.body, items_of(done, folders), dict(done.usage), durable=False)

    async def failed(self, _job: str, _attempt: int, _fault: Fault, _streamed: bool) -> None:
        """See `Keeping`."""

    async def forget(self, _job: str, _attempt: int) -> None:
        """See `Keeping`."""


class OnDisk:
    """The journal and the outbox.

    Attributes:
        on_change: called when `reason` may say something else.
    """

    def __init__(self, store: Store, outbox: Outbox) -> None:
        self._store, self._outbox, self._journal = store, outbox, Journal(store)
        self._broken = ""
        self._hurt = trio.Event()
        self.on_change: Callable[[], None] = lambda: None

    def reason(self) -> str:
        """Why no more jobs can be taken; "" when they can."""
        return self._broken or self._outbox.reason()

    async def restore(self) -> list[tuple[Kept, Parcel | None]]:
        """What an earlier life left, the oldest first; with a parcel what has to be delivered.

        Raises:
            StoreProblem, OSError: the records or the outbox cannot be used.
        """
        found = await self._journal.kept()
        await self._outbox.sweep([(kept.job, kept.attempt) for kept in found if kept.result is not None])
        return [(kept, self._again(kept)) for kept in found]

    def _again(self, kept: Kept) -> Parcel | None:
        if kept.result is None:
            return None
        self._outbox.note(kept.job, kept.attempt, kept.bytes)
        return self._from_outbox(kept.job, kept.attempt, kept.result)

    def _from_outbox(self, job: str, attempt: int, result: Result) -> Parcel:
        def item(file: OutputFile) -> Item:
            return file, functools.partial(self._outbox.open, job, attempt, file.name)

        return parcel(result.body, tuple(map(item, result.files)), result.usage, durable=True)

    async def claimed(self, job: str, attempt: int, offer: wire.Offer) -> None:
        """See `Keeping`."""
        await self._tried(functools.partial(self._journal.claimed, job, attempt, offer))

    async def done(self, job: str, attempt: int, done: Done, folders: Attempt) -> Parcel:
        """See `Keeping`."""
        items = items_of(done, folders)
        try:
            size = await self._outbox.keep(job, attempt, items) if items else 0
            body = done.body if len(done.body) <= wire.INLINE_BYTES else b""
            result = Result(body=body, files=tuple(file for file, _ in items), usage=dict(done.usage))
            await self._tried(functools.partial(self._journal.done, job, attempt, result, size))
        except (OSError, StoreProblem) as problem:
            log.warning("the result is delivered without being kept first: %s", problem)
            await self._outbox.drop(job, attempt)
            return parcel(done.body, items, dict(done.usage), durable=False)
        self.on_change()
        return self._from_outbox(job, attempt, result)

    async def failed(self, job: str, attempt: int, fault: Fault, streamed: bool) -> None:
        """See `Keeping`."""
        try:
            await self._tried(functools.partial(self._journal.failed, job, attempt, fault, streamed))
        except StoreProblem as problem:
            log.warning("the failure is told without being kept first: %s", problem)
        await self._outbox.drop(job, attempt)

    async def forget(self, job: str, attempt: int) -> None:
        """See `Keeping`."""
        try:
            await self._tried(functools.partial(self._journal.forget, job, attempt))
        except StoreProblem:
            return  # told again in the next life, and acknowledged again; its files are needed until then
        await self._outbox.drop(job, attempt)
        self.on_change()

    async def _tried(self, write: Callable[[], Awaitable[None]]) -> None:
        try:
            await write()
        except StoreProblem as problem:
            self._broken = str(problem).rstrip(".")
            self._hurt.set()
            self.on_change()
            raise

    async def run(self) -> None:
        """After a write that failed, find out when writing works again. Runs until cancelled."""
        while True:
            await self._hurt.wait()
            self._hurt = trio.Event()
            while self._broken:
                await trio.sleep(TRY_AGAIN_S)
                try:
                    await self._journal.check()
                except StoreProblem as problem:
                    self._broken = str(problem).rstrip(".")
                else:
                    log.info("the worker's records can be written again")
                    self._broken = ""
                    self.on_change()
