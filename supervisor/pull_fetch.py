"""One file over HTTP, resumed: used by the pull child, never in the supervisor's own process.

A download lies in `NAME.part` beside its target, with `NAME.part.json` that says what it is a part of. It is
resumed with `Range` and `If-Range`, so a file that changed on the server starts over instead of being spliced; where
the server gives no validator, it is resumed only if a sha256 will judge the whole. The target appears by rename,
after the digest was checked.
"""

from __future__ import annotations

import email.utils
import errno
import hashlib
import ipaddress
import os
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import BinaryIO

import httpx
import msgspec

ATTEMPTS = 6  # in a row without a new byte
FIRST_WAIT_S = 0.2  # doubles with each attempt in a row
LONGEST_WAIT_S = 10.0
LONGEST_ASKED_S = 120.0  # what a server may ask for with Retry-After; beyond it the user is told instead
READ_TIMEOUT_S = 30.0
BLOCK_BYTES = 2**20
SPARE_BYTES = 64 * 2**20  # stays free on the disk: others live there too
# A quota, and a limit on the size of files (ulimit -f, FAT32), end a download as a full disk does.
_NO_ROOM = {
    errno.ENOSPC: "No space is left",
    errno.EDQUOT: "The disk quota of this user is used up",
    errno.EFBIG: "Files of this size are not allowed",
}
_RETRIED = (408, 425, 429, 500, 502, 503, 504)

OnBytes = Callable[[int], None]  # bytes of this file that are here now
OnNote = Callable[[str], None]


class FetchFailed(Exception):
    """The file cannot be fetched; the text is one sentence with the cure."""


class _Part(msgspec.Struct, frozen=True):
    """What a part file is a part of."""

    url: str
    validator: str = ""
    sha256: str = ""


class Remote(msgspec.Struct, frozen=True, kw_only=True):
    """A file to fetch.

    Attributes:
        sha256: expected digest, "" when nobody knows it.
        size_bytes: None when nobody knows it.
        limit_bytes: a larger file is not fetched; 0 sets no limit.
        headers: for the first host only; a redirect to another host loses the authorisation.
    """

    url: str
    sha256: str = ""
    size_bytes: int | None = None
    limit_bytes: int = 0
    headers: Mapping[str, str] = {}


def client() -> httpx.Client:
    """An HTTP client that refuses plain http, redirects included, except to this machine."""
    return httpx.Client(
        follow_redirects=True,
        timeout=httpx.Timeout(READ_TIMEOUT_S, connect=15.0),
        event_hooks={"request": [_only_safe], "response": [without_text]},
    )


def without_text(response: httpx.Response) -> None:
    """Leave the text of a redirect where it is: httpx would keep all of it, however long it is or unpacks to."""
    if response.has_redirect_location and isinstance(response.stream, httpx.SyncByteStream):
        response.stream.close()
        response.stream = httpx.ByteStream(b"")
        response.headers.pop("Content-Encoding", None)


def _only_safe(request: httpx.Request) -> None:
    if request.url.scheme != "https" and not is_loopback(request.url.host):
        raise FetchFailed(f"{request.url.scheme}://{request.url.host} is not encrypted; use an https address.")


