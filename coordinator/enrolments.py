"""Enrolment tokens: each admits one worker, once, within its time; it is exchanged for a key of that worker's own."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import msgspec

from coordinator.keys import PREFIX_CHARS, THE_PROGRAM, Key, KeyRefusal, digest, new_secret, store_key, unique_secret
from coordinator.register import Register, Turn
from coordinator.register.known import Known
from coordinator.store.rows import Row
from protocol.faults import refuse
from protocol.ids import is_safe_id

SCOPE = "worker-enrol"
MAX_EXPIRES_S = 30 * 86_400
KEEP_MS = 30 * 86_400_000  # how long the list shows those that are over
MAX_OPEN = 10_000
_TOKEN = re.compile(r"bhe_[A-Za-z0-9_-]{43}\Z", re.ASCII)
_SELECT = "SELECT prefix, worker, created_ms, expires_ms, used_ms, used_by, revoked_ms FROM enrolments"


class Enrolment(msgspec.Struct, frozen=True, kw_only=True):
    """One token, without its secret.

    Attributes:
        worker: the id that the worker gets; "" lets it bring its own.
        used_by: prefix of the key that was made with it.
        created_ms, expires_ms, used_ms, revoked_ms: milliseconds since the epoch.
    """

    prefix: str
    worker: str
    created_ms: int
    expires_ms: int
    used_ms: int | None = None
    used_by: str = ""
    revoked_ms: int | None = None

    def state(self, now_ms: int) -> str:
        """In one word."""
        if self.used_ms is not None:
            return "used"
        if self.revoked_ms is not None:
            return "revoked"
        return "expired" if self.expires_ms <= now_ms else "open"


class Enrolments:
    """The tokens of one coordinator, or of all its replicas.

    Methods block; they raise StoreError and FaultError when the register is in trouble.
    """

    def __init__(self, place: Known | Register | Path) -> None:
        """Open the register, or its file, where that has not been done. Raises StoreError."""
        self._known = Known.of(place)
        self._register = self._known.register

    def close(self) -> None:
        """Close the register."""
        self._register.close()

    def create(self, expires_s: float, *, worker: str = "", by: str = THE_PROGRAM) -> str:
        """Make a token and return it; it is stored nowhere.

        Args:
            expires_s: how long it is good.
            worker: the id that the worker gets; "" lets it bring its own.
            by: who does it, for the log.

        Raises:
            KeyRefusal: a value that cannot be.
        """
        if not 1 <= expires_s <= MAX_EXPIRES_S:
            raise KeyRefusal(f"expires: Expected from 1 s to {MAX_EXPIRES_S // 86_400} days.")
        if worker and not is_safe_id(worker):
            raise KeyRefusal("name: Expected a worker id: letters, digits, - _ . and no more.")
        token = new_secret(SCOPE)

        def make(turn: Turn) -> None:
            turn.all("DELETE FROM enrolments WHERE expires_ms < :old RETURNING prefix", old=turn.now_ms - KEEP_MS)
            open_ = turn.one("SELECT count(*) AS n FROM enrolments WHERE used_ms IS NULL AND revoked_ms IS NULL")
            if open_ is not None and open_["n"] >= MAX_OPEN:
                raise KeyRefusal(f"{MAX_OPEN} enrolment tokens are open already; revoke some.")
            turn.all(
                "INSERT INTO enrolments (hash, prefix, worker, created_ms, expires_ms) "
                "VALUES (:hash, :prefix, :worker, :now, :until) RETURNING prefix",
                hash=digest(token),
                prefix=token[:PREFIX_CHARS],
                worker=worker,
                now=turn.now_ms,
                until=turn.now_ms + int(expires_s * 1000),
            )
            what = f"made the enrolment token {token[:PREFIX_CHARS]}, good for {expires_s:g} s"
            turn.act(by, f"{what}, for the worker {worker!r}" if worker else what)

        self._register.write(make)
        return token

    def use(self, token: str, worker: str = "", address: str = "") -> tuple[str, str]:
        """Exchange a token for a key; returns the worker's id and the key's secret.

        Args:
            token: as the worker was given it.
            worker: the id that it has; the token's own wins.
            address: where it comes from, for the log.

        Raises:
            FaultError: unauthorized: unknown, used, expired or revoked; invalid_parameter: an id is missing.
        """
        if not _TOKEN.match(token):
            raise refuse("unauthorized", "This is no enrolment token; one begins with bhe_.")

        def exchange(turn: Turn) -> tuple[str, str]:
            row = turn.one(f"{_SELECT} WHERE hash = :hash", hash=digest(token))
            found = self._open(row, turn.now_ms)
            name = found.worker or worker
            if not is_safe_id(name):
                raise refuse("invalid_parameter", "worker: The id of the worker is required.", "worker")
            secret = unique_secret(turn, "worker")
            store_key(turn, secret, Key(prefix="", scope="worker", tenant="default", name=name, worker=name), "[]")
            turn.all(
                "UPDATE enrolments SET used_ms = :now, used_by = :key WHERE hash = :hash RETURNING prefix",
                now=turn.now_ms,
                key=secret[:PREFIX_CHARS],
                hash=digest(token),
            )
            turn.act(
                f"enrolment token {found.prefix}" + (f" from {address}" if address else ""),
                f"made the key {secret[:PREFIX_CHARS]} (worker {name!r})",
            )
            return name, secret

        return self._register.write(exchange)

    def _open(self, row: Row | None, now_ms: int) -> Enrolment:
        """The token of a row. Raises FaultError when it is not good."""
        if row is None:
            raise refuse("unauthorized", "The enrolment token is unknown; make one with: coordinator workers enrol")
        found = _enrolment(row)
        another = "make another one with: coordinator workers enrol"
        match found.state(now_ms):
            case "used":
                said = f"The enrolment token was used before, for the key {found.used_by}"
                raise refuse("unauthorized", f"{said}; if that was not you, revoke the key. Else {another}")
            case "revoked" | "expired" as state:
                verb = "was revoked" if state == "revoked" else "has expired"
                raise refuse("unauthorized", f"The enrolment token {verb}; {another}")
        return found

    def list(self) -> Iterator[Enrolment]:
        """All tokens of the last month, oldest first."""
        return iter([_enrolment(row) for row in self._register.read(f"{_SELECT} ORDER BY created_ms, prefix")])

    def revoke(self, prefix: str, *, by: str = THE_PROGRAM) -> Enrolment:
        """Make the one open token whose prefix begins so useless. Raises KeyRefusal when none or several do."""

        if not len("bhe_x") <= len(prefix) <= PREFIX_CHARS or not prefix.isascii() or not prefix.isprintable():
            raise KeyRefusal(f"No open token begins with {prefix[:50]!r}; `coordinator workers tokens` shows them.")

        def end(turn: Turn) -> Enrolment:
            rows = turn.all(
                "UPDATE enrolments SET revoked_ms = :now WHERE used_ms IS NULL AND revoked_ms IS NULL "
                "AND substr(prefix, 1, :length) = :begins "
                "RETURNING prefix, worker, created_ms, expires_ms, used_ms, used_by, revoked_ms",
                now=turn.now_ms,
                length=len(prefix),
                begins=prefix,
            )
            if len(rows) != 1:
                raise KeyRefusal(f"{len(rows)} open tokens begin with {prefix[:50]!r}; look at the list again.")
            turn.act(by, f"revoked the enrolment token {rows[0]['prefix']}")
            return _enrolment(rows[0])

        return self._register.write(end)


def _enrolment(row: Row) -> Enrolment:
    return Enrolment(
        prefix=row["prefix"],
        worker=row["worker"],
        created_ms=int(row["created_ms"]),
        expires_ms=int(row["expires_ms"]),
        used_ms=row["used_ms"],
        used_by=row["used_by"],
        revoked_ms=row["revoked_ms"],
    )
