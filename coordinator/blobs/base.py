"""Files of jobs, wherever they lie, and the signed URLs by which workers fetch and leave them.

`Blobs` is the seam: `blobs_folder` keeps files in a folder, `blobs_s3` in any store with an S3 API; both pass one
contract suite. The names are the same in both:

    secret                              key of our own signatures
    in/{key}                            inputs; key = blob_ and 26 characters
    out/{job}/{attempt}/{sha256}-{name} outputs; their key is the path below out/

An output's name begins with its digest, so what `complete` declares is checked by one look, and two uploads under one
name cannot mix. A file appears under its key only when it is whole, durable and of that digest.

Workers only ever see URLs. An output comes to us (`upload_template`), or, where the template says `direct=1`, to the
place that `GET …/{name}/place` names: a URL of another store, good for this one file and for minutes. What is left
there is nobody's before `claim` has looked at each byte.

How much an attempt may leave is signed with the URL (`bounds`). Of an attempt that is over only what its job's row
names stays: `touched` is what has to be looked at for that, see `coordinator.leftovers`.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Collection, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple
from urllib.parse import quote, urlencode

import anyio
import msgspec
from anyio.to_thread import run_sync

from coordinator.blobs.bounds import MAX_OUTPUT_BYTES, WIDEST, Bounds
from coordinator.blobs.drafts import Draft, Drafts
from coordinator.blobs.room import Coming, Rooms
from protocol.faults import refuse
from protocol.ids import RANDOM_BYTES, is_safe_id, new_id

ORPHAN_S = 3600.0  # an upload whose job was not submitted within this time is nobody's
PREFIX = "/v1/blobs"
SECRET_BYTES = 32

_INPUT_KEY = re.compile(r"blob_[0-9a-z]{26}\Z")
_SHA256 = re.compile(r"[0-9a-f]{64}\Z")
_MAX_NAME_BYTES = 150


class StoredBlob(msgspec.Struct, frozen=True):
    """A file that is in the blobs: `size` in bytes, `sha256` in hex."""

    key: str
    size: int
    sha256: str


class Output(NamedTuple):
    """A file in out/: {digest}-{name}, when it came (seconds since the epoch), and its bytes."""

    name: str
    when: float
    size: int


class Blobs(ABC):
    """Files of jobs. Coroutines do their work in threads; what blocks says so; the rest is plain calculation.

    Args:
        drafts: where files are received.
        secret: key of the signatures; the same for all coordinators over one store.
        max_output_bytes: limit of one uploaded output.
        now_s: the clock of expiry dates, seconds since the epoch.

    Attributes:
        touched: attempts (job, number) that left something through this coordinator, until somebody takes them out.
        lasting_s: how long after its end an attempt may still leave something, past us.
    """

    lasting_s = 0.0

    def __init__(
        self,
        drafts: Drafts,
        secret: bytes,
        max_output_bytes: int = MAX_OUTPUT_BYTES,
        now_s: Callable[[], float] = time.time,
    ) -> None:
        if len(secret) < SECRET_BYTES:
            raise ValueError(f"The blobs' secret has fewer than {SECRET_BYTES} bytes; delete it to get a new one.")
        self.max_output_bytes = max_output_bytes
        self._drafts, self._secret, self._now_s = drafts, secret, now_s
        self._rooms = Rooms(self._lying)
        self.touched: set[tuple[str, int]] = set()

    # ---- in ------------------------------------------------------------------------------------------------

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
        name = new_id("blob", int(self._now_s() * 1000), secrets.token_bytes(RANDOM_BYTES))

        def publish(draft: Draft) -> str:
            self._publish(draft, name)
            return name

        def grow(size: int) -> None:
            if size > limit:
                raise refuse("payload_too_large", f"The file exceeds {limit} bytes.")

        key, draft = await self._drafts.receive(data, grow, expected, publish)
        return StoredBlob(key, draft.size, draft.digest.hexdigest())

    async def put_output(
        self,
        job: str,
        attempt: int,
        name: str,
        data: AsyncIterator[bytes],
        expected: str = "",
        at: int = 0,
        bounds: Bounds = WIDEST,
    ) -> StoredBlob:
        """Store an output of an attempt.

        Args:
            at: how many of its bytes are here already, as `received` told; `data` is the rest.
            bounds: how much the attempt may leave.

        Raises:
            FaultError: as `put`; invalid_request for its name; conflict when other bytes are here than `at` says.

        Cancellation: what came is kept for a later try when `expected` is told.
        """

        def publish(draft: Draft) -> str:
            key = output_key(job, attempt, name, draft.digest.hexdigest())
            self._publish(draft, key)
            return key

        async with self._entered(job, attempt, name, expected, bounds) as coming:
            part = part_name(job, attempt, expected) if expected else ""
            key, draft = await self._drafts.receive(data, coming.grow, expected, publish, part, at)
        return StoredBlob(key, draft.size, draft.digest.hexdigest())

    @asynccontextmanager
    async def _entered(self, job: str, attempt: int, name: str, sha256: str, bounds: Bounds) -> AsyncIterator[Coming]:
        """While an output comes; raises FaultError for a name, a number of files or a size that may not be."""
        if not is_safe_id(job) or attempt < 1 or not is_safe_name(name):
            raise refuse("invalid_request", "The name of an output has no slash and at most 150 bytes.", "name")
        limit = bounds.of(name, self.max_output_bytes)
        try:
            async with self._rooms.enter(job, attempt, name, sha256, limit, bounds) as coming:
                yield coming
        finally:
            self.touched.add((job, attempt))

    async def received(self, job: str, attempt: int, sha256: str) -> int:
        """How many bytes of an output with this digest have come, before a connection broke; 0 for none.

        Who asks has lost that connection, whatever we know of it: it is ended, so that its bytes are all there.
        """
        return await self._drafts.received(part_name(job, attempt, sha256))

    async def place(self, job: str, attempt: int, name: str, sha256: str, bounds: Bounds = WIDEST) -> str:
        """A URL to which exactly this output is PUT, past the coordinator; "" where outputs come to us.

        It can not be gone on with: an upload that broke begins anew. Raises FaultError as `put_output`.
        """
        part_name(job, attempt, sha256)
        async with self._entered(job, attempt, name, sha256, bounds):
            return ""

    async def claim(
        self, job: str, attempt: int, name: str, size: int, sha256: str, bounds: Bounds = WIDEST
    ) -> StoredBlob:
        """Take over what was left at a `place`, once its size and its bytes are those that were declared.

        Raises:
            FaultError: upload_failed (it is not there, or another; it is deleted), payload_too_large.
        """
        raise refuse("upload_failed", f"The output {name[:_MAX_NAME_BYTES]!r} has not come.")

    # ---- out -----------------------------------------------------------------------------------------------

    async def find_output(self, job: str, attempt: int, name: str, size: int, sha256: str) -> str | None:
        """The key of an output, when it has this size and digest."""
        if not (is_safe_id(job) and is_safe_name(name) and _SHA256.match(sha256)):
            return None
        key = output_key(job, attempt, name, sha256)
        return key if await run_sync(self.size, key) == size else None

    async def find_named(self, job: str, attempt: int, name: str) -> str | None:
        """The key of the latest output that was uploaded under this name."""
        found = await run_sync(self._outputs, job, attempt)
        mine = [(one.when, one.name) for one in found if one.name[65:] == name]
        return f"{job}/{attempt}/{max(mine)[1]}" if mine else None

    async def open(self, key: str) -> anyio.AsyncFile[bytes]:
        """Open a file for reading. Raises FaultError(not_found)."""
        return anyio.wrap_file(await run_sync(self.reader, key))

    async def read(self, key: str, limit: int) -> bytes:
        """The whole file. Raises FaultError: not_found, payload_too_large beyond `limit` bytes."""
        async with await self.open(key) as file:
            data = await file.read(limit + 1)
        if len(data) > limit:
            raise refuse("payload_too_large", f"The file exceeds {limit} bytes.")
        return data

    @abstractmethod
    def size(self, key: str) -> int | None:
        """Bytes of a file; None when it is not there. Blocks. Raises FaultError(not_found) for what is no key."""

    @abstractmethod
    def reader(self, key: str) -> BinaryIO:
        """The file, open for reading; it can seek. Blocks, and so does what is read. Raises FaultError(not_found)."""

    @abstractmethod
    def delete(self, job: str, inputs: Iterable[str] = ()) -> None:
        """Delete all outputs of a job and these inputs. Blocks; for a thread."""

    @abstractmethod
    def tidy(self, job: str, attempt: int, keep: Collection[str]) -> None:
        """Delete what an attempt left that is over, but for these outputs. Blocks."""

    @abstractmethod
    def left_lately(self, since_s: float) -> dict[tuple[str, int], set[str]]:
        """Which attempts left something in the last `since_s` seconds, whichever coordinator received it.

        With the keys of their outputs, and "" for what is none, or not yet. Blocks; it reads the names of all files.
        """

    @abstractmethod
    def sweep(self, input_used: Callable[[str], bool], job_known: Callable[[str], bool]) -> int:
        """Delete files that belong to no job and are older than an hour; return how many. Blocks."""

    @abstractmethod
    def _publish(self, draft: Draft, key: str) -> None:
        """Make a received file visible under its key, durably. Blocks."""

    @abstractmethod
    def _outputs(self, job: str, attempt: int) -> list[Output]:
        """An attempt's outputs. Blocks."""

    def _lying(self, job: str, attempt: int) -> dict[str, int]:
        """What an attempt has left: {digest}-{name} of outputs, {digest} of parts -> bytes. Blocks."""
        return self._drafts.parts(job, attempt) | {one.name: one.size for one in self._outputs(job, attempt)}

    # ---- signed URLs ---------------------------------------------------------------------------------------

    def url(self, key: str, ttl_s: float) -> str:
        """A URL by which a worker fetches this one file for `ttl_s` seconds at most; may be relative to us."""
        return self.client_url(key, ttl_s)

    def client_url(self, key: str, ttl_s: float) -> str:
        """A URL, relative to the coordinator, that fetches this one file for `ttl_s` seconds."""
        return f"{PREFIX}/{quote(key)}?{self._signed('GET', key, ttl_s)}"

    def upload_template(self, job: str, attempt: int, ttl_s: float, bounds: Bounds = WIDEST) -> str:
        """A URL with `{name}` in it, to which outputs of this one attempt are PUT for `ttl_s` seconds.

        Who fills it in percent-encodes the name.
        """
        signed = self._signed("PUT", upload_scope(job, attempt, bounds.text()), ttl_s)
        return f"{PREFIX}/{job}/{attempt}/{{name}}?max={bounds.text()}&{signed}"

    def check(self, method: str, scope: str, expires: str, signature: str) -> None:
        """Judge a signed request.

        Args:
            method: GET or PUT.
            scope: the key (GET), or `upload_scope` (PUT).
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


# ---- names --------------------------------------------------------------------------------------------------


def object_name(key: str) -> str:
    """Where the file of a key lies below the folder or prefix. Raises FaultError(not_found) for what is no key."""
    if _INPUT_KEY.match(key):
        return f"in/{key}"
    job, _, rest = key.partition("/")
    attempt, _, name = rest.partition("/")
    digest, dash, plain = name[:64], name[64:65], name[65:]
    number = attempt.isascii() and attempt.isdigit() and len(attempt) < 12
    if not (is_safe_id(job) and number and _SHA256.match(digest) and dash == "-" and is_safe_name(plain)):
        raise refuse("not_found", "There is no such file.")
    return f"out/{key}"


def is_safe_name(name: str) -> bool:
    """Whether an output may have this name: one path component, printable, at most 150 bytes."""
    if name in ("", ".", "..") or "/" in name or "\\" in name or not name.isprintable():
        return False
    return len(name.encode("utf-8", "replace")) <= _MAX_NAME_BYTES


def output_key(job: str, attempt: int, name: str, sha256: str) -> str:
    """The key of an output."""
    return f"{job}/{attempt}/{sha256}-{name}"


def upload_scope(job: str, attempt: int, bounds: str) -> str:
    """What the signature of an upload is for."""
    return f"{job}/{attempt}/{bounds}"


def attempt_of(key: str) -> tuple[str, int]:
    """Whose output this is. Raises ValueError for a key of none."""
    job, attempt, _name = key.split("/", 2)
    return job, int(attempt)


def plain_name(key: str) -> str:
    """What a file is called by who made it; the key itself for an input."""
    name = key.rsplit("/", 1)[-1]
    return name[65:] if "/" in key else name


def part_name(job: str, attempt: int, sha256: str) -> str:
    """What is kept of an output whose connection broke. Raises FaultError(invalid_request)."""
    if not is_safe_id(job) or attempt < 1 or not _SHA256.match(sha256.lower()):
        raise refuse("invalid_request", "A digest has 64 hexadecimal digits.", "X-Content-SHA256")
    return f"{job}.{attempt}.{sha256.lower()}"


def below(folder: Path, key: str) -> Path:
    """`object_name` as a path."""
    return folder / object_name(key)
