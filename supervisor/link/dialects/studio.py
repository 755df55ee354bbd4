"""`studio-worker-v1`: JSON over a WebSocket, one job at a time, registration by approval.

What it cannot say is answered here: there are no attempts, no resumption, no cancel, no progress and no token stream.
studio_claims.py has what follows from that, studio_register.py how a worker gets in.

A session that is closed because another one uses the same worker id is no end for good: the other may be a copy that
its owner is about to stop, or our own earlier connection in the eyes of a proxy. But two that come back at once would
throw each other out all day, so the pause is long, and longer each time.
"""

from __future__ import annotations

import contextlib
import datetime
import getpass
import logging
import platform
import ssl
from collections.abc import AsyncIterator, Callable

import msgspec
import trio

from supervisor.link.dialects.base import Delivery, Dialect, Features, Home, Spoken
from supervisor.link.dialects.studio_claims import ACK_S, ANSWER_S, ASIDE_S, Claims
from supervisor.link.dialects.studio_delivery import StudioDelivery
from supervisor.link.dialects.studio_http import Http
from supervisor.link.dialects.studio_models import Models
from supervisor.link.dialects.studio_offers import Facts
from supervisor.link.dialects.studio_register import (
    POLL_S,
    Credentials,
    CredentialsFile,
    Registration,
    agent,
    base_url,
)
from supervisor.link.dialects.studio_session import Door, Pace, converse
from supervisor.link.reconnect import Backoff
from supervisor.link.session import SessionEnd, Side, Why
from supervisor.suspend import Clocks, system_clocks
from supervisor.version import version

log = logging.getLogger(__name__)

DUPLICATE_S, LONGEST_DUPLICATE_S = 60.0, 900.0


class Timing(msgspec.Struct, frozen=True, kw_only=True):
    """All of this dialect's times in seconds. `duplicate_s`: first and longest pause after a duplicate."""

    pace: Pace = Pace()
    poll_s: float = POLL_S
    aside_s: float = ASIDE_S
    answer_s: float = ANSWER_S
    ack_s: float = ACK_S
    duplicate_s: tuple[float, float] = (DUPLICATE_S, LONGEST_DUPLICATE_S)
    upload_s: tuple[float, float] = (1.0, 64.0)


class Studio:
    """The dialect in use."""

    def __init__(
        self,
        home: Home,
        http: Http,
        tls: ssl.SSLContext | None,
        timing: Timing,
        clocks: Clocks | None,
        models: Models | None = None,
    ) -> None:
        self._timing, self._tls, self._http, self._clocks = timing, tls, http, clocks
        self._base = base_url(home.address.url)
        self._file = CredentialsFile(home.folder)
        self._known: Credentials | None = None
        self._duplicates = Backoff(*timing.duplicate_s, stable_s=4 * timing.duplicate_s[1])
        self._quiet_until = -float("inf")
        self._waits_for = ""
        facts = Facts(machine=platform.node() or home.name, user=_user(), threshold_gb=home.table.studio.vram_gb)
        self._claims = Claims(
            facts,
            clock=_clock(),
            utc=_utc,
            person=home.person,
            aside_s=timing.aside_s,
            answer_s=timing.answer_s,
            ack_s=timing.ack_s,
            models=models,
        )
        self._delivery = StudioDelivery(
            self._base,
            http,
            lambda: self._known,
            on_uploading=self._claims.uploads.uploading,
            on_refused=self._claims.uploads.refused,
            on_conflict=self._claims.uploads.taken_up,
            on_gone=self._claims.uploads.gone,
            on_large=self._claims.large,
            backoff=lambda: Backoff(*timing.upload_s),
        )

    @property
    def delivery(self) -> Delivery:
        """See `Spoken`."""
        return self._delivery

    @property
    def waits_for(self) -> str:
        """See `Spoken`: the approval of this worker."""
        return self._waits_for

    async def warm_up(self) -> None:
        """See `Spoken`."""
        await self._http.client()

    async def converse(self, side: Side) -> SessionEnd:
        """See `Spoken`: registered first, where that is still to be done."""
        await trio.sleep_until(max(self._quiet_until, trio.current_time()))
        if self._known is None:
            registration = Registration(
                self._base,
                self._http,
                self._file,
                lambda: self._claims.greeting(side.hello()),
                agent=agent(version()),
                poll_s=self._timing.poll_s,
                on_pending=self._pending,
            )
            try:
                known = await registration.credentials()
            finally:
                self._waits_for = ""
            if isinstance(known, SessionEnd):
                return known
            self._known = known
        door = Door(self._base, self._known.worker_id, self._known.auth_token, self._tls)
        return self._judged(await converse(door, self._claims, side, self._timing.pace, self._clocks))

    def _pending(self, request: str) -> None:
        asked = f"waiting for approval: ask the studio's admin to approve the request {request} at {self._base}"
        self._waits_for = asked if request else ""

    def _judged(self, end: SessionEnd) -> SessionEnd:
        if end.why is Why.DUPLICATE:
            pause_s = self._duplicates.pause_s(end.lasted_s)
            self._quiet_until = trio.current_time() + pause_s
            sentence = (
                f"another process works under this worker id ({end.sentence}): stop one of the two; "
                f"this one stays away for {pause_s:.0f} s"
            )
            return SessionEnd(Why.LOST, sentence, end.lasted_s)
        if end.why in (Why.REFUSED, Why.DELETED):
            sentence = f"{end.sentence}; to be registered anew, remove {self._file.path}"
            return SessionEnd(end.why, sentence, end.lasted_s)
        return end


def _user() -> str:
    """Whoever approves this worker wants to see whose it is; "" where the account has no name."""
    try:
        return getpass.getuser()
    except (OSError, KeyError, ImportError):
        return ""


def _clock() -> Callable[[], float]:
    """Of what is laid aside: a job that was to come back within ten minutes does not come after a night's sleep."""
    clocks = system_clocks()
    return clocks.always if clocks is not None else trio.current_time


def _utc() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


@contextlib.asynccontextmanager
async def open_studio(home: Home, timing: Timing | None = None, clocks: Clocks | None = None) -> AsyncIterator[Spoken]:
    """The dialect for one life of the supervisor."""
    tls = home.address.tls
    if tls is None and base_url(home.address.url).startswith("https:"):
        tls = ssl.create_default_context(cafile=home.table.tls_ca or None)
    timing = timing or Timing(pace=Pace(connect_s=home.address.connect_s))
    async with Http(tls) as http, _models(home) as models:
        yield Studio(home, http, tls, timing, clocks, models)


@contextlib.asynccontextmanager
async def _models(home: Home) -> AsyncIterator[Models | None]:
    """What fetches models, where the operator wants that; its fetches end with the block, and are resumed later."""
    table = home.table.studio
    if table.models != "download" or home.roll is None:
        yield None
        return
    models = Models(home.folder / "models", table, home.roll)
    async with trio.open_nursery() as nursery:
        await nursery.start(models.run)
        yield models
        nursery.cancel_scope.cancel()


STUDIO = Dialect(
    Features(push=True, many=False, cancel=False, streaming=False, progress=False, resume=False, token=False),
    open_studio,
)
