"""API keys: made once, stored as SHA-256, shown by their prefix ever after.

A key carries 256 random bits, so one fast hash suffices and a lookup by hash leaks nothing about other keys.
Keys live in the register, so that `coordinator keys …` works beside a running server, and replicas over one PostgreSQL
share them; a revocation takes effect everywhere within a second.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import secrets
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, get_args

import msgspec

from coordinator.register import FILE_NAME as FILE_NAME
from coordinator.register import Register, Turn
from coordinator.register.known import Key as Key
from coordinator.register.known import Known, key_of

Scope = Literal["client", "worker", "admin"]
SCOPES: tuple[str, ...] = get_args(Scope)

PREFIX_CHARS = 12  # shown to people; 8 characters (48 bits) of it are random
LEAST_PREFIX = 5
MAX_SECRET_CHARS = 4096
MAX_LIMIT = 10**9
MAX_MODELS = 1000
MAX_NAME_CHARS = 200
DEFAULT_TENANT = "default"
THE_PROGRAM = "the coordinator itself"

_WORDS = {"client": "bhc", "worker": "bhw", "admin": "bha", "worker-enrol": "bhe"}
_SECRET = re.compile(r"bh[cwa]_[A-Za-z0-9_-]{43}\Z", re.ASCII)
_SELECT = "SELECT hash, prefix, scope, tenant, name, worker, created_ms, revoked_ms, rpm, concurrent, models FROM keys"


class KeyRefusal(Exception):
    """A key operation that cannot be done; the message names the cure."""


def new_secret(scope: str) -> str:
    """Return a fresh secret with 256 random bits; its first letters tell the scope."""
    return f"{_WORDS[scope]}_{secrets.token_urlsafe(32)}"


def digest(secret: str) -> bytes:
    """What is stored of a secret."""
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).digest()


def plain_name(text: str, what: str) -> str:
    """A name for people, fit for a table and a log. Raises KeyRefusal."""
    if len(text) > MAX_NAME_CHARS or not text.isprintable():
        raise KeyRefusal(f"{what}: Expected at most {MAX_NAME_CHARS} printable characters.")
    return text


def checked_models(models: Sequence[str]) -> str:
    """The names of models as they are stored. Raises KeyRefusal."""
    names = sorted({plain_name(name.strip(), "models") for name in models})
    if len(names) > MAX_MODELS or "" in names:
        raise KeyRefusal(f"models: Expected at most {MAX_MODELS} names, and none of them empty.")
    return msgspec.json.encode(names).decode()


def checked_limit(value: int, name: str) -> int:
    """A limit as it is stored. Raises KeyRefusal."""
    if not 0 <= value <= MAX_LIMIT:
        raise KeyRefusal(f"{name}: Expected a whole number from 0, for no limit, to {MAX_LIMIT}.")
    return value


class Keys:
    """The keys of one coordinator, or of all its replicas.

    Methods block, but for `look_up`; they raise StoreError and FaultError when the register is in trouble.
    """

    def __init__(self, place: Known | Register | Path) -> None:
        """Open the register, or its file, where that has not been done. Raises StoreError."""
        self.known = Known.of(place)
        self._register = self.known.register
        self._for_this_boot: dict[bytes, Key] = {}

    def close(self) -> None:
        """Close the register."""
        self._register.close()

    def create(
        self,
        scope: str,
        *,
        name: str = "",
        tenant: str = DEFAULT_TENANT,
        worker: str = "",
        rpm: int = 0,
        concurrent: int = 0,
        models: Sequence[str] = (),
        by: str = THE_PROGRAM,
    ) -> str:
        """Make a key and return its secret, which is stored nowhere.

        Args:
            scope: one of `SCOPES`.
            by: who does it, for the log.

        Raises:
            KeyRefusal: an unknown scope, or a value that cannot be.
        """
        if scope not in SCOPES:
            raise KeyRefusal(f"There is no scope {scope!r}; take one of {', '.join(SCOPES)}.")
        if not plain_name(tenant, "tenant"):
            raise KeyRefusal("tenant: Expected a name.")
        key = Key(
            prefix="",
            scope=scope,
            tenant=tenant,
            name=plain_name(name, "name"),
            worker=plain_name(worker, "worker"),
            rpm=checked_limit(rpm, "rpm"),
            concurrent=checked_limit(concurrent, "concurrent"),
        )
        kept = checked_models(models)

        def make(turn: Turn) -> str:
            secret = unique_secret(turn, scope)
            store_key(turn, secret, key, kept)
            turn.act(by, f"made the key {secret[:PREFIX_CHARS]} ({describe(key)})")
            return secret

        return self._register.write(make)

    def adopt(self, secret: str, scope: str, *, name: str = "", tenant: str = DEFAULT_TENANT, worker: str = "") -> None:
        """Store a secret that was made elsewhere (a key file); a second time changes nothing."""
        key = Key(prefix=secret[:PREFIX_CHARS], scope=scope, tenant=tenant, name=name, worker=worker)
        if self._register.read("SELECT prefix FROM keys WHERE hash = :hash", hash=digest(secret)):
            return

        def take(turn: Turn) -> None:
            if store_key(turn, secret, key, "[]"):
                turn.act(THE_PROGRAM, f"made the key {key.prefix} ({describe(key)})")

        self._register.write(take)

    def admit_for_this_boot(self, secret: str, scope: str, *, name: str = "", worker: str = "") -> None:
        """Accept a secret until this process ends, without writing it down."""
        self._for_this_boot[digest(secret)] = Key(
            prefix=secret[:PREFIX_CHARS], scope=scope, tenant=DEFAULT_TENANT, name=name, worker=worker
        )

    def find(self, secret: str) -> Key | None:
        """Return the live key that this secret opens, or None; blocks while the register is read.

        The lookup is by hash: what it takes depends on the hash alone, which the caller cannot steer.
        """
        hashed = self._hash_of(secret)
        if hashed is None:
            return None
        if key := self._for_this_boot.get(hashed):
            return key
        if hashed not in self.known.keys or self.known.old():
            self.known.refresh()
        return self.known.keys.get(hashed)

    async def look_up(self, secret: str) -> Key | None:
        """`find` for the event loop, which it never blocks.

        Raises:
            FaultError: overloaded: the register is away, and the secret not known or known for too long.
        """
        hashed = self._hash_of(secret)
        if hashed is None:
            return None
        if key := self._for_this_boot.get(hashed):
            return key
        if hashed not in self.known.keys or self.known.old():
            await self.known.fresh()
        self.known.check_age()
        return self.known.keys.get(hashed)

    def _hash_of(self, secret: str) -> bytes | None:
        """Its hash; None for what is no key's secret, so that nobody looks for it."""
        if len(secret) > MAX_SECRET_CHARS:
            return None
        hashed = digest(secret)
        return hashed if hashed in self._for_this_boot or _SECRET.match(secret) else None

    def by_hash(self, hashed: bytes) -> Key | None:
        """The live key whose secret has this `digest`, as it is now: what is bound to a key ends with it.

        Blocks only where nobody watches the register.
        """
        if key := self._for_this_boot.get(hashed):
            return key
        if not self.known.watched:
            self.known.refresh()
        return self.known.keys.get(hashed)

    def lives(self, prefix: str) -> bool:
        """Whether the key of this prefix is good still, as far as is known here."""
        if any(key.prefix == prefix for key in self._for_this_boot.values()):
            return True
        key = self.known.prefixes.get(prefix)
        return key is not None and key.revoked_ms is None

    def list(self) -> Iterator[Key]:
        """All keys, oldest first, revoked ones included."""
        for row in self._register.read(f"{_SELECT} ORDER BY created_ms, prefix"):
            yield key_of(row)

    def revoke(self, prefix: str, *, by: str = THE_PROGRAM) -> Key:
        """Revoke the one live key whose prefix begins with `prefix`; what is open with it ends.

        Raises:
            KeyRefusal: none or several match.
        """

        nobody = KeyRefusal(f"No live key begins with {prefix[:50]!r}; `coordinator keys list` shows them.")
        if not LEAST_PREFIX <= len(prefix) <= PREFIX_CHARS or not prefix.isascii() or not prefix.isprintable():
            raise nobody

        def end(turn: Turn) -> Key:
            begins = {"length": len(prefix), "begins": prefix}
            live = turn.all(f"{_SELECT} WHERE revoked_ms IS NULL AND substr(prefix, 1, :length) = :begins", **begins)
            if not live:
                raise nobody
            if len(live) > 1:
                raise KeyRefusal(f"{len(live)} live keys begin with {prefix!r}; give more of the prefix.")
            key = key_of(live[0])
            end_key(turn, bytes(live[0]["hash"]))
            # A worker that was admitted at its request could ask for another key.
            turn.all(
                "UPDATE registrations SET state = 'rejected', reason = 'Its key was revoked.', token = NULL, "
                "changed = :change WHERE token = :hash AND protocol = 'native' RETURNING id",
                change=turn.change,
                hash=bytes(live[0]["hash"]),
            )
            turn.act(by, f"revoked the key {key.prefix} ({describe(key)})")
            return key

        key = self._register.write(end)
        self.known.refresh()
        return key


