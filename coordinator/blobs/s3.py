"""Blobs in any store with an S3 API. `obstore` speaks it, in threads: its own coroutines are asyncio's alone.

    prefix/secret, in/…, out/…                 as in `blobs`; a name in out/ is in base64, as a key may hold less
    prefix/up/{job}/{attempt}/{sha256}-{name}  what a worker left by a URL of ours: nobody's word but its own
    prefix/check/…                             copies of these that are being looked at

A presigned PUT bounds neither size nor content, and may be used again until it expires. So what it wrote is copied
to where no URL leads, hashed there byte by byte, and only then copied to `out/`. obstore cannot presign the parts of
a multipart upload (its issue 778), so an upload past us that breaks begins anew; through us it goes on.

What comes through us is received whole into the local folder `drafts` first.
"""

from __future__ import annotations

import base64
import contextlib
import datetime
import functools
import hashlib
import io
import logging
import re
import secrets
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import obstore
from anyio.to_thread import run_sync
from obstore.exceptions import AlreadyExistsError, BaseError, NotSupportedError
from obstore.store import S3Store

from coordinator.blobs.base import ORPHAN_S, SECRET_BYTES, Blobs, Output, StoredBlob, attempt_of, object_name, part_name
from coordinator.blobs.bounds import MAX_OUTPUT_BYTES, WIDEST, Bounds
from coordinator.blobs.drafts import Draft, Drafts
from protocol.faults import FaultError, refuse
from protocol.ids import is_safe_id
from protocol.link_wire import RESULT_FILE

log = logging.getLogger(__name__)

FETCH_S = 3600.0  # longest life of a URL that fetches an input
PLACE_S = 900.0  # of one that leaves an output; it has to begin by then
LEFT_S = 6 * 3600.0  # what a worker left and did not declare in this time is nobody's
PIECE_BYTES = 2**20
_CODE = re.compile(r"<Code>(\w{1,60})</Code>")


