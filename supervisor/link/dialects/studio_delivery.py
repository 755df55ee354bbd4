"""Files of a studio's jobs: inputs by address, results as multipart with the file in the field `image`.

A studio says neither size nor sha256 of an input, so its size is bounded by what its kind may have. A result has cost
GPU time: while the studio is away, or in trouble and without our session, it is sent again for as long as it takes.
What an answer that is no yes means is in studio_uploads.py; what can never pass (a result that is too large) ends it at
once.
"""

from __future__ import annotations

import base64
import logging
import os
import re
import urllib.parse
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

import trio

from protocol import work
from protocol.engine_wire import OutputFile
from protocol.faults import refuse
from protocol.link_wire import RESULT_FILE, FileRef
from supervisor.link.dialects import studio_frames as frames
from supervisor.link.dialects.studio_http import Http
from supervisor.link.dialects.studio_offers import Slip
from supervisor.link.dialects.studio_register import Credentials
from supervisor.link.reconnect import Backoff
from supervisor.link.transfer import FETCH_PATIENCE_S, UPLOAD_PATIENCE_S, Output
from supervisor.link.tries import AGAIN, Moved, Transient, judge, nobody, patience, persist, pour, unusable
from supervisor.link.web import Moving

if TYPE_CHECKING:
    import httpx

log = logging.getLogger(__name__)

MAX_REDIRECTS = 5
MAX_LARGE_BYTES = 64 * 2**20  # of a JSON result, which has to be in memory
_MIME = {
    "png": "image/png",
    "webp": "image/webp",
    "gif": "image/gif",
    "wav": "audio/wav",
    "mp3": "audio/mpeg",
    "mp4": "video/mp4",
}
_CONFLICT = 409
_GONE = (404, 410)
# The session says what a refused token means, and it may be another one by the next try.
_AGAIN = (401, 403, *AGAIN)