# ---- within a transaction of the register -------------------------------------------------------------------


def unique_secret(turn: Turn, scope: str) -> str:
    """A secret whose prefix no other key has: jobs, sessions and people name keys by it."""
    while True:
        secret = new_secret(scope)
        if turn.one("SELECT prefix FROM keys WHERE prefix = :prefix", prefix=secret[:PREFIX_CHARS]) is None:
            return secret


def store_key(turn: Turn, secret: str, key: Key, models: str) -> bool:
    """Write a key down; False when this secret is there already. Raises KeyRefusal when its prefix is another's."""
    other = turn.one("SELECT hash FROM keys WHERE prefix = :prefix", prefix=secret[:PREFIX_CHARS])
    if other is not None:
        if bytes(other["hash"]) == digest(secret):
            return False
        raise KeyRefusal(f"Another key begins with {secret[:PREFIX_CHARS]}; make a new one.")
    turn.all(
        "INSERT INTO keys (hash, prefix, scope, tenant, name, worker, created_ms, changed, rpm, concurrent, models) "
        "VALUES (:hash, :prefix, :scope, :tenant, :name, :worker, :now, :change, :rpm, :concurrent, :models) "
        "RETURNING prefix",
        hash=digest(secret),
        prefix=secret[:PREFIX_CHARS],
        scope=key.scope,
        tenant=key.tenant,
        name=key.name,
        worker=key.worker,
        now=turn.now_ms,
        change=turn.change,
        rpm=key.rpm,
        concurrent=key.concurrent,
        models=models,
    )
    return True


