"""API keys: made once, stored as SHA-256, shown by their prefix ever after.

A key carries 256 random bits, so one fast hash suffices and a lookup by hash leaks nothing about other keys.
Keys live in their own small SQLite file in the state folder, so that `coordinator keys …` works beside a
running server; a revocation takes effect there within `CACHE_S`.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import secrets
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, get_args

import msgspec

Scope = Literal["client", "worker", "admin"]
SCOPES: tuple[str, ...] = get_args(Scope)

FILE_NAME = "keys.sqlite"
CACHE_S = 1.0
CACHE_ENTRIES = 4096
PREFIX_CHARS = 12  # shown to people; 8 characters (48 bits) of it are random
DEFAULT_TENANT = "default"

_WORDS = {"client": "bhc", "worker": "bhw", "admin": "bha"}
_SECRET = re.compile(r"bh[cwa]_[A-Za-z0-9_-]{43}\Z", re.ASCII)
_SCHEMA = """
CREATE TABLE IF NOT EXISTS keys (
    hash BLOB PRIMARY KEY,
    prefix TEXT NOT NULL,
    scope TEXT NOT NULL,
    tenant TEXT NOT NULL,
    name TEXT NOT NULL,
    worker TEXT NOT NULL,
    created_ms INTEGER NOT NULL,
    revoked_ms INTEGER
) WITHOUT ROWID
"""


class KeyRefusal(Exception):
    """A key operation that cannot be done; the message names the cure."""


class Key(msgspec.Struct, frozen=True, kw_only=True):
    """One key, without its secret.

    Attributes:
        prefix: first characters of the secret; names the key for people.
        scope: what it opens: client (OpenAI and job routes), worker (the gateway), admin (client and metrics).
        tenant: whose jobs it sees.
        worker: for worker keys: the only worker id it admits; "" admits any.
    """

    prefix: str
    scope: str
    tenant: str
    name: str = ""
    worker: str = ""
    created_ms: int = 0
    revoked_ms: int | None = None


def new_secret(scope: str) -> str:
    """Return a fresh secret with 256 random bits; its first letters tell the scope."""
    return f"{_WORDS[scope]}_{secrets.token_urlsafe(32)}"


def digest(secret: str) -> bytes:
    """What is stored of a secret."""
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).digest()


def make_private(path: Path) -> None:
    """Make the file, readable by its owner alone, unless it is there. Raises OSError.

    One that is there is not opened: closing it would take away the locks that this process has on it (POSIX locks go
    with any descriptor), and another process that ends would remove the log that we read from.
    """
    with contextlib.suppress(FileExistsError):
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))


class Keys:
    """The keys of one coordinator. All calls are short and synchronous (one indexed row)."""

    def __init__(self, path: Path) -> None:
        """Open or create the file, readable by its owner alone. Raises sqlite3.Error, OSError."""
        make_private(path)
        self._db = sqlite3.connect(path, isolation_level=None, timeout=5, check_same_thread=False)
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute(_SCHEMA)
        self._cache: dict[bytes, tuple[float, Key]] = {}
        self._for_this_boot: dict[bytes, Key] = {}

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    def create(self, scope: str, *, name: str = "", tenant: str = DEFAULT_TENANT, worker: str = "") -> str:
        """Make a key and return its secret, which is stored nowhere. Raises KeyRefusal for an unknown scope."""
        secret = self._new(scope)
        self.adopt(secret, scope, name=name, tenant=tenant, worker=worker)
        return secret

    def adopt(self, secret: str, scope: str, *, name: str = "", tenant: str = DEFAULT_TENANT, worker: str = "") -> None:
        """Store a secret that was made elsewhere (a key file); a second time changes nothing."""
        self._db.execute(
            "INSERT OR IGNORE INTO keys VALUES (?, ?, ?, ?, ?, ?, ?, NULL)",
            (digest(secret), secret[:PREFIX_CHARS], scope, tenant, name, worker, _now_ms()),
        )

    def admit_for_this_boot(self, secret: str, scope: str, *, name: str = "", worker: str = "") -> None:
        """Accept a secret until this process ends, without writing it down."""
        self._for_this_boot[digest(secret)] = Key(
            prefix=secret[:PREFIX_CHARS], scope=scope, tenant=DEFAULT_TENANT, name=name, worker=worker
        )

    def find(self, secret: str) -> Key | None:
        """Return the live key that this secret opens, or None.

        The lookup is by hash: what it takes depends on the hash alone, which the caller cannot steer.
        """
        hashed = digest(secret)
        if key := self._for_this_boot.get(hashed):
            return key
        if not _SECRET.match(secret):
            return None
        now = time.monotonic()
        cached = self._cache.get(hashed)
        if cached is not None and now - cached[0] < CACHE_S:
            return cached[1]
        self._cache.pop(hashed, None)
        if (found := self.by_hash(hashed)) is None:
            return None
        if len(self._cache) >= CACHE_ENTRIES:
            self._cache.clear()
        self._cache[hashed] = (now, found)
        return found

    def by_hash(self, hashed: bytes) -> Key | None:
        """The live key whose secret has this `digest`, as it is now: what is bound to a key ends with it."""
        if key := self._for_this_boot.get(hashed):
            return key
        row = self._db.execute(f"{_SELECT} WHERE hash = ? AND revoked_ms IS NULL", (hashed,)).fetchone()
        return None if row is None else _key(row)

    def list(self) -> Iterator[Key]:
        """All keys, oldest first, revoked ones included."""
        for row in self._db.execute(f"{_SELECT} ORDER BY created_ms, prefix"):
            yield _key(row)

    def revoke(self, prefix: str) -> Key:
        """Revoke the one live key whose prefix begins with `prefix`.

        Raises:
            KeyRefusal: none or several match.
        """
        live = [key for key in self.list() if key.revoked_ms is None and key.prefix.startswith(prefix)]
        if len(prefix) < 5 or not live:
            raise KeyRefusal(f"No live key begins with {prefix!r}; `coordinator keys list` shows them.")
        if len(live) > 1:
            raise KeyRefusal(f"{len(live)} live keys begin with {prefix!r}; give more of the prefix.")
        self._db.execute(
            "UPDATE keys SET revoked_ms = ? WHERE prefix = ? AND revoked_ms IS NULL", (_now_ms(), live[0].prefix)
        )
        self._cache.clear()
        return live[0]

    def _new(self, scope: str) -> str:
        if scope not in SCOPES:
            raise KeyRefusal(f"There is no scope {scope!r}; take one of {', '.join(SCOPES)}.")
        return new_secret(scope)


_SELECT = "SELECT prefix, scope, tenant, name, worker, created_ms, revoked_ms FROM keys"


def _key(row: tuple[str, str, str, str, str, int, int | None]) -> Key:
    prefix, scope, tenant, name, worker, created_ms, revoked_ms = row
    return Key(
        prefix=prefix,
        scope=scope,
        tenant=tenant,
        name=name,
        worker=worker,
        created_ms=created_ms,
        revoked_ms=revoked_ms,
    )


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


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
