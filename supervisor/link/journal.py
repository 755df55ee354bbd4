"""The ledger on disk: what was claimed, and what became of it, until the coordinator has acknowledged it.

A claim is written down before anything is started for it, its end before anybody is told of it, and both go when the
coordinator has the end. So after a kill or a power cut, what is here is what the coordinator may still wait for: an
end, which is told again, or nothing, which is told as a failure of ours.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import msgspec

from protocol import link_wire as wire
from protocol.engine_wire import OutputFile
from protocol.faults import Fault
from supervisor.store import Connection, Store

_SQL_CLAIM = "INSERT OR REPLACE INTO claims (job, attempt, offer, taken_ms) VALUES (?, ?, ?, ?)"
_SQL_DONE = "UPDATE claims SET done = ?, bytes = ? WHERE job = ? AND attempt = ?"
_SQL_FAULT = "UPDATE claims SET fault = ?, streamed = ?, done = NULL, bytes = 0 WHERE job = ? AND attempt = ?"
_SQL_FORGET = "DELETE FROM claims WHERE job = ? AND attempt = ?"
_SQL_ALL = (
    "SELECT job, attempt, offer, streamed, done, fault, bytes FROM claims "
    "WHERE job != '' ORDER BY taken_ms, job, attempt"
)

_NOTHING = msgspec.Raw(b"\x80")


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """What a job brought, as it waits in the outbox. `body` is the result struct in msgpack."""

    body: bytes
    files: tuple[OutputFile, ...] = ()
    usage: dict[str, float] = {}


class Kept(msgspec.Struct, frozen=True, kw_only=True):
    """A claim of an earlier life.

    Attributes:
        streamed: pieces of its answer had gone out when it failed.
        result: it was done; its files lie in the outbox.
        fault: it had failed. With neither it was under way when that life ended.
        bytes: what it takes of the outbox.
    """

    job: str
    attempt: int
    offer: wire.Offer
    streamed: bool = False
    result: Result | None = None
    fault: Fault | None = None
    bytes: int = 0


class Journal:
    """See the module. Every call returns when what it says is durable.

    Raises:
        StoreProblem: from every call: it is not.
    """

    def __init__(self, store: Store, now_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000) -> None:
        self._store, self._now_ms = store, now_ms

    async def claimed(self, job: str, attempt: int, offer: wire.Offer) -> None:
        """An offer was taken. What the client asked for is left out: nobody needs it after a restart."""
        plain = msgspec.structs.replace(offer, params=_NOTHING, inputs=())
        await self._do(_SQL_CLAIM, job, attempt, msgspec.msgpack.encode(plain), self._now_ms())

    async def done(self, job: str, attempt: int, result: Result, size: int) -> None:
        """It succeeded; its files, `size` bytes, are durable in the outbox."""
        await self._do(_SQL_DONE, msgspec.msgpack.encode(result), size, job, attempt)

    async def failed(self, job: str, attempt: int, fault: Fault, streamed: bool) -> None:
        """It failed."""
        await self._do(_SQL_FAULT, msgspec.msgpack.encode(fault), int(streamed), job, attempt)

    async def forget(self, job: str, attempt: int) -> None:
        """The coordinator has its end, or wants none."""
        await self._do(_SQL_FORGET, job, attempt)

    async def check(self) -> None:
        """Whether anything can be written."""
        await self._do("INSERT INTO claims (job, attempt, offer, taken_ms) VALUES ('', 0, zeroblob(4096), 0)")
        await self._do(_SQL_FORGET, "", 0)

    async def kept(self) -> list[Kept]:
        """Everything that is here, the oldest first. What cannot be read any more is forgotten.

        A newer version may have written it, and the coordinator then hears nothing of that attempt: not being named
        in `hello`, it is lost there at once.
        """
        return await self._store.write(_read)

    async def _do(self, sql: str, *values: object) -> None:
        def change(connection: Connection) -> None:
            connection.execute(sql, values)

        await self._store.write(change)


def _read(connection: Connection) -> list[Kept]:
    found = []
    for job, attempt, offer, streamed, done, fault, size in list(connection.execute(_SQL_ALL)):
        try:
            kept = Kept(
                job=job,
                attempt=attempt,
                offer=msgspec.msgpack.decode(offer, type=wire.Offer),
                streamed=bool(streamed),
                result=None if done is None else msgspec.msgpack.decode(done, type=Result),
                fault=None if fault is None else msgspec.msgpack.decode(fault, type=Fault),
                bytes=size,
            )
        except msgspec.MsgspecError:
            connection.execute(_SQL_FORGET, (job, attempt))
        else:
            found.append(kept)
    return found