def is_loopback(host: str) -> bool:
    """Whether a host name means this machine."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def fetch(
    http: httpx.Client,
    remote: Remote,
    target: Path,
    on_bytes: OnBytes,
    on_note: OnNote,
    on_size: OnBytes = lambda _bytes: None,
) -> str:
    """Fetch a file to `target` and return its sha256 hex. A complete target with the right digest is kept.

    Args:
        on_size: told how large the file is, as often as the server says it.

    Raises:
        FetchFailed: refused, not there, no space, wrong digest, or no progress in `ATTEMPTS` tries.
    """
    if target.exists():
        found = _hash(target, on_bytes)
        if not remote.sha256 or found == remote.sha256:
            return found
        target.unlink()
    target.parent.mkdir(parents=True, exist_ok=True)
    download = _Download(http, remote, target, on_bytes, on_note, on_size)
    try:
        found = download.run()
        if remote.sha256 and found != remote.sha256 and download.resumed:
            on_note(f"{target.name}: what was there from an earlier pull is damaged; starting over")
            download.forget()
            found = download.run()
        if remote.sha256 and found != remote.sha256:
            download.forget()
            raise FetchFailed(
                f"{target.name} has the sha256 {found} where {remote.sha256} was expected: the server has another"
                " file, or the digest given is not of this one."
            )
    except OSError as error:
        if error.errno in _NO_ROOM:
            raise FetchFailed(
                f"{_NO_ROOM[error.errno]} in {target.parent}: make room (`supervisor models gc` deletes what no model"
                " names) and run the same command again; what was fetched is kept."
            ) from None
        raise FetchFailed(f"{target} cannot be written: {error.strerror or error}.") from None
    download.finish()
    return found


class _Download:
    """The tries for one file."""

    def __init__(
        self, http: httpx.Client, remote: Remote, target: Path, on_bytes: OnBytes, on_note: OnNote, on_size: OnBytes
    ) -> None:
        self._http, self._remote, self._target = http, remote, target
        self._on_bytes, self._on_note, self._on_size = on_bytes, on_note, on_size
        self._part = target.with_name(target.name + ".part")
        self._about = target.with_name(target.name + ".part.json")
        self._hash = hashlib.sha256()
        self._have = 0
        self._validator = ""
        self.resumed = False

    def run(self) -> str:
        """Fetch to the end; returns the digest."""
        self._take_up()
        failures = 0
        while True:
            before = self._have
            try:
                self._once()
                self._check_size()
                return self._hash.hexdigest()
            except httpx.TooManyRedirects:
                raise FetchFailed(f"{self._host} leads from address to address; check the address.") from None
            except (httpx.InvalidURL, UnicodeError) as error:
                raise FetchFailed(f"{self._remote.url[:200]} is no address, or leads to none: {error}.") from None
            except (httpx.TransportError, _TryAgain) as error:
                failures = 1 if self._have > before else failures + 1
                if failures >= ATTEMPTS:
                    raise FetchFailed(
                        f"{self._host} does not deliver {self._target.name}: {_reason(error)}; run the same command"
                        " again to resume."
                    ) from None
                wait_s = getattr(error, "wait_s", 0.0) or min(FIRST_WAIT_S * 2**failures, LONGEST_WAIT_S)
                if wait_s > LONGEST_ASKED_S:
                    raise FetchFailed(
                        f"{self._host} asks to be left alone for {wait_s:.0f} s ({_reason(error)}); run the same"
                        " command again then."
                    ) from None
                self._on_note(f"{self._target.name}: {_reason(error)}; resuming at {self._have} bytes")
                time.sleep(wait_s)

    def forget(self) -> None:
        """Drop what was fetched."""
        self._part.unlink(missing_ok=True)
        self._about.unlink(missing_ok=True)
        self.resumed = False

    def finish(self) -> None:
        """Give the file its name. On the disk first: a name that outlives a power cut must have its content."""
        with self._part.open("rb") as file:
            os.fsync(file.fileno())
        self._part.replace(self._target)
        self._about.unlink(missing_ok=True)

    @property
    def _host(self) -> str:
        return httpx.URL(self._remote.url).host

    def _take_up(self) -> None:
        """Continue an earlier part if it belongs to the same thing."""
        self._hash, self._have, self._validator = hashlib.sha256(), 0, ""
        try:
            about = msgspec.json.decode(self._about.read_bytes(), type=_Part)
        except (OSError, msgspec.MsgspecError):
            return
        # A repository that moved on to another commit has another URL, yet often the same file: its digest tells.
        same = self._remote.sha256 != "" and about.sha256 == self._remote.sha256
        if about.url == self._remote.url and (about.validator or self._remote.sha256):
            self._validator = about.validator
        elif not same:
            return
        if not self._part.exists():
            return
        with self._part.open("rb") as file:
            while data := file.read(BLOCK_BYTES):
                self._hash.update(data)
                self._have += len(data)
                self._on_bytes(self._have)  # on a slow disk this takes long, and is no standstill
        self.resumed = self._have > 0

    def _once(self) -> None:
        if self._have and self._have == self._remote.size_bytes:
            return
        with self._http.stream("GET", self._remote.url, headers=self._headers()) as response:
            if response.status_code == 416 and _whole(response) == self._have:
                return
            self._judge(response)
            if response.status_code == 200:
                self._hash, self._have, self.resumed = hashlib.sha256(), 0, False
            self._validator = _validator(response)
            self._preflight(response)
            self._about.write_bytes(msgspec.json.encode(_Part(self._remote.url, self._validator, self._remote.sha256)))
            with self._part.open("r+b" if self._part.exists() else "w+b", buffering=0) as file:
                file.truncate(self._have)
                file.seek(self._have)
                self._receive(response, file)

    def _check_size(self) -> None:
        """A server that ends its answer in order, with another size than the hub listed, has another file."""
        expected = self._remote.size_bytes
        if expected is None or self._have == expected:
            return
        have = self._have
        self.forget()
        raise FetchFailed(
            f"{self._target.name} has {have} bytes at {self._host} where {expected} were announced: it is another file"
            " by now; run the same command again to ask anew."
        )

    def _headers(self) -> dict[str, str]:
        # Without identity a proxy may compress, and then ranges count other bytes.
        headers = {**self._remote.headers, "Accept-Encoding": "identity"}
        if self._have and (self._validator or self._remote.sha256):
            headers["Range"] = f"bytes={self._have}-"
            if self._validator:
                headers["If-Range"] = self._validator
        return headers

    def _judge(self, response: httpx.Response) -> None:
        status = response.status_code
        if status in _RETRIED:
            raise _TryAgain(f"the server answers {status}", _retry_after(response))
        if status == 416:  # what we have is longer than what is there
            self.forget()
            self._have, self._hash = 0, hashlib.sha256()
            raise _TryAgain("the file has changed on the server")
        if status == 206:
            start = response.headers.get("Content-Range", "").removeprefix("bytes ").split("-")[0]
            if start != str(self._have):
                raise FetchFailed(f"{self._host} answers a range that was not asked for; it cannot be resumed from.")
        elif status != 200:
            raise FetchFailed(f"{self._host} answers {status} for {self._target.name}: {_meaning(status)}.")

    def _preflight(self, response: httpx.Response) -> None:
        try:
            missing = int(response.headers["Content-Length"])
        except (KeyError, ValueError):
            return
        self._check_limit(self._have + missing)
        self._on_size(self._have + missing)
        need_space(self._target.parent, missing)

    def _check_limit(self, whole_bytes: int) -> None:
        if self._remote.limit_bytes and whole_bytes > self._remote.limit_bytes:
            self.forget()
            raise FetchFailed(
                f"{self._target.name} has {whole_bytes / 2**30:.2f} GiB or more, and only"
                f" {self._remote.limit_bytes / 2**30:.2f} GiB are granted for it."
            )

    def _receive(self, response: httpx.Response, file: BinaryIO) -> None:
        # No block size here: httpx would hold a block back and lose it when the connection is cut.
        for data in response.iter_raw():
            _write(file, data)
            self._hash.update(data)
            self._have += len(data)
            self._on_bytes(self._have)
            self._check_limit(self._have)
            if self._remote.size_bytes is not None and self._have > self._remote.size_bytes:
                return  # no use in fetching the rest of it; `_check_size` speaks
        length = response.headers.get("Content-Length")
        if length is None and self._remote.size_bytes is not None and self._have < self._remote.size_bytes:
            raise _TryAgain("the connection ended early")  # with a length, the HTTP library has told already


def _write(file: BinaryIO, data: bytes) -> None:
    """All of it: an unbuffered file may take a part only, the last that fits on a disk for example."""
    rest = memoryview(data)
    while rest:
        rest = rest[file.write(rest) :]


class _TryAgain(Exception):
    def __init__(self, text: str, wait_s: float = 0.0) -> None:
        super().__init__(text)
        self.wait_s = wait_s


def need_space(folder: Path, missing_bytes: int) -> None:
    """Refuse what will not fit. Raises FetchFailed."""
    free = shutil.disk_usage(folder).free
    if missing_bytes + SPARE_BYTES > free:
        raise FetchFailed(
            f"{folder} has {free / 2**30:.1f} GiB free, and {missing_bytes / 2**30:.1f} GiB are to come: free some"
            " space (`supervisor models gc` deletes what no model names), or name another folder with --models-dir."
        )


def _hash(path: Path, on_bytes: OnBytes) -> str:
    digest, done = hashlib.sha256(), 0
    with path.open("rb") as file:
        while data := file.read(BLOCK_BYTES):
            digest.update(data)
            done += len(data)
            on_bytes(done)
    return digest.hexdigest()


def _validator(response: httpx.Response) -> str:
    """A strong validator for If-Range, "" when the server gives none."""
    etag = str(response.headers.get("ETag", ""))
    if etag and not etag.startswith("W/"):
        return etag
    return "" if etag else str(response.headers.get("Last-Modified", ""))


def _whole(response: httpx.Response) -> int | None:
    text = response.headers.get("Content-Range", "").rpartition("/")[2]
    return int(text) if text.isdecimal() else None


def _retry_after(response: httpx.Response) -> float:
    """Seconds that the server asks for: a number, or a date (RFC 9110 10.2.3); 0 when it does not ask."""
    text = response.headers.get("Retry-After", "")
    if text.isdecimal():
        return float(text)
    try:
        until = email.utils.parsedate_to_datetime(text).timestamp()
    except (TypeError, ValueError):
        return 0.0
    return max(0.0, until - time.time())


def _meaning(status: int) -> str:
    return {
        401: "it wants to know who you are; give a token with --token-file or HF_TOKEN",
        403: "it does not let you have this file; accept its terms on its page, or give another token with"
        " --token-file",
        404: "there is no such file; check the address",
        410: "the file is gone",
    }.get(status, "it does not give the file")


def _reason(error: Exception) -> str:
    text = str(error)
    return f"{type(error).__name__}: {text}" if text and not isinstance(error, _TryAgain) else text or "no answer"
