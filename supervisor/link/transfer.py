"""Files over HTTP: inputs in, outputs out, both checked by size and sha256.

A relative URL belongs to the coordinator and is opened with this worker's token; an absolute one (a presigned
store) gets no token. Where the template of an offer says `direct=1`, a large output goes past the coordinator to a
URL that it names for this one file, whole or anew, and the coordinator is told when it is there.
"""

from __future__ import annotations

import hashlib
import os
import urllib.parse
from collections.abc import Callable

import msgspec

from protocol.engine_wire import OutputFile
from protocol.faults import FaultError, refuse
from protocol.framing import UNDECODABLE
from protocol.link_wire import FileRef
from supervisor.link.reconnect import Backoff
from supervisor.link.session import Address
from supervisor.link.tries import AGAIN, Moved, Transient, judge, nobody, patience, persist, pour
from supervisor.link.web import Moving, Web

FETCH_PATIENCE_S = 60.0  # then another worker may have a better way to the file
UPLOAD_PATIENCE_S = 600.0  # a result has cost GPU time: try much longer
RESUME_BYTES = 2**20  # asking how much has come is worth it from here on
IDLE_S = 30.0  # without a byte, in either direction
DIRECT_TRIES = 3  # past the coordinator; then through it, as that way is known to work
CLAIM_S = 120.0  # a coordinator reads 2 GiB from its store in this time

Output = Callable[[], int] | bytes


