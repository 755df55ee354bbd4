"""Registration requests of workers: asked for by anybody, decided by an admin, kept beside the keys.

    pending ──approve──► approved ──reject──► rejected
       └───────reject───────────────────────────▲

A worker proves that a request is its own with a secret of which only the hash is here. Each poll of an approved request
makes a new token and ends the one before; of tokens, too, only hashes are kept. A studio worker gets an id and a token
of the studio contract; a native one keeps its own id, and its token is a key of scope worker that admits no other.

`coordinator registrations …` works beside a running server, which sees a decision at the worker's next poll, and a
revocation within a second.
"""

from __future__ import annotations

import hmac
import secrets
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec

from coordinator.keys import (
    DEFAULT_TENANT,
    PREFIX_CHARS,
    THE_PROGRAM,
    Key,
    digest,
    end_key,
    store_key,
    unique_secret,
)
from coordinator.register import Register, Turn
from coordinator.register.known import Known
from coordinator.store.rows import Row
from protocol.faults import FaultError
from protocol.ids import RANDOM_BYTES, new_id

State = Literal["pending", "approved", "rejected"]
Protocol = Literal["studio", "native"]
STATES: tuple[State, ...] = ("pending", "approved", "rejected")
MAX_PENDING = 1000
# Workers poll every 30 s. A request that was not polled for so long may be taken over by the same installation with
# another secret (it lost the first), and has to make room when there are too many.
SILENT_MS = 5 * 60_000
OLD_MS = 30 * 86_400_000
MAX_REASON_CHARS = 500


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
        protocol: what it speaks; a native worker's `install` is its id.
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
    protocol: Protocol = "studio"
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
    """The requests of one coordinator, or of all its replicas.

    Methods block, but for `admits_now` and `knows`. They raise StoreError and FaultError when the register is in
    trouble.
    """

    def __init__(self, place: Known | Register | Path, now_ms: Callable[[], int] | None = None) -> None:
        """Open the register, or its file, where that has not been done. Raises StoreError."""
        self._known = Known.of(place)
        self._register = self._known.register
        self._clock = now_ms

    def close(self) -> None:
        """Close the register."""
        self._register.close()

    def _now_ms(self, turn: Turn) -> int:
        return turn.now_ms if self._clock is None else self._clock()

    # ---- for workers ---------------------------------------------------------------------------------------

    def request(
        self,
        install: str,
        address: str,
        secret_hash: bytes,
        agent: str,
        capabilities: Any,
        protocol: Protocol = "studio",
    ) -> tuple[str, bool]:
        """Ask to be admitted; returns the request's id, and whether it is new.

        The same installation at the same address gets the request that it has pending. With another secret it takes
        that over only when the first was silent for `SILENT_MS`: nobody may slip under a request that is about to be
        approved for somebody else.

        Raises:
            TooManyPending.
        """
        known = msgspec.json.encode(capabilities)

        def ask(turn: Turn) -> tuple[str, bool]:
            now = self._now_ms(turn)
            row = turn.one(
                "SELECT id, secret, seen_ms FROM registrations "
                "WHERE install = :install AND address = :address AND state = 'pending' AND protocol = :protocol",
                protocol=protocol,
                install=install,
                address=address,
            )
            if row is not None:
                same = hmac.compare_digest(bytes(row["secret"]), secret_hash)
                if same or row["seen_ms"] < now - SILENT_MS:
                    turn.all(
                        "UPDATE registrations SET secret = :secret, agent = :agent, capabilities = :known, "
                        "seen_ms = :now WHERE id = :id RETURNING id",
                        secret=secret_hash,
                        agent=agent,
                        known=known,
                        now=now,
                        id=row["id"],
                    )
                return str(row["id"]), False
            _make_room(turn, now)
            request = f"rr-{new_id('reg', now, secrets.token_bytes(RANDOM_BYTES))}"
            turn.all(
                "INSERT INTO registrations "
                "(id, install, address, secret, agent, capabilities, created_ms, seen_ms, protocol) "
                "VALUES (:id, :install, :address, :secret, :agent, :known, :now, :now, :protocol) RETURNING id",
                protocol=protocol,
                id=request,
                install=install,
                address=address,
                secret=secret_hash,
                agent=agent,
                known=known,
                now=now,
            )
            return request, True

        return self._register.write(ask)

    def poll(self, request: str, secret: str) -> Polled | None:
        """How a request stands; None when there is none of this id and secret.

        An approved one gets a new token, and its last one is good no more.
        """
        if _own(self._register.read(_OWN, id=request), secret) is None:
            return None  # strangers take no lock: they may ask as often as they like

        def look(turn: Turn) -> Polled | None:
            now = self._now_ms(turn)
            if (row := _own(turn.all(_OWN, id=request), secret)) is None:
                return None
            turn.all("UPDATE registrations SET seen_ms = :now WHERE id = :id RETURNING id", now=now, id=request)
            if row["state"] != "approved":
                return Polled(row["state"], reason=row["reason"])
            token = _token(turn, row)
            turn.all(
                "UPDATE registrations SET token = :token, changed = :change WHERE id = :id RETURNING id",
                token=digest(token),
                change=turn.change,
                id=request,
            )
            return Polled("approved", worker=row["worker"], token=token)

        return self._register.write(look)

    def admits(self, worker: str, token: str) -> bool:
        """Whether this is the worker's token of now; blocks while the register is read."""
        self._known.refresh()
        return self._matches(worker, token)

    async def admits_now(self, worker: str, token: str) -> bool:
        """`admits` for the event loop, which it never blocks.

        A token may have been given out, or replaced, a moment ago at another replica, so the register is asked; while
        it is away, what is known has to do.

        Raises:
            FaultError: overloaded: it is away, and the token is not the one that is known.
        """
        try:
            await self._known.fresh()
        except FaultError:
            if not self._matches(worker, token):
                raise
            self._known.check_age()
        return self._matches(worker, token)

    def _matches(self, worker: str, token: str) -> bool:
        kept = self._known.tokens.get(worker) or secrets.token_bytes(32)
        return hmac.compare_digest(kept, digest(token))

    def knows(self, worker: str) -> bool:
        """Whether the worker is still approved, as far as is known here."""
        return worker in self._known.tokens

    # ---- for admins ----------------------------------------------------------------------------------------

    def list(self, state: str | None = None) -> Iterator[Registration]:
        """All requests, or those in one state, oldest first."""
        where = "WHERE state = :state" if state else "WHERE state <> :state"
        rows = self._register.read(f"SELECT * FROM registrations {where} ORDER BY created_ms, id", state=state or "")
        return iter([_registration(row) for row in rows])

    def approve(self, request: str, secret_begins: str = "", *, by: str = THE_PROGRAM) -> Registration:
        """Admit a worker; it learns so at its next poll. A second time changes nothing.

        Args:
            request: its id.
            secret_begins: when given, approve only while the secret's hash begins so.
            by: who does it, for the log.

        Raises:
            NoRegistration: unknown.
            RegistrationRefusal: rejected before, or another secret.
        """

        def admit(turn: Turn) -> Registration:
            now, row = self._now_ms(turn), _found(turn, request)
            if row["state"] == "rejected":
                raise RegistrationRefusal(f"{request} was rejected; let the worker ask again.")
            if not bytes(row["secret"]).hex().startswith(secret_begins):
                raise RegistrationRefusal(f"The secret behind {request} is another one; look at the list again.")
            if row["state"] == "pending":
                native = row["protocol"] == "native"
                worker = row["install"] if native else new_id("studio", now, secrets.token_bytes(RANDOM_BYTES))
                if native:
                    _replace(turn, worker)
                turn.all(
                    "UPDATE registrations SET state = 'approved', worker = :worker, decided_ms = :now, "
                    "changed = :change WHERE id = :id RETURNING id",
                    worker=worker,
                    now=now,
                    change=turn.change,
                    id=request,
                )
                turn.act(by, f"admitted {request} as the worker {worker}")
            return _registration(_found(turn, request))

        approved = self._register.write(admit)
        self._known.refresh()
        return approved

    def reject(self, request: str, reason: str = "", *, by: str = THE_PROGRAM) -> Registration:
        """Refuse a worker, or put one out that was approved: its token is good no more, its session ends.

        Raises:
            NoRegistration: unknown.
        """

        def refuse(turn: Turn) -> Registration:
            _end_token(turn, _found(turn, request))
            turn.all(
                "UPDATE registrations SET state = 'rejected', reason = :reason, token = NULL, decided_ms = :now, "
                "changed = :change WHERE id = :id RETURNING id",
                reason=reason[:MAX_REASON_CHARS],
                now=self._now_ms(turn),
                change=turn.change,
                id=request,
            )
            turn.act(by, f"rejected {request}")
            return _registration(_found(turn, request))

        rejected = self._register.write(refuse)
        self._known.refresh()
        return rejected


