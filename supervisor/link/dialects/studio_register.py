"""How a worker becomes known to a studio: it asks, its owner approves, and what it then gets is kept.

    nothing ── register-request ──► pending ── poll: approved ──► registered
                                      │  └──── poll: rejected ──► rejected (the end, until the file is removed)
                                      └─────── poll: 404, 401 ──► nothing

Theory of operation. The file is the state, and it is written before what is in it is used. A studio mints a token at
each poll after the approval and forgets the one before, so nothing is polled once a token is in the file; a token that
could not be written is not used, and the next poll mints another. What was agreed with one studio is never shown to
another: the file names the address that it belongs to.
"""

from __future__ import annotations

import hashlib
import logging
import os
import secrets
import urllib.parse
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import msgspec
import trio

from protocol.framing import UNDECODABLE
from supervisor.link.dialects.studio_frames import Capabilities, Words
from supervisor.link.dialects.studio_http import Http, Trouble
from supervisor.link.outbox import sync_folder
from supervisor.link.session import SessionEnd, Why

log = logging.getLogger(__name__)

POLL_S = 30.0
LONGEST_PAUSE_S = 600.0  # whatever a server says in Retry-After
FILE = "credentials.json"
PREFIX = "/graphics/api"


def base_url(url: str) -> str:
    """{B} of the contract, over http or https. Raises ValueError: the scheme is another."""
    parts = urllib.parse.urlsplit(url)
    scheme = {"http": "http", "https": "https", "ws": "http", "wss": "https"}.get(parts.scheme)
    if scheme is None or not parts.netloc:
        raise ValueError(f"{url!r} is no http, https, ws or wss address")
    path = parts.path.rstrip("/").removesuffix(PREFIX).rstrip("/")
    return f"{scheme}://{parts.netloc}{path}{PREFIX}"