class Transfer(Web):
    """The supervisor's HTTP client towards one coordinator. An async context manager.

    Opened at the first use, or by `warm_up`.
    """

    def __init__(
        self,
        address: Address,
        *,
        backoff: Callable[[], Backoff] = lambda: Backoff(0.5, 15.0),
        fetch_patience_s: float = FETCH_PATIENCE_S,
        upload_patience_s: float = UPLOAD_PATIENCE_S,
    ) -> None:
        super().__init__(address.tls, IDLE_S)
        self._address = address
        self._backoff = backoff
        self._fetch_patience_s, self._upload_patience_s = fetch_patience_s, upload_patience_s

    async def warm_up(self) -> None:
        """Import and open the client before the first file needs it."""
        await self.client()

    def _target(self, url: str) -> tuple[str, dict[str, str]]:
        base = self._address.http_url
        # Not urljoin: "/v1/…" has to stay below the path prefix of a coordinator that has one.
        whole = url if urllib.parse.urlsplit(url).scheme else base + url.lstrip("/")
        ours = urllib.parse.urlsplit(whole)[:2] == urllib.parse.urlsplit(base)[:2]
        return whole, {"Authorization": f"Bearer {self._address.token}"} if ours else {}

    # ---- in

    async def fetch(self, file: FileRef, target: Callable[[], int], moved: Moved = nobody) -> None:
        """Write an input file.

        Args:
            target: opens it anew for every try, empty; returns the descriptor. May raise OSError.
            moved: told of the bytes that came, piece by piece.

        Raises:
            FaultError: input_unavailable, worker_disk_full.

        Cancellation: a partial file is left; the attempt's folder goes with the attempt.
        """

        async def once() -> None:
            await self._fetch_once(file, target, moved)

        try:
            await persist(self, once, "input_unavailable", self._backoff(), self._fetch_patience_s)
        except Transient as error:
            sentence = f"The input {file.name!r} cannot be fetched: {error}."
            raise refuse("input_unavailable", sentence, file.name) from None

    async def _fetch_once(self, file: FileRef, target: Callable[[], int], moved: Moved) -> None:
        client = await self.client()
        url, headers = self._target(file.url)
        digest = hashlib.sha256()
        async with client.stream("GET", url, headers=headers) as response:
            judge(response.status_code, "input_unavailable", f"The input {file.name!r} cannot be fetched")
            size = await pour(response, target(), file.size, moved, digest.update)
        if size != file.size:
            more = "more than " if size > file.size else ""
            raise Transient(f"{more}{min(size, file.size)} of {file.size} bytes came")
        if digest.hexdigest() != file.sha256.lower():
            raise Transient(f"its sha256 is {digest.hexdigest()}, not {file.sha256.lower()}")

    # ---- out

    async def upload(
        self,
        template: str,
        file: OutputFile,
        source: Output,
        until: float | None = None,
        moved: Moved = nobody,
        patience_s: float | None = None,
    ) -> None:
        """PUT an output to `template` with its name filled in.

        Args:
            source: opens the file anew for every try and returns the descriptor, or the content itself.
            until: trio time after which nobody wants it; None sets no such limit.
            patience_s: for how long to try; None means the usual.
            moved: told of the bytes that went out.

        Raises:
            FaultError: upload_failed; engine_protocol when the file is not what the engine said.
        """
        if not template:
            raise refuse("upload_failed", "The offer names no place for output files.")

        tries = 0

        async def once() -> None:
            nonlocal tries
            tries += 1
            if tries <= DIRECT_TRIES and file.size >= RESUME_BYTES and (url := await self._place(template, file)):
                try:
                    await self._pass_by(url, file, source, moved)
                except _Unwelcome:
                    tries = DIRECT_TRIES  # this way is none, whatever it is tried with
                    raise
                await self._claim(template, file)
                return
            at = await self._received(template, file) if tries > 1 and file.size >= RESUME_BYTES else 0
            await self._upload_once(template, file, source, moved, at)

        patience_s = patience(self._upload_patience_s if patience_s is None else patience_s, until)
        try:
            await persist(self, once, "upload_failed", self._backoff(), patience_s)
        except Transient as error:
            sentence = f"The output {file.name!r} cannot be delivered: {error}."
            raise refuse("upload_failed", sentence, file.name) from None

    async def _place(self, template: str, file: OutputFile) -> str:
        """Where past the coordinator this output goes; "" when it goes to the coordinator itself."""
        query = template.partition("?")[2]
        if "direct=1" not in query.split("&"):
            return ""
        client = await self.client()
        url, headers = self._target(_filled(template, file, "/place"))
        headers |= {"X-Content-SHA256": file.sha256}
        response, told = await self.ask(client.build_request("GET", url, headers=headers))
        if 400 <= response.status_code < 500 and response.status_code not in AGAIN:
            return ""  # of an earlier make, beside the one that wrote the template; if the file is refused, it says so
        judge(response.status_code, "upload_failed", f"The output {file.name!r} has no place to go to")
        place = _Place.of(told or b"")
        # A coordinator that is spoken to in TLS must not send a result out in the clear.
        if place and not place.startswith("https://") and (place[:7] != "http://" or url.startswith("https:")):
            raise refuse("upload_failed", "The coordinator named a place for an output that is no URL of its kind.")
        return place

    async def _pass_by(self, url: str, file: OutputFile, source: Output, moved: Moved) -> None:
        """PUT an output to its place past the coordinator. Raises Transient, FaultError for a file that is another."""
        import httpx

        try:
            await self._upload_once(url, file, source, moved, 0)
        except FaultError as error:
            if error.fault.code != "upload_failed":
                raise
            raise _Unwelcome(error.fault.message) from None
        except (httpx.InvalidURL, ValueError) as error:
            raise _Unwelcome(f"the place that was named is no address: {error}") from None

    async def _claim(self, template: str, file: OutputFile) -> None:
        """Tell the coordinator that the output is at its place; it looks at every byte before it says yes."""
        client = await self.client()
        url, headers = self._target(_filled(template, file))
        headers |= {"X-Content-SHA256": file.sha256, "X-Placed-Bytes": str(file.size)}
        request = client.build_request("PUT", url, headers=headers, timeout=CLAIM_S)
        response, _told = await self.ask(request, within_s=CLAIM_S)
        judge(response.status_code, "upload_failed", f"The output {file.name!r} was not taken")

    async def _received(self, template: str, file: OutputFile) -> int:
        """How much of an output has come over before a connection broke; 0 when the store cannot tell."""
        client = await self.client()
        url, headers = self._target(_filled(template, file, "/received"))
        if not headers:
            return 0  # a store of somebody else's
        headers |= {"X-Content-SHA256": file.sha256}
        response, _told = await self.ask(client.build_request("GET", url, headers=headers))
        told = response.headers.get("upload-offset", "") if response.status_code == 200 else ""
        return int(told) if told.isdecimal() and len(told) < 20 and int(told) < file.size else 0

    async def _upload_once(self, template: str, file: OutputFile, source: Output, moved: Moved, at: int) -> None:
        client = await self.client()
        from supervisor.link.pieces import Held, Pieces  # with httpx, which is here now

        url, headers = self._target(_filled(template, file))
        headers |= {
            "Content-Type": file.mime,
            "Content-Length": str(file.size - at),
            "X-Content-SHA256": file.sha256,
        }
        if at:
            headers["Content-Range"] = f"bytes {at}-{file.size - 1}/{file.size}"
        request = client.build_request("PUT", url, headers=headers)
        moving = Moving(moved)
        fd = -1 if isinstance(source, bytes) else source()
        request.stream = Held(source, moving, at) if isinstance(source, bytes) else Pieces(fd, file, moving, at)
        try:
            response, _told = await self.ask(request, patience=moving.patience)
        finally:
            if fd >= 0:
                os.close(fd)
        if at and response.status_code == 409:
            raise Transient("the coordinator has another part of it")  # asked for anew, and sent from there
        if response.status_code == 403 and "Authorization" not in headers:
            raise Transient("HTTP 403")  # a URL that expired on the way; the next try gets another
        judge(response.status_code, "upload_failed", f"The output {file.name!r} cannot be delivered")


class _Unwelcome(Transient):
    """A place past the coordinator does not take the file."""


class _Place(msgspec.Struct, frozen=True):
    """Where an output may go; "" when only the coordinator itself takes it."""

    url: str = ""

    @staticmethod
    def of(body: bytes) -> str:
        """The URL that an answer names. Raises Transient: the answer is none of a coordinator."""
        try:
            return msgspec.json.decode(body, type=_Place).url
        except UNDECODABLE as error:
            raise Transient(f"the coordinator named no place: {error}") from None


def _filled(template: str, file: OutputFile, suffix: str = "") -> str:
    """The URL of an output, or of what is asked about it."""
    path, mark, query = template.replace("{name}", urllib.parse.quote(file.name, safe="")).partition("?")
    return f"{path}{suffix}{mark}{query}"
