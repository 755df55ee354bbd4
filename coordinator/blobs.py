"""Files of jobs in a local folder, and the signed URLs by which workers fetch and leave them.

    folder/secret                              key of the signatures, mode 0600
    folder/tmp/…                               uploads under way; emptied at the start
    folder/parts/{job}.{attempt}.{sha256}      what came of an output before the connection broke
    folder/in/{key}                            inputs; key = blob_ and 26 characters
    folder/out/{job}/{attempt}/{sha256}-{name} outputs; their key is the path below out/

An output's name on disk begins with its digest, so what `complete` declares is checked by one stat, and two
uploads under one name cannot mix. A file appears under its key only when it is whole and on the disk. What came of an
output whose connection broke is kept under its digest for an hour, so that the worker goes on where it was.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import hmac
import os
import re
import secrets
import shutil
import time
from collections.abc import AsyncIterator, Callable, Iterable
from pathlib import Path
from urllib.parse import quote, urlencode

import anyio
import msgspec
from anyio.to_thread import run_sync

from protocol.engine_wire import MAX_OUTPUT_FILES
from protocol.faults import refuse
from protocol.ids import RANDOM_BYTES, is_safe_id, new_id

MAX_OUTPUT_BYTES = 2 * 2**30
WRITE_BYTES = 2**20  # a thread hop per MiB, not per network read
ORPHAN_S = 3600.0  # an upload whose job was not submitted within this time is nobody's
PREFIX = "/v1/blobs"

_INPUT_KEY = re.compile(r"blob_[0-9a-z]{26}\Z")
_SHA256 = re.compile(r"[0-9a-f]{64}\Z")
_MAX_NAME_BYTES = 150
_FULL = (errno.ENOSPC, errno.EDQUOT)


class StoredBlob(msgspec.Struct, frozen=True):
    """A file that is in the blobs: `size` in bytes, `sha256` in hex."""

    key: str
    size: int
    sha256: str


class Blobs:
    """Blobs in a local folder. Coroutines do their file work in threads; the rest is plain calculation.

    Args:
        folder: made when it is missing.
        max_output_bytes: limit of one uploaded output.
        now_s: the clock of expiry dates, seconds since the epoch.
    """

    def __init__(
        self, folder: Path, max_output_bytes: int = MAX_OUTPUT_BYTES, now_s: Callable[[], float] = time.time
    ) -> None:
        self.max_output_bytes = max_output_bytes
        self._folder, self._now_s = folder, now_s
        self._receiving: dict[str, tuple[anyio.CancelScope, anyio.Event]] = {}  # by name, what is written to now
        for name in ("in", "out", "parts"):
            (folder / name).mkdir(mode=0o700, parents=True, exist_ok=True)
        shutil.rmtree(folder / "tmp", ignore_errors=True)
        (folder / "tmp").mkdir(mode=0o700)
        self._secret = _secret(folder / "secret")

    # ---- files ---------------------------------------------------------------------------------------------

    async def put(self, data: AsyncIterator[bytes], limit: int, expected: str = "") -> StoredBlob:
        """Store an input.

        Args:
            data: its bytes.
            limit: most bytes it may have.
            expected: sha256 in hex that it must have; "" for any.

        Raises:
            FaultError: payload_too_large, upload_failed (another digest), storage_full.

        Cancellation: nothing stays behind.
        """
        key = new_id("blob", int(self._now_s() * 1000), secrets.token_bytes(RANDOM_BYTES))
        return await self._store(data, limit, expected, lambda _sha256: key)

    async def put_output(
        self, job: str, attempt: int, name: str, data: AsyncIterator[bytes], expected: str = "", at: int = 0
    ) -> StoredBlob:
        """Store an output of an attempt.

        Args:
            at: how many of its bytes are here already, as `received` told; `data` is the rest.

        Raises:
            FaultError: as `put`; invalid_request for its name; conflict when other bytes are here than `at` says.

        Cancellation: what came is kept for a later try when `expected` is told.
        """
        if not is_safe_id(job) or attempt < 1 or not is_safe_name(name):
            raise refuse("invalid_request", "The name of an output has no slash and at most 150 bytes.", "name")
        if await run_sync(_count, self._folder / "out" / job / str(attempt)) > MAX_OUTPUT_FILES:
            raise refuse("payload_too_large", f"An attempt has at most {MAX_OUTPUT_FILES} output files and a result.")
        part = self._part(job, attempt, expected) if expected else None
        return await self._store(
            data, self.max_output_bytes, expected, lambda sha256: output_key(job, attempt, name, sha256), part, at
        )

    async def received(self, job: str, attempt: int, sha256: str) -> int:
        """How many bytes of an output with this digest have come, before a connection broke; 0 for none.

        Who asks has lost that connection, whatever we know of it: it is ended, so that its bytes are all there.
        """
        part = self._part(job, attempt, sha256)
        await self._take_over(part.name)
        return await run_sync(_size, part) or 0

    async def _take_over(self, name: str) -> None:
        """End whoever still receives this file: the latest connection is the one that lives."""
        while earlier := self._receiving.get(name):
            scope, over = earlier
            scope.cancel()
            await over.wait()

    def _part(self, job: str, attempt: int, sha256: str) -> Path:
        if not is_safe_id(job) or attempt < 1 or not _SHA256.match(sha256.lower()):
            raise refuse("invalid_request", "A digest has 64 hexadecimal digits.", "X-Content-SHA256")
        return self._folder / "parts" / f"{job}.{attempt}.{sha256.lower()}"

    async def find_output(self, job: str, attempt: int, name: str, size: int, sha256: str) -> str | None:
        """The key of an uploaded output, when it has this size and digest."""
        if not (is_safe_id(job) and is_safe_name(name) and _SHA256.match(sha256)):
            return None
        key = output_key(job, attempt, name, sha256)
        return key if await run_sync(_size, self.path(key)) == size else None

    async def find_named(self, job: str, attempt: int, name: str) -> str | None:
        """The key of the latest output that was uploaded under this name."""
        folder = self._folder / "out" / job / str(attempt)

        def latest() -> str | None:
            with contextlib.suppress(FileNotFoundError):
                files = [file for file in folder.iterdir() if file.name[65:] == name]
                if files:
                    return f"{job}/{attempt}/{max(files, key=lambda file: file.stat().st_mtime_ns).name}"
            return None

        return await run_sync(latest)

    def path(self, key: str) -> Path:
        """Where the file of a key lies, or would lie. Raises FaultError(not_found) for what is no key."""
        if _INPUT_KEY.match(key):
            return self._folder / "in" / key
        job, _, rest = key.partition("/")
        attempt, _, name = rest.partition("/")
        digest, dash, plain = name[:64], name[64:65], name[65:]
        number = attempt.isascii() and attempt.isdigit() and len(attempt) < 12
        if not (is_safe_id(job) and number and _SHA256.match(digest) and dash == "-" and is_safe_name(plain)):
            raise refuse("not_found", "There is no such file.")
        return self._folder / "out" / job / attempt / name

    async def open(self, key: str) -> anyio.AsyncFile[bytes]:
        """Open a file for reading. Raises FaultError(not_found)."""
        try:
            return await anyio.open_file(self.path(key), "rb")
        except FileNotFoundError:
            raise refuse("not_found", "The file is gone; files are deleted with their job.") from None

    async def read(self, key: str, limit: int) -> bytes:
        """The whole file. Raises FaultError: not_found, payload_too_large beyond `limit` bytes."""
        async with await self.open(key) as file:
            data = await file.read(limit + 1)
        if len(data) > limit:
            raise refuse("payload_too_large", f"The file exceeds {limit} bytes.")
        return data

    def delete(self, job: str, inputs: Iterable[str] = ()) -> None:
        """Delete all outputs of a job and these inputs. Blocks; for a thread."""
        for key in inputs:
            self.path(key).unlink(missing_ok=True)
        if is_safe_id(job):
            shutil.rmtree(self._folder / "out" / job, ignore_errors=True)
            for part in (self._folder / "parts").glob(f"{job}.*"):
                part.unlink(missing_ok=True)

    def sweep(self, input_used: Callable[[str], bool], job_known: Callable[[str], bool]) -> int:
        """Delete files that belong to no job and are older than an hour; return how many. Blocks."""
        before = self._now_s() - ORPHAN_S
        old_inputs = [file for file in (self._folder / "in").iterdir() if _mtime(file) < before]
        orphans = [file for file in old_inputs if not input_used(file.name)]
        orphans += [part for part in (self._folder / "parts").iterdir() if _mtime(part) < before]
        for file in orphans:
            file.unlink(missing_ok=True)
        jobs = [folder for folder in (self._folder / "out").iterdir() if _mtime(folder) < before]
        lost = [folder for folder in jobs if not job_known(folder.name)]
        for folder in lost:
            shutil.rmtree(folder, ignore_errors=True)
        return len(orphans) + len(lost)

    # ---- signed URLs ---------------------------------------------------------------------------------------

    def url(self, key: str, ttl_s: float) -> str:
        """A URL, relative to the coordinator, that fetches this one file for `ttl_s` seconds."""
        return f"{PREFIX}/{quote(key)}?{self._signed('GET', key, ttl_s)}"

    def upload_template(self, job: str, attempt: int, ttl_s: float) -> str:
        """A URL with `{name}` in it, to which outputs of this one attempt are PUT for `ttl_s` seconds.

        Who fills it in percent-encodes the name.
        """
        return f"{PREFIX}/{job}/{attempt}/{{name}}?{self._signed('PUT', f'{job}/{attempt}/', ttl_s)}"

    def check(self, method: str, scope: str, expires: str, signature: str) -> None:
        """Judge a signed request.

        Args:
            method: GET or PUT.
            scope: the key (GET), or `job/attempt/` (PUT).
            expires, signature: as they stand in the URL.

        Raises:
            FaultError: forbidden.
        """
        good = hmac.compare_digest(self._sign(method, scope, expires).encode(), signature.encode())
        if not good or not (expires.isascii() and expires.isdigit()):
            raise refuse("forbidden", "The URL's signature is not good for this request.")
        if int(expires) < self._now_s():
            raise refuse("forbidden", "The URL has expired; ask for a new one.")

    def _signed(self, method: str, scope: str, ttl_s: float) -> str:
        expires = str(int(self._now_s() + ttl_s))
        return urlencode({"exp": expires, "sig": self._sign(method, scope, expires)})

    def _sign(self, method: str, scope: str, expires: str) -> str:
        return hmac.new(self._secret, f"{method}\n{scope}\n{expires}".encode(), hashlib.sha256).hexdigest()

    # ---- inside --------------------------------------------------------------------------------------------

    async def _store(
        self,
        data: AsyncIterator[bytes],
        limit: int,
        expected: str,
        key_of: Callable[[str], str],
        part: Path | None = None,
        at: int = 0,
    ) -> StoredBlob:
        """Receive a file. `part` is where it may be kept in parts, `at` how much of it is there."""
        path = part or self._folder / "tmp" / secrets.token_hex(16)
        await self._take_over(path.name)
        scope, over = self._receiving[path.name] = (anyio.CancelScope(), anyio.Event())
        draft = _Draft(path)
        try:
            if await run_sync(draft.open, at) != at:
                raise refuse("conflict", "Another number of bytes has come before; ask for it again.")
            with scope:
                await _receive(draft, data, limit, at)
            if scope.cancelled_caught:
                raise refuse("conflict", "The same file comes on a newer connection.")
            sha256 = draft.digest.hexdigest()
            if expected and not hmac.compare_digest(expected.lower().encode(), sha256.encode()):
                draft.spoiled = True
                raise refuse("upload_failed", "The file arrived with another sha256 than announced; send it again.")
            key = key_of(sha256)
            await run_sync(draft.move, self.path(key))
        except OSError as error:
            if error.errno in _FULL:
                draft.spoiled = True
                raise refuse("storage_full", "The coordinator's disk is full; try again when there is room.") from None
            raise
        finally:
            with anyio.CancelScope(shield=True):
                await run_sync(draft.keep if part is not None and not draft.spoiled else draft.discard)
            del self._receiving[path.name]
            over.set()
        return StoredBlob(key, draft.size, sha256)


async def _receive(draft: _Draft, data: AsyncIterator[bytes], limit: int, at: int) -> None:
    pending = bytearray()
    size = at
    try:
        async for piece in data:
            size += len(piece)
            if size > limit:
                draft.spoiled = True
                raise refuse("payload_too_large", f"The file exceeds {limit} bytes.")
            pending += piece
            if len(pending) >= WRITE_BYTES:
                await run_sync(draft.write, bytes(pending))
                pending.clear()
    finally:
        if not draft.spoiled:
            with anyio.CancelScope(shield=True):
                await run_sync(draft.write, bytes(pending))


class _Draft:
    """A file that is being received. Everything here blocks; at its end comes `move`, then `keep` or `discard`.

    Attributes:
        spoiled: what is in it is of no use to anybody.
    """

    def __init__(self, path: Path) -> None:
        self.digest = hashlib.sha256()
        self.size = 0
        self.spoiled = False
        self._path = path
        self._fd = -1

    def open(self, at: int) -> int:
        """Open it, anew or to go on; returns how much is there."""
        flags = os.O_CREAT | os.O_RDWR | os.O_CLOEXEC | (0 if at else os.O_TRUNC)
        self._fd = os.open(self._path, flags, 0o600)
        if at:
            while piece := os.read(self._fd, WRITE_BYTES):
                self.digest.update(piece)
                self.size += len(piece)
        return self.size

    def write(self, data: bytes) -> None:
        self.digest.update(data)
        self.size += len(data)
        view = memoryview(data)
        while view:
            view = view[os.write(self._fd, view) :]

    def move(self, target: Path) -> None:
        """Make it visible; on the disk before that, because a worker forgets a result once it is acknowledged."""
        os.fsync(self._fd)
        target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._path.replace(target)
        folder = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def keep(self) -> None:
        """Leave what came, if it is worth going on from."""
        if self.size < WRITE_BYTES:
            self.discard()
        elif self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def discard(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        self._path.unlink(missing_ok=True)


def is_safe_name(name: str) -> bool:
    """Whether an output may have this name: one path component, printable, at most 150 bytes."""
    if name in ("", ".", "..") or "/" in name or "\\" in name or not name.isprintable():
        return False
    return len(name.encode("utf-8", "replace")) <= _MAX_NAME_BYTES


def output_key(job: str, attempt: int, name: str, sha256: str) -> str:
    """The key of an output."""
    return f"{job}/{attempt}/{sha256}-{name}"


def _secret(path: Path) -> bytes:
    """Read the key of the signatures, or make it. It outlives restarts, so that URLs do, too."""
    try:
        secret = path.read_bytes()
    except FileNotFoundError:
        secret = secrets.token_bytes(32)
        draft = path.with_suffix(".new")
        draft.unlink(missing_ok=True)
        fd = os.open(draft, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600)
        with os.fdopen(fd, "wb") as file:
            file.write(secret)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    if len(secret) < 32:
        raise ValueError(f"{path} holds fewer than 32 bytes; delete it to get a new one.")
    return secret


def _count(folder: Path) -> int:
    try:
        return len(os.listdir(folder))
    except FileNotFoundError:
        return 0


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return None


def _mtime(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return float("inf")