class Credentials(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The file. `install_id` stays as long as it can; the rest belongs to `studio`."""

    install_id: str
    studio: str = ""
    request_id: str = ""
    secret: str = ""
    worker_id: str = ""
    auth_token: str = ""
    rejected: str | None = None

    def __repr__(self) -> str:
        return f"Credentials({self.worker_id or self.request_id or 'nothing yet'!r})"

    @property
    def registered(self) -> bool:
        """Whether a session can be opened."""
        return bool(self.worker_id and self.auth_token)


class CredentialsFile:
    """`credentials.json` in the dialect's folder, for this user alone. All calls block."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / FILE

    def read(self, studio: str) -> Credentials:
        """What is agreed with this studio so far. Raises OSError, ValueError: the file is not ours to judge."""
        try:
            text = self.path.read_bytes()
        except FileNotFoundError:
            return Credentials(install_id=str(uuid.uuid4()), studio=studio)
        try:
            found = msgspec.json.decode(text, type=Credentials)
        except UNDECODABLE as error:
            raise ValueError(f"{self.path} cannot be read: {error}") from None
        if found.studio != studio:
            return Credentials(install_id=found.install_id, studio=studio)
        return found

    def write(self, credentials: Credentials) -> None:
        """Durably and at once. Raises OSError: the file is as it was."""
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        fresh = self.path.with_name(f".{FILE}.{secrets.token_hex(4)}")
        fd = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            with os.fdopen(fd, "wb") as out:
                out.write(msgspec.json.encode(credentials))
                out.flush()
                os.fsync(out.fileno())
            fresh.replace(self.path)
        except OSError:
            fresh.unlink(missing_ok=True)
            raise
        sync_folder(self.path.parent)


class _Created(Words, frozen=True):
    request_id: str
    status: str = "pending"


class _Polled(Words, frozen=True):
    status: Literal["pending", "approved", "rejected"]
    worker_id: str = ""
    auth_token: str = ""
    reason: str | None = None


class Registration:
    """See the module.

    Args:
        base: {B}.
        capabilities: as they are now.
        poll_s: between two requests.
        on_pending: told the id of the request that the studio says it has not decided on, "" when it is another.
    """

    def __init__(
        self,
        base: str,
        http: Http,
        file: CredentialsFile,
        capabilities: Callable[[], Capabilities],
        *,
        agent: str,
        poll_s: float = POLL_S,
        on_pending: Callable[[str], None] = lambda _request: None,
    ) -> None:
        self._base, self._http, self._file, self._capabilities = base, http, file, capabilities
        self._agent, self._poll_s = agent, poll_s
        self._on_pending = on_pending
        self._told = ""

    async def credentials(self) -> Credentials | SessionEnd:
        """Wait, for days if need be, until this worker is approved; a rejection is an end.

        Cancellation: at any moment; what was agreed so far is in the file.
        """
        while True:
            pause_s = self._poll_s
            try:
                known = await trio.to_thread.run_sync(self._file.read, self._base)
                if known.registered:
                    return known
                if known.rejected is not None:
                    return self._rejected(known.rejected)
                if not known.request_id:
                    known = await self._ask(known)
                    await trio.sleep(min(self._poll_s, 1.0))  # somebody may be waiting to approve it
                known = await self._poll(known)
                if known.registered or known.rejected is not None:
                    continue
            except (Trouble, OSError, ValueError) as problem:
                self._on_pending("")  # whatever it waits for now, it is not a person
                self._tell(f"not registered yet: {problem}")
                if isinstance(problem, Trouble) and problem.retry_after_s is not None:
                    pause_s = min(max(pause_s, problem.retry_after_s), LONGEST_PAUSE_S)
            await trio.sleep(pause_s)

    def _tell(self, sentence: str) -> None:
        """Once, and not every 30 s for days."""
        if sentence != self._told:
            self._told = sentence
            log.warning("%s", sentence)

    def _rejected(self, reason: str) -> SessionEnd:
        said = f": {reason}" if reason else ""
        sentence = f"the studio rejected this worker's registration{said}; to ask once more, remove {self._file.path}"
        return SessionEnd(Why.REFUSED, sentence)

    async def _ask(self, known: Credentials) -> Credentials:
        # The secret is in the file before its hash is at the server, or a crash in between leaves a request that
        # nobody can poll, and that stands in the way of every other from here.
        if not known.secret:
            known = await self._keep(msgspec.structs.replace(known, secret=secrets.token_hex(32)))
        body = {
            "installId": known.install_id,
            "registrationSecretHash": hashlib.sha256(known.secret.encode()).hexdigest(),
            "capabilities": msgspec.to_builtins(self._capabilities()),
            "userAgent": self._agent,
        }
        status, answer = await self._http.json("POST", f"{self._base}/workers/register-request", body=body)
        if not 200 <= status < 300:
            raise Trouble(f"the studio answered the request with HTTP {status}", answer.retry_after_s)
        created = answer.read(_Created)
        log.warning("waiting for approval at %s: request %s", self._base, created.request_id)
        return await self._keep(msgspec.structs.replace(known, request_id=created.request_id))

    async def _poll(self, known: Credentials) -> Credentials:
        path = f"/workers/register-requests/{urllib.parse.quote(known.request_id, safe='')}"
        status, answer = await self._http.json("GET", self._base + path, token=known.secret)
        if status in (401, 404):
            self._tell("the studio has forgotten the request for registration; asking anew")
            # 401: it has the request, with the hash of another secret, and would only name it again.
            install_id = known.install_id if status == 404 else str(uuid.uuid4())
            return await self._keep(Credentials(install_id=install_id, studio=known.studio))
        if not 200 <= status < 300:
            raise Trouble(f"the studio answered the poll with HTTP {status}", answer.retry_after_s)
        polled = answer.read(_Polled)
        if polled.status == "rejected":
            return await self._keep(msgspec.structs.replace(known, rejected=polled.reason or ""))
        self._on_pending(known.request_id if polled.status == "pending" else "")
        if polled.status == "pending":
            return known
        if not polled.worker_id or not polled.auth_token:
            raise Trouble("the studio approved without a workerId and an authToken")
        log.info("approved as %s", polled.worker_id)
        done = Credentials(
            install_id=known.install_id,
            studio=known.studio,
            worker_id=polled.worker_id,
            auth_token=polled.auth_token,
        )
        return await self._keep(done)

    async def _keep(self, credentials: Credentials) -> Credentials:
        """Not abandoned when cancelled: the token that the server minted has to be in the file."""
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(self._file.write, credentials)
        return credentials


def agent(version: str) -> str:
    """The `userAgent`: the word of the contract, by which servers know what asks, and which make it is."""
    return f"studio-worker/{version}+bulkhead"
