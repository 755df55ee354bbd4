"""What every request asks of the register, kept in memory: live keys, tenants, tokens of studio workers.

A coordinator looks every `POLL_S` whether somebody has changed something, and reads only that. So a key is found
without a question to the database, and a revocation takes effect everywhere within a second, whoever made it: this
process, the command beside it, or another replica. A secret that is not known is looked for in the database before it
is refused; however many come at once, they share one question.

While the database is away, what is known stays good for `STALE_S`; after that, and for secrets that are not known,
callers are told to come again (503).
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path

import anyio
import msgspec
from anyio.to_thread import run_sync

from coordinator.register.base import Register
from coordinator.register.opening import opened
from coordinator.store.base import StoreError
from coordinator.store.rows import Row
from protocol.faults import FaultError, refuse

log = logging.getLogger(__name__)
audit = logging.getLogger("coordinator.audit")

POLL_S = 0.4
CACHE_S = 1.0  # how old the picture may be where nobody polls
STALE_S = 300.0
ANSWER_S = 5.0  # a database that says nothing for so long is away
REPLICAS_S = 5.0
_COLUMNS = "prefix, scope, tenant, name, worker, created_ms, revoked_ms, rpm, concurrent, models"


class Key(msgspec.Struct, frozen=True, kw_only=True):
    """One key, without its secret.

    Attributes:
        prefix: first characters of the secret; names the key for people, and is no other key's.
        scope: what it opens: client (OpenAI and job routes), worker (the gateway), admin (client and metrics).
        tenant: whose jobs it sees.
        worker: for worker keys: the only worker id it admits; "" admits any.
        rpm: requests per minute, 0 for no limit of its own; the tenant's holds beside it.
        concurrent: jobs that may be open at once, likewise.
        models: the only models that it may use; none means those of its tenant.
    """

    prefix: str
    scope: str
    tenant: str
    name: str = ""
    worker: str = ""
    created_ms: int = 0
    revoked_ms: int | None = None
    rpm: int = 0
    concurrent: int = 0
    models: tuple[str, ...] = ()


class Tenant(msgspec.Struct, frozen=True, kw_only=True):
    """Whose jobs: what the keys of one tenant share. One that nobody has set has these defaults.

    Attributes:
        weight: its share of the workers when several tenants wait, relative to the others.
        store_content: False: prompts and outputs are purged once a result is delivered.
        models: the only models that it may use; none means all.
        rpm, concurrent: limits of all its keys together, 0 for none.
    """

    name: str
    weight: float = 1.0
    store_content: bool = True
    models: tuple[str, ...] = ()
    rpm: int = 0
    concurrent: int = 0


class Known:
    """See the module. `refresh` blocks and may be called from any thread; the rest belongs to the event loop.

    Attributes:
        register: where it comes from.
        keys: live keys by the hash of their secret.
        prefixes: all keys by their prefix, revoked ones included.
        tenants: those that somebody has set.
        tokens: hashes of the tokens of admitted studio workers, by worker; None: admitted, without a token yet.
        replicas: how many coordinators share the register.
        watched: `watch` runs, so nothing here is older than a moment, as long as the database is there.
        clock: seconds that only go on; ages are told by it.
        on_change: called on the event loop when something may have changed.
    """

    def __init__(self, register: Register) -> None:
        self.register = register
        self.keys: dict[bytes, Key] = {}
        self.prefixes: dict[str, Key] = {}
        self.tenants: dict[str, Tenant] = {}
        self.tokens: dict[str, bytes | None] = {}
        self.replicas = 1
        self.on_change: list[Callable[[], None]] = []
        self._number = 0
        self._told = 0
        self._read_at = float("-inf")
        self._reading = threading.Lock()
        self._turn = anyio.Lock()
        self._thread = anyio.CapacityLimiter(1)  # one that hangs keeps its place: the next does not hang beside it
        self._begun = 0
        self._failure: Exception | None = None
        self.watched = False
        self.clock: Callable[[], float] = time.monotonic
        self._away = False

    @classmethod
    def of(cls, place: Known | Register | Path) -> Known:
        """This one, or one over the register or its file."""
        return place if isinstance(place, Known) else cls(opened(place))

    def tenant(self, name: str) -> Tenant:
        """The tenant as somebody has set it, or by its defaults."""
        return self.tenants.get(name) or Tenant(name=name)

    def old(self) -> bool:
        """Whether the picture must be refreshed before it is used."""
        return not self.watched and self.clock() - self._read_at >= CACHE_S

    def check_age(self) -> None:
        """Raise FaultError(overloaded) when the database was away for so long that nothing is sure any more."""
        if self.clock() - self._read_at >= STALE_S:
            raise _away()

    # ---- reading -------------------------------------------------------------------------------------------

    def refresh(self) -> None:
        """Read what has changed. Raises StoreError, FaultError."""
        with self._reading:
            number = int(self.register.read("SELECT number FROM changes WHERE one = 1")[0]["number"])
            began = self.clock()
            if number < self._number:  # the file was put back from a backup
                self.keys, self.prefixes, self.tenants, self.tokens = {}, {}, {}, {}
                self._number = 0
            if number != self._number:
                self._read_changes(self._number)
                self._number = number
            self._read_at = began

    def _read_changes(self, since: int) -> None:
        # Of the first read all rows are wanted; those that older versions wrote have the number 0.
        behind = since if since else -1
        read = self.register.read
        for row in read(f"SELECT hash, {_COLUMNS} FROM keys WHERE changed > :behind", behind=behind):
            hashed, key = bytes(row["hash"]), key_of(row)
            self.prefixes[key.prefix] = key
            if key.revoked_ms is None:
                self.keys[hashed] = key
            else:
                self.keys.pop(hashed, None)
        for row in read("SELECT * FROM tenants WHERE changed > :behind", behind=behind):
            tenant = tenant_of(row)
            self.tenants[tenant.name] = tenant
        for row in read(
            "SELECT worker, token, state FROM registrations "
            "WHERE worker IS NOT NULL AND protocol = 'studio' AND changed > :behind",
            behind=behind,
        ):
            if row["state"] == "approved":
                self.tokens[row["worker"]] = None if row["token"] is None else bytes(row["token"])
            else:
                self.tokens.pop(row["worker"], None)
        if since:
            for row in read("SELECT who, what FROM acts WHERE number > :since ORDER BY number", since=since):
                audit.info("%s: %s", row["who"], row["what"])

    async def fresh(self) -> None:
        """Refresh, beginning after this call; those that come meanwhile share the next one.

        Raises:
            FaultError: overloaded: the database is away.

        Cancellation: the reading goes on in its thread.
        """
        mark = self._begun
        async with self._turn:
            if self._begun == mark:
                self._begun += 1
                self._failure = None
                try:
                    with anyio.fail_after(ANSWER_S):
                        await run_sync(self.refresh, limiter=self._thread, abandon_on_cancel=True)
                except (StoreError, FaultError, TimeoutError) as error:
                    self._failure = error
            failure = self._failure
        if failure is not None:
            log.debug("The register cannot be read: %s", failure)
            raise _away() from failure
        self.tell()

    async def _count(self) -> int:
        with anyio.move_on_after(ANSWER_S):
            return await run_sync(self.register.replicas, limiter=self._thread, abandon_on_cancel=True)
        return self.replicas

    def tell(self) -> None:
        """Tell those who care when something has changed since they were told."""
        if self._told != self._number:
            self._told = self._number
            for call in self.on_change:
                call()

    async def watch(self) -> None:
        """Keep the picture fresh until cancelled."""
        self.watched, counted = True, float("-inf")
        try:
            while True:
                try:
                    await self.fresh()
                    if time.monotonic() - counted >= REPLICAS_S:
                        self.replicas = await self._count()
                        counted = time.monotonic()
                    if self._away:
                        log.info("The register of keys can be read again")
                    self._away = False
                except (StoreError, FaultError) as error:
                    if not self._away:
                        log.warning("The register of keys cannot be read; known keys stay good for a while: %s", error)
                    self._away = True
                await anyio.sleep(POLL_S)
        finally:
            self.watched = False


def key_of(row: Row) -> Key:
    """The key of a row of `keys`."""
    return Key(
        prefix=row["prefix"],
        scope=row["scope"],
        tenant=row["tenant"],
        name=row["name"],
        worker=row["worker"],
        created_ms=int(row["created_ms"]),
        revoked_ms=row["revoked_ms"],
        rpm=int(row["rpm"]),
        concurrent=int(row["concurrent"]),
        models=msgspec.json.decode(row["models"], type=tuple[str, ...]),
    )


def tenant_of(row: Row) -> Tenant:
    """The tenant of a row of `tenants`."""
    return Tenant(
        name=row["name"],
        weight=float(row["weight"]),
        store_content=bool(row["store_content"]),
        models=msgspec.json.decode(row["models"], type=tuple[str, ...]),
        rpm=int(row["rpm"]),
        concurrent=int(row["concurrent"]),
    )


def _away() -> FaultError:
    return refuse("overloaded", "The coordinator cannot read its keys now; try again.", retry_after_s=2)