class S3Blobs(Blobs):
    """See the module.

    Args:
        store: the bucket, below the prefix.
        drafts: a local folder.
        max_output_bytes, now_s: as in `Blobs`.

    Raises:
        FaultError: the store refuses, or cannot be reached.
    """

    lasting_s = PLACE_S + 60.0  # clocks differ

    def __init__(
        self,
        store: S3Store,
        drafts: Path,
        max_output_bytes: int = MAX_OUTPUT_BYTES,
        now_s: Callable[[], float] = time.time,
    ) -> None:
        self._store = store
        self._placed: dict[tuple[str, int], dict[str, int]] = {}  # {digest}-{name} of what may be on its way past us
        super().__init__(Drafts(drafts, now_s), _secret(store), max_output_bytes, now_s)

    # ---- in ------------------------------------------------------------------------------------------------

    def upload_template(self, job: str, attempt: int, ttl_s: float, bounds: Bounds = WIDEST) -> str:
        """See `Blobs`. What has close bounds comes through us, where they are kept while it comes."""
        return super().upload_template(job, attempt, ttl_s, bounds) + ("&direct=1" if bounds.files else "")

    async def place(self, job: str, attempt: int, name: str, sha256: str, bounds: Bounds = WIDEST) -> str:
        """See `Blobs`; "" for the file of a result."""
        sha256 = sha256.lower()
        nowhere = await super().place(job, attempt, name, sha256, bounds)
        if name == RESULT_FILE:
            return nowhere
        self._placed.setdefault((job, attempt), {})[f"{sha256}-{name}"] = 0
        return await run_sync(self._presigned, "PUT", _left(job, attempt, name, sha256), PLACE_S)

    async def claim(
        self, job: str, attempt: int, name: str, size: int, sha256: str, bounds: Bounds = WIDEST
    ) -> StoredBlob:
        """See `Blobs`."""
        if (known := await self.find_output(job, attempt, name, size, sha256)) is not None:
            return StoredBlob(known, size, sha256)  # asked again, as the answer was lost
        part_name(job, attempt, sha256)
        async with self._entered(job, attempt, name, sha256, bounds) as coming:
            return await run_sync(self._claim, job, attempt, name, size, sha256, coming.grow)

    def _claim(
        self, job: str, attempt: int, name: str, size: int, sha256: str, grow: Callable[[int], None]
    ) -> StoredBlob:
        left, key = _left(job, attempt, name, sha256), f"{job}/{attempt}/{sha256}-{name}"
        copy = f"check/{secrets.token_hex(16)}"
        with _spoken():
            there = self._length(left)
            try:
                if there is None:
                    raise refuse("upload_failed", "The output has not come to its place; send it again.")
                grow(there)
                if there == size:
                    obstore.copy(self._store, left, copy)
                if there != size or self._digest(copy, size) != sha256:
                    raise refuse("upload_failed", "The output arrived with another size or sha256 than announced.")
                obstore.copy(self._store, copy, _name(key))
            finally:
                self._delete([left, copy])
        return StoredBlob(key, size, sha256)

    def _digest(self, name: str, size: int) -> str:
        digest = hashlib.sha256()
        with io.BufferedReader(_Remote(self._store, name, size), PIECE_BYTES) as file:
            while piece := file.read(PIECE_BYTES):
                digest.update(piece)
        return digest.hexdigest()

    def _publish(self, draft: Draft, key: str) -> None:
        with _spoken():
            obstore.put(self._store, _name(key), draft.path)
        draft.spoiled = True  # it is there now, and here no more

    # ---- out -----------------------------------------------------------------------------------------------

    def url(self, key: str, ttl_s: float) -> str:
        """See `Blobs`: presigned, for an hour at most."""
        return self._presigned("GET", _name(key), min(ttl_s, FETCH_S))

    def _presigned(self, method: Any, name: str, ttl_s: float) -> str:
        with _spoken():
            return obstore.sign(self._store, method, name, datetime.timedelta(seconds=ttl_s))

    def size(self, key: str) -> int | None:
        """See `Blobs`."""
        name = _name(key)
        with _spoken():
            return self._length(name)

    def reader(self, key: str) -> BinaryIO:
        """See `Blobs`."""
        size = self.size(key)
        if size is None:
            raise refuse("not_found", "The file is gone; files are deleted with their job.")
        return io.BufferedReader(_Remote(self._store, _name(key), size), PIECE_BYTES)

    def delete(self, job: str, inputs: Iterable[str] = ()) -> None:
        """See `Blobs`."""
        names = [_name(key) for key in inputs]
        with _spoken():
            if is_safe_id(job):
                names += [name for folder in ("out", "up") for name, _ in self._listed(f"{folder}/{job}")]
                self._drafts.forget(job)
            self._delete(names)

    def tidy(self, job: str, attempt: int, keep: Collection[str]) -> None:
        """See `Blobs`."""
        self._drafts.forget(job, attempt)
        self._placed.pop((job, attempt), None)
        kept = {_name(key) for key in keep}
        with _spoken():
            found = [name for folder in ("out", "up") for name, _ in self._listed(f"{folder}/{job}/{attempt}")]
            self._delete([name for name in found if name not in kept])

    def left_lately(self, since_s: float) -> dict[tuple[str, int], set[str]]:
        """See `Blobs`."""
        since = self._now_s() - since_s
        found = {whose: {""} for whose in self._drafts.attempts()}
        with _spoken():
            for folder in ("out", "up"):
                for name, when in self._listed(folder):
                    if when >= since and (key := _key(name.partition("/")[2])):
                        found.setdefault(attempt_of(key), set()).add(key if folder == "out" else "")
        return found

    def sweep(self, input_used: Callable[[str], bool], job_known: Callable[[str], bool]) -> int:
        """See `Blobs`. Reads the names of all files; what workers left and did not declare goes after six hours."""
        now, known = self._now_s(), functools.cache(job_known)
        lost: list[str] = []
        with _spoken():
            for name, when in self._listed(""):
                folder, _, rest = name.partition("/")
                age, job = now - when, rest.partition("/")[0]
                orphan = {
                    "in": age > ORPHAN_S and not input_used(rest),
                    "out": age > ORPHAN_S and not known(job),
                    "up": age > LEFT_S or (age > ORPHAN_S and not known(job)),
                    "check": age > LEFT_S,
                }
                if orphan.get(folder, False):
                    lost.append(name)
            self._delete(lost)
        return len(lost) + self._drafts.sweep()

    def _outputs(self, job: str, attempt: int) -> list[Output]:
        return self._files("out", job, attempt)

    def _lying(self, job: str, attempt: int) -> dict[str, int]:
        left = {one.name: one.size for one in self._files("up", job, attempt)}
        return self._placed.get((job, attempt), {}) | left | super()._lying(job, attempt)

    def _files(self, folder: str, job: str, attempt: int) -> list[Output]:
        with _spoken():
            return [
                Output(key.rpartition("/")[2], one["last_modified"].timestamp(), one["size"])
                for page in obstore.list(self._store, prefix=f"{folder}/{job}/{attempt}")
                for one in page
                if (key := _key(one["path"].partition("/")[2]))
            ]

    # ---- the store -----------------------------------------------------------------------------------------

    def _length(self, name: str) -> int | None:
        try:
            return obstore.head(self._store, name)["size"]
        except FileNotFoundError:
            return None

    def _listed(self, below: str) -> Iterator[tuple[str, float]]:
        for page in obstore.list(self._store, prefix=below or None):
            for one in page:
                yield one["path"], one["last_modified"].timestamp()

    def _delete(self, names: list[str]) -> None:
        if names:
            with contextlib.suppress(FileNotFoundError):
                obstore.delete(self._store, names)