def end_key(turn: Turn, hashed: bytes) -> None:
    """Revoke a key by the hash of its secret."""
    turn.all(
        "UPDATE keys SET revoked_ms = :now, changed = :change WHERE hash = :hash AND revoked_ms IS NULL "
        "RETURNING prefix",
        now=turn.now_ms,
        change=turn.change,
        hash=hashed,
    )


def describe(key: Key) -> str:
    """A key for the log, without its prefix."""
    said = [key.scope, f"tenant {key.tenant!r}"]
    said += [f"{name} {value!r}" for name, value in (("name", key.name), ("worker", key.worker)) if value]
    return ", ".join(said)


def secret_file(path: Path, keys: Keys, scope: str, name: str) -> bool:
    """Make sure that `path` (mode 0600) holds a live key of `scope`; return whether a new one was made.

    A file whose key was revoked is kept as it is: revoking must not be undone by a restart.

    Raises:
        KeyRefusal: the file holds something else, or others may read it.
    """
    with contextlib.suppress(FileNotFoundError):
        if path.stat().st_mode & 0o077:
            raise KeyRefusal(f"{path} may be read by others; run: chmod 600 {path}")
        secret = path.read_text().strip()
        if not _SECRET.match(secret):
            raise KeyRefusal(f"{path} does not hold a key; remove it and a new one is made.")
        keys.adopt(secret, scope, name=name)
        return False
    secret = new_secret(scope)
    temporary = path.with_name(f"{path.name}.new")
    temporary.unlink(missing_ok=True)
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(secret + "\n")
        file.flush()
        os.fsync(file.fileno())
    keys.adopt(secret, scope, name=name)
    temporary.replace(path)
    return True
