"""Registration requests of studio workers: asked for by anybody, decided by an admin, kept beside the keys.

    pending ──approve──► approved ──reject──► rejected
       └───────reject───────────────────────────▲

A worker proves that a request is its own with a secret of which only the hash is here. Each poll of an approved request
makes a new token and ends the one before; of tokens, too, only hashes are kept. `coordinator registrations …` works
beside a running server, which sees a decision at the worker's next poll, and a revocation at its next sweep.
"""

from __future__ import annotations

import contextlib
import hmac
import secrets
import sqlite3
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import msgspec

from coordinator.keys import digest, make_private
from protocol.ids import RANDOM_BYTES, new_id

State = Literal["pending", "approved", "rejected"]
STATES: tuple[State, ...] = ("pending", "approved", "rejected")
MAX_PENDING = 1000
# Workers poll every 30 s. A request that was not polled for so long may be taken over by the same installation with
# another secret (it lost the first), and has to make room when there are too many.
SILENT_MS = 5 * 60_000
OLD_MS = 30 * 86_400_000
MAX_REASON_CHARS = 500

_MIGRATIONS: tuple[tuple[str, ...], ...] = (
    (
        """
        CREATE TABLE registrations (
            id TEXT PRIMARY KEY,
            install TEXT NOT NULL,
            address TEXT NOT NULL,
            secret BLOB NOT NULL,
            state TEXT NOT NULL DEFAULT 'pending' CHECK (state IN ('pending', 'approved', 'rejected')),
            reason TEXT NOT NULL DEFAULT '',
            worker TEXT,
            token BLOB,
            agent TEXT NOT NULL,
            capabilities BLOB NOT NULL,
            created_ms INTEGER NOT NULL,
            seen_ms INTEGER NOT NULL,
            decided_ms INTEGER
        ) WITHOUT ROWID
        """,
        "CREATE UNIQUE INDEX registrations_worker ON registrations (worker) WHERE worker IS NOT NULL",
        "CREATE UNIQUE INDEX registrations_pending ON registrations (install, address) WHERE state = 'pending'",
    ),
)


class RegistrationRefusal(Exception):
    """A decision that cannot be made; the message names the cure."""


class NoRegistration(RegistrationRefusal):
    """There is no such request."""


class TooManyPending(Exception):
    """No further request is taken until an admin has decided some."""


class Registration(msgspec.Struct, frozen=True, kw_only=True):
    """One request, without its secrets.

    Attributes:
        install, machine, user, agent: as the worker says.
        address: where the request came from.
        secret_begins: the first 8 digits of the secret's hash, to compare with what the worker shows.
        worker: the id that it got with its approval.
        reason: why it was rejected.
        models: what it says that it serves.
        created_ms, seen_ms, decided_ms: milliseconds since the epoch; seen is the last request or poll.
    """

    id: str
    state: State
    install: str
    address: str
    machine: str
    user: str
    agent: str
    secret_begins: str
    created_ms: int
    seen_ms: int
    models: list[str] = []
    worker: str | None = None
    reason: str = ""
    decided_ms: int | None = None


class Polled(msgspec.Struct, frozen=True):
    """What a worker learns by a poll; `worker` and `token` only when it is approved."""

    state: State
    worker: str = ""
    token: str = ""
    reason: str = ""