class _Released(Exception):
    """The claim is not ours now, by an answer of this status."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


class StudioDelivery:
    """The `Delivery` of this dialect.

    Args:
        base: {B}.
        credentials: those in force, or None before the registration.
        on_uploading: told that an upload is under way, and that one did not succeed.
        on_refused: told of an answer that is neither yes nor 409, and whether no other try helps; returns whether the
            job has failed for it, as the studio knows.
        on_conflict: waits until a claim that is not ours now is ours again; returns whether it is.
        on_gone: told of claims that are not ours any more.
        on_large: told of the body of a JSON result that is too large to be posted.
    """

    def __init__(
        self,
        base: str,
        http: Http,
        credentials: Callable[[], Credentials | None],
        *,
        on_uploading: Callable[[Slip, bool], None],
        on_refused: Callable[[Slip, str, bool], Awaitable[bool]],
        on_conflict: Callable[[Slip], Awaitable[bool]],
        on_gone: Callable[[Slip], None],
        on_large: Callable[[Slip, bytes], None],
        backoff: Callable[[], Backoff] = lambda: Backoff(1.0, 64.0),
    ) -> None:
        self._base, self._http, self._credentials = base, http, credentials
        self._on_uploading, self._on_refused, self._on_conflict = on_uploading, on_refused, on_conflict
        self._on_gone, self._on_large = on_gone, on_large
        self._backoff = backoff

    # ---- in

    async def fetch(self, file: FileRef, target: Callable[[], int], moved: Moved = nobody) -> None:
        """Write an input file; see `Transfer.fetch`. A size of 0 and no sha256 mean that they are not known.

        An address with data: is the content itself.
        """
        if file.url[:5].lower() == "data:":
            moved(await trio.to_thread.run_sync(_unpack, file, target))
            return

        async def once() -> None:
            await self._fetch_once(file, target, moved)

        try:
            await persist(self._http, once, "input_unavailable", self._backoff(), FETCH_PATIENCE_S)
        except Transient as error:
            sentence = f"The input {file.name!r} cannot be fetched: {error}."
            raise refuse("input_unavailable", sentence, file.name) from None

    async def _fetch_once(self, file: FileRef, target: Callable[[], int], moved: Moved) -> None:
        client = await self._http.client()
        url = urllib.parse.urljoin(self._base + "/", file.url)
        for _hop in range(MAX_REDIRECTS + 1):
            async with client.stream("GET", url, headers=self._headers(url)) as response:
                if response.has_redirect_location:
                    url = urllib.parse.urljoin(url, response.headers["location"])
                    if urllib.parse.urlsplit(url).scheme not in ("http", "https"):
                        raise refuse("input_unavailable", f"The input {file.name!r} is redirected to no http address.")
                    continue
                judge(response.status_code, "input_unavailable", f"The input {file.name!r} cannot be fetched", _AGAIN)
                await self._write(response, file, target, moved)
                return
        raise refuse("input_unavailable", f"The input {file.name!r} is redirected more than {MAX_REDIRECTS} times.")

    async def _write(self, response: httpx.Response, file: FileRef, target: Callable[[], int], moved: Moved) -> None:
        ceiling = work.MAX_INPUT_BYTES.get(file.name, work.MAX_AUDIO_BYTES)
        size = await pour(response, target(), ceiling, moved, lambda _piece: None)
        if size > ceiling:
            raise refuse("payload_too_large", f"The input {file.name!r} has more than {ceiling} bytes.", file.name)
        told = response.headers.get("content-length", "")
        if told.isdecimal() and "content-encoding" not in response.headers and int(told) != size:
            raise Transient(f"{size} of {told} bytes came")

    def _headers(self, url: str) -> dict[str, str]:
        known = self._credentials()
        ours = urllib.parse.urlsplit(url)[:2] == urllib.parse.urlsplit(self._base)[:2]
        return {"Authorization": f"Bearer {known.auth_token}"} if ours and known is not None else {}

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
        """Deliver an output; see `Transfer.upload`. `template` is the slip of its claim."""
        try:
            slip = Slip.read(template)
        except ValueError as error:
            raise refuse("upload_failed", f"The result belongs to a claim of another dialect: {error}.") from None
        if file.name == RESULT_FILE:
            if slip.kind in frames.JSON_KINDS:
                self._on_large(slip, await _whole(file, source))
            return  # of the other kinds, studios have no use for it

        async def once() -> None:
            self._on_uploading(slip, True)
            done = False
            try:
                await self._upload_once(slip, file, source, moved)
                done = True
            finally:
                if not done:
                    self._on_uploading(slip, False)

        patience_s = patience(UPLOAD_PATIENCE_S if patience_s is None else patience_s, until)
        try:
            await self._until_released(slip, file, once, patience_s)
        except Transient as error:
            raise refuse("upload_failed", f"The output {file.name!r} cannot be delivered: {error}.") from None

    async def _until_released(
        self, slip: Slip, file: OutputFile, once: Callable[[], Awaitable[None]], patience_s: float
    ) -> None:
        while True:
            try:
                return await persist(self._http, once, "upload_failed", self._backoff(), patience_s)
            except _Released as released:
                status = released.status
            log.info("the studio does not count this job as ours now", extra={"job": slip.job})
            if not await self._on_conflict(slip):
                self._on_gone(slip)
                judge(status, "upload_failed", f"The output {file.name!r} cannot be delivered")

    async def _upload_once(self, slip: Slip, file: OutputFile, source: Output, moved: Moved) -> None:
        known = self._credentials()
        if known is None:
            raise Transient("this worker is not registered")
        client = await self._http.client()
        from supervisor.link.dialects.studio_multipart import Multipart  # after httpx, which takes its time

        moving = Moving(moved)
        ext = slip.ext if re.fullmatch(r"[A-Za-z0-9]{1,8}", slip.ext) else "bin"
        form = Multipart(
            {"prompt": slip.prompt, "ext": slip.ext},
            f"{slip.theirs}.{ext}",
            _MIME.get(slip.ext, "application/octet-stream"),
            file,
            moving,
        )
        worker, job = _segment(known.worker_id), _segment(slip.theirs)
        headers = {"Authorization": f"Bearer {known.auth_token}", **form.headers}
        request = client.build_request("POST", f"{self._base}/workers/{worker}/jobs/{job}/complete", headers=headers)
        fd = -1 if isinstance(source, bytes) else source()
        request.stream = form.over(source if isinstance(source, bytes) else fd)
        try:
            response, _told = await self._http.ask(request, patience=moving.patience)
        finally:
            if fd >= 0:
                os.close(fd)
        await self._judge(slip, response.status_code, f"The output {file.name!r} cannot be delivered")

    async def _judge(self, slip: Slip, status: int, sentence: str) -> None:
        """What an answer means. Raises _Released, Transient, FaultError."""
        if status == _CONFLICT:
            raise _Released(status)
        gone = status in _GONE
        if gone or status >= 500 or status in _AGAIN:
            why = f"{sentence}: HTTP {status}."
            if await self._on_refused(slip, why, gone):
                raise refuse("upload_failed", why)
            if gone:
                raise _Released(status)
        judge(status, "upload_failed", sentence, _AGAIN)


def _segment(text: str) -> str:
    """As one part of a path, whatever it is."""
    # A part of dots alone would be a step up, and is a word of its own here.
    return urllib.parse.quote(text, safe="") if text.strip(".") else "%2E" * len(text)


def _unpack(file: FileRef, target: Callable[[], int]) -> int:
    """Write what a data: address holds; its size. Raises FaultError."""
    head, comma, text = file.url[5:].partition(",")
    try:
        if not comma:
            raise ValueError("there is no comma")
        plain = urllib.parse.unquote_to_bytes(text)
        content = base64.b64decode(plain, validate=True) if head.lower().endswith(";base64") else plain
    except ValueError as error:
        sentence = f"The input {file.name!r} is no data: address: {error}."
        raise refuse("invalid_input_file", sentence, file.name) from None
    ceiling = work.MAX_INPUT_BYTES.get(file.name, work.MAX_AUDIO_BYTES)
    if len(content) > ceiling:
        raise refuse("payload_too_large", f"The input {file.name!r} has more than {ceiling} bytes.", file.name)
    try:
        with os.fdopen(target(), "wb") as out:
            out.write(content)
    except OSError as error:
        raise unusable(error) from None
    return len(content)


async def _whole(file: OutputFile, source: Output) -> bytes:
    """A result body. Raises FaultError: it is too large, or cannot be read."""
    if isinstance(source, bytes):
        return source
    if file.size > MAX_LARGE_BYTES:
        raise refuse("upload_failed", f"The result has {file.size} bytes, more than a frame can carry.")

    def read() -> bytes:
        with os.fdopen(source(), "rb") as content:
            return content.read(MAX_LARGE_BYTES + 1)

    try:
        return await trio.to_thread.run_sync(read)
    except OSError as error:
        raise refuse("worker_failed", f"The result cannot be read: {error}.") from None