class _Remote(io.RawIOBase):
    """One object, by ranges; an `io.BufferedReader` around it makes them large."""

    def __init__(self, store: S3Store, name: str, size: int) -> None:
        self._store, self._name, self._size, self._at = store, name, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        count = min(len(buffer), max(0, self._size - self._at))
        if not count:
            return 0
        with _spoken():
            piece = bytes(obstore.get_range(self._store, self._name, start=self._at, length=count))
        buffer[: len(piece)] = piece
        self._at += len(piece)
        return len(piece)


# ---- names and words ----------------------------------------------------------------------------------------


def _name(key: str) -> str:
    """A key's object. Raises FaultError(not_found) for what is no key."""
    name = object_name(key)
    if name.startswith("in/"):
        return name
    folder, _, last = name.rpartition("/")
    return f"{folder}/{last[:65]}{base64.urlsafe_b64encode(last[65:].encode()).decode().rstrip('=')}"


def _key(coded: str) -> str:
    """The key of what lies in out/ or up/ under this name; "" for what is not ours: others may use the bucket."""
    folder, _, last = coded.rpartition("/")
    name = last[65:]
    with contextlib.suppress(ValueError, FaultError):
        key = f"{folder}/{last[:65]}{base64.urlsafe_b64decode(name + '=' * (-len(name) % 4)).decode()}"
        return key if object_name(key).startswith("out/") else ""
    return ""


def _left(job: str, attempt: int, name: str, sha256: str) -> str:
    return "up/" + _name(f"{job}/{attempt}/{sha256}-{name}").removeprefix("out/")


@contextlib.contextmanager
def _spoken() -> Iterator[None]:
    """The one place where obstore's exceptions become ours. Its texts hold URLs and keys' names: they go nowhere."""
    try:
        yield
    except FileNotFoundError:
        raise refuse("not_found", "The file is gone; files are deleted with their job.") from None
    except BaseError as error:
        log.warning("The store of files has trouble: %s", words(error))
        raise refuse("overloaded", "The store of files cannot be used now; try again later.", retry_after_s=5) from None


def words(error: BaseException) -> str:
    """What S3 said, by its code alone; else the kind of trouble."""
    found = _CODE.search(str(error))
    return found[1] if found else type(error).__name__


def _secret(store: S3Store) -> bytes:
    """Read the key of our own signatures, or make it: all replicas over one bucket have the same."""
    with _spoken():
        while True:
            with contextlib.suppress(FileNotFoundError):
                return bytes(obstore.get(store, "secret").bytes())
            made = secrets.token_bytes(SECRET_BYTES)
            try:
                obstore.put(store, "secret", made, mode="create")
            except AlreadyExistsError:
                continue  # another replica began at the same moment: its secret counts
            except NotSupportedError:
                obstore.put(store, "secret", made)  # a store without conditional writes: begin one replica first