class Registrations:
    """The requests of one coordinator. All calls are short and synchronous (one indexed row)."""

    def __init__(self, path: Path, now_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000) -> None:
        """Open the file of the keys, and make our table in it. Raises sqlite3.Error, OSError."""
        make_private(path)
        self._now_ms = now_ms
        self._db = sqlite3.connect(path, isolation_level=None, timeout=5, check_same_thread=False)
        self._db.row_factory = sqlite3.Row
        self._db.execute("PRAGMA journal_mode=WAL")
        with self._transaction():
            version = int(self._db.execute("PRAGMA user_version").fetchone()[0])
            for number, statements in enumerate(_MIGRATIONS[version:], version + 1):
                for statement in statements:
                    self._db.execute(statement)
                self._db.execute(f"PRAGMA user_version = {number}")

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    # ---- for workers ---------------------------------------------------------------------------------------

    def request(
        self, install: str, address: str, secret_hash: bytes, agent: str, capabilities: Any
    ) -> tuple[str, bool]:
        """Ask to be admitted; returns the request's id, and whether it is new.

        The same installation at the same address gets the request that it has pending. With another secret it takes
        that over only when the first was silent for `SILENT_MS`: nobody may slip under a request that is about to be
        approved for somebody else.

        Raises:
            TooManyPending.
        """
        now = self._now_ms()
        known = msgspec.json.encode(capabilities)
        with self._transaction():
            row = self._one(
                "SELECT id, secret, seen_ms FROM registrations WHERE install = ? AND address = ? AND state = 'pending'",
                install,
                address,
            )
            if row is not None:
                same = hmac.compare_digest(bytes(row["secret"]), secret_hash)
                if same or row["seen_ms"] < now - SILENT_MS:
                    self._db.execute(
                        "UPDATE registrations SET secret = ?, agent = ?, capabilities = ?, seen_ms = ? WHERE id = ?",
                        (secret_hash, agent, known, now, row["id"]),
                    )
                return str(row["id"]), False
            self._make_room(now)
            request = f"rr-{new_id('reg', now, secrets.token_bytes(RANDOM_BYTES))}"
            self._db.execute(
                "INSERT INTO registrations (id, install, address, secret, agent, capabilities, created_ms, seen_ms) "
                "VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                (request, install, address, secret_hash, agent, known, now, now),
            )
            return request, True

    def poll(self, request: str, secret: str) -> Polled | None:
        """How a request stands; None when there is none of this id and secret.

        An approved one gets a new token, and its last one is good no more.
        """
        token = f"bhs_{secrets.token_urlsafe(32)}"
        now = self._now_ms()
        if self._own(request, secret) is None:
            return None  # strangers take no lock: they may ask as often as they like
        with self._transaction():
            if (row := self._own(request, secret)) is None:
                return None
            if row["state"] != "approved":
                self._db.execute("UPDATE registrations SET seen_ms = ? WHERE id = ?", (now, request))
                return Polled(row["state"], reason=row["reason"])
            self._db.execute(
                "UPDATE registrations SET seen_ms = ?, token = ? WHERE id = ?", (now, digest(token), request)
            )
            return Polled("approved", worker=row["worker"], token=token)

    def _own(self, request: str, secret: str) -> sqlite3.Row | None:
        row = self._one("SELECT secret, state, reason, worker FROM registrations WHERE id = ?", request)
        return row if row is not None and hmac.compare_digest(bytes(row["secret"]), digest(secret)) else None

    def admits(self, worker: str, token: str) -> bool:
        """Whether this is the worker's token of now."""
        row = self._one("SELECT token FROM registrations WHERE worker = ? AND state = 'approved'", worker)
        kept = bytes(row["token"]) if row is not None and row["token"] is not None else secrets.token_bytes(32)
        return hmac.compare_digest(kept, digest(token))

    def knows(self, worker: str) -> bool:
        """Whether the worker is still approved."""
        return self._one("SELECT 1 FROM registrations WHERE worker = ? AND state = 'approved'", worker) is not None

    def _make_room(self, now: int) -> None:
        self._db.execute("DELETE FROM registrations WHERE state <> 'approved' AND seen_ms < ?", (now - OLD_MS,))
        if self._pending() >= MAX_PENDING:
            self._db.execute("DELETE FROM registrations WHERE state = 'pending' AND seen_ms < ?", (now - SILENT_MS,))
            if self._pending() >= MAX_PENDING:
                raise TooManyPending(f"{MAX_PENDING} requests wait for an admin already; try again later.")

    def _pending(self) -> int:
        row = self._one("SELECT count(*) AS n FROM registrations WHERE state = 'pending'")
        assert row is not None
        return int(row["n"])

    # ---- for admins ----------------------------------------------------------------------------------------

    def list(self, state: str | None = None) -> Iterator[Registration]:
        """All requests, or those in one state, oldest first."""
        where, values = ("WHERE state = ?", (state,)) if state else ("", ())
        for row in self._db.execute(f"SELECT * FROM registrations {where} ORDER BY created_ms, id", values).fetchall():
            yield _registration(row)

    def approve(self, request: str, secret_begins: str = "") -> Registration:
        """Admit a worker; it learns so at its next poll. A second time changes nothing.

        Args:
            request: its id.
            secret_begins: when given, approve only while the secret's hash begins so.

        Raises:
            NoRegistration: unknown.
            RegistrationRefusal: rejected before, or another secret.
        """
        now = self._now_ms()
        with self._transaction():
            row = self._found(request)
            if row["state"] == "rejected":
                raise RegistrationRefusal(f"{request} was rejected; let the worker ask again.")
            if not bytes(row["secret"]).hex().startswith(secret_begins):
                raise RegistrationRefusal(f"The secret behind {request} is another one; look at the list again.")
            if row["state"] == "pending":
                worker = new_id("studio", now, secrets.token_bytes(RANDOM_BYTES))
                self._db.execute(
                    "UPDATE registrations SET state = 'approved', worker = ?, decided_ms = ? WHERE id = ?",
                    (worker, now, request),
                )
            return _registration(self._found(request))

    def reject(self, request: str, reason: str = "") -> Registration:
        """Refuse a worker, or put one out that was approved: its token is good no more, its session ends.

        Raises:
            NoRegistration: unknown.
        """
        with self._transaction():
            self._found(request)
            self._db.execute(
                "UPDATE registrations SET state = 'rejected', reason = ?, token = NULL, decided_ms = ? WHERE id = ?",
                (reason[:MAX_REASON_CHARS], self._now_ms(), request),
            )
            return _registration(self._found(request))

    def _found(self, request: str) -> sqlite3.Row:
        row = self._one("SELECT * FROM registrations WHERE id = ?", request)
        if row is None:
            raise NoRegistration(f"There is no registration {request[:100]!r}; list them to see their ids.")
        return row

    # ---- inside --------------------------------------------------------------------------------------------

    def _one(self, sql: str, *values: Any) -> sqlite3.Row | None:
        row: sqlite3.Row | None = self._db.execute(sql, values).fetchone()
        return row

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")


def _registration(row: sqlite3.Row) -> Registration:
    said = msgspec.json.decode(row["capabilities"])
    return Registration(
        id=row["id"],
        state=row["state"],
        install=row["install"],
        address=row["address"],
        machine=said["machine"],
        user=said["user"],
        agent=row["agent"],
        secret_begins=bytes(row["secret"]).hex()[:8],
        created_ms=row["created_ms"],
        seen_ms=row["seen_ms"],
        models=said["models"],
        worker=row["worker"],
        reason=row["reason"],
        decided_ms=row["decided_ms"],
    )