_OWN = "SELECT id, secret, state, reason, worker, token, protocol FROM registrations WHERE id = :id"


def _own(rows: Sequence[Row], secret: str) -> Row | None:
    """The row, when this is its secret."""
    return rows[0] if rows and hmac.compare_digest(bytes(rows[0]["secret"]), digest(secret)) else None


def _token(turn: Turn, row: Row) -> str:
    """A new token for an approved worker; the one before ends."""
    if row["protocol"] == "studio":
        return f"bhs_{secrets.token_urlsafe(32)}"
    _end_token(turn, row)
    secret, worker = unique_secret(turn, "worker"), row["worker"]
    store_key(turn, secret, Key(prefix="", scope="worker", tenant=DEFAULT_TENANT, name=worker, worker=worker), "[]")
    turn.act(f"registration {row['id']}", f"made the key {secret[:PREFIX_CHARS]} (worker {worker!r})")
    return secret


def _end_token(turn: Turn, row: Row) -> None:
    """A native worker's token is a key, which has to be revoked."""
    if row["protocol"] == "native" and row["token"] is not None:
        end_key(turn, bytes(row["token"]))


def _replace(turn: Turn, worker: str) -> None:
    """A native worker was admitted before: what it asked for then is over."""
    for row in turn.all("SELECT * FROM registrations WHERE worker = :worker", worker=worker):
        _end_token(turn, row)
        turn.all(
            "UPDATE registrations SET state = 'rejected', reason = 'It asked again, and was admitted anew.', "
            "worker = NULL, token = NULL, changed = :change WHERE id = :id RETURNING id",
            change=turn.change,
            id=row["id"],
        )


def _found(turn: Turn, request: str) -> Row:
    row = turn.one("SELECT * FROM registrations WHERE id = :id", id=request)
    if row is None:
        raise NoRegistration(f"There is no registration {request[:100]!r}; list them to see their ids.")
    return row


def _make_room(turn: Turn, now: int) -> None:
    turn.all(
        "DELETE FROM registrations WHERE state <> 'approved' AND seen_ms < :old RETURNING id",
        old=now - OLD_MS,
    )
    if _pending(turn) >= MAX_PENDING:
        turn.all(
            "DELETE FROM registrations WHERE state = 'pending' AND seen_ms < :silent RETURNING id",
            silent=now - SILENT_MS,
        )
        if _pending(turn) >= MAX_PENDING:
            raise TooManyPending(f"{MAX_PENDING} requests wait for an admin already; try again later.")


def _pending(turn: Turn) -> int:
    row = turn.one("SELECT count(*) AS n FROM registrations WHERE state = 'pending'")
    assert row is not None
    return int(row["n"])


def _registration(row: Row) -> Registration:
    said = msgspec.json.decode(bytes(row["capabilities"]))
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
        protocol=row["protocol"],
        worker=row["worker"],
        reason=row["reason"],
        decided_ms=row["decided_ms"],
    )
