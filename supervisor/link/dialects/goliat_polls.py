"""How an assignment is got, in each of the two protocols, and whether it is still ours.

Planned: the dashboard chooses, and marks what it gave as assigned; nobody can take it from us.

Shipped: the worker chooses. A claim is an unconditional write there, so two workers can hold one assignment, and
whoever wrote last is the holder. A claim therefore counts only when the row still names us `settle_s` later, and is
looked at once more before results are delivered, because an upload deletes those of the other worker.

A worker that was not heard for five minutes, or ten when idle, is a new one there, with a new row. Its assignments stay
with the old row, or go to the new one: both are ours. A `finished` from the new row completes nothing of the old one's.

The shipped dashboard has no word for a failed assignment: it stays RUNNING in our name. A later `finished`, which
names the machine alone, may complete that one instead of the one that was meant. So after each `finished` it is looked
at what became of it: the one that was meant is claimed, which brings it under our row of now, and finished again until
it is COMPLETED, and one that had failed is claimed again, which makes it RUNNING. Failed assignments stay in the notes
for that, until somebody resets them.
"""

from __future__ import annotations

import logging
import urllib.parse
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, NamedTuple, Protocol

import msgspec
import trio

from supervisor.link.dialects import goliat_wire as words
from supervisor.link.dialects.goliat_http import Http, Trouble
from supervisor.link.dialects.goliat_notes import Notes
from supervisor.link.dialects.goliat_wire import Row, Slip

log = logging.getLogger(__name__)

MOST_CLAIMS = 5  # in one poll: where so many workers are faster, the next poll is soon enough
SETTLE_TRIES = 3  # of a `finished` that completed nothing: each may come after an outage that made another row
MOST_UNTOLD = 10
NextAttempt = Callable[[str], int]


class Found(NamedTuple):
    """An assignment that is ours. Either `config` or `config_url` is set; neither: it has none."""

    slip: Slip
    config: bytes | None
    config_url: str


class Poll(Protocol):
    """See the module."""

    async def next(self, notes: Notes, attempt: NextAttempt) -> Found | None:
        """An assignment, which is in the notes by then; None when there is none. Raises Trouble, Odd, OSError."""

    async def ours(self, slip: Slip) -> bool:
        """Whether nobody else has it. Raises Trouble, Odd: that cannot be told now."""

    async def settle(self, slip: Slip, notes: Notes, again: Callable[[], Awaitable[object]]) -> None:
        """After `finished`, which `again` tells again. Raises Trouble, Odd, OSError."""

    async def note_failure(self, slip: Slip, notes: Notes) -> None:
        """After `fatal_error`. Raises OSError."""


class Assigned:
    """The planned protocol."""

    def __init__(self, http: Http, machine: str) -> None:
        self._http, self._machine = http, machine

    async def next(self, notes: Notes, attempt: NextAttempt) -> Found | None:
        """See `Poll`."""
        reply = await self._http.json("GET", "api/assignment", query={"machineId": self._machine})
        given = words.given(reply)
        if given is None:
            return None
        slip = msgspec.structs.replace(given.slip, attempt=attempt(given.slip.job))
        try:
            await notes.write(slip)
        except OSError as error:  # it is ours already: better without a note than not at all
            log.warning("the assignment cannot be noted: %s", error, extra={"job": slip.job})
        return Found(slip, given.config, given.config_url)

    async def ours(self, slip: Slip) -> bool:
        """See `Poll`: the dashboard gives an assignment to one worker alone."""
        await trio.lowlevel.checkpoint()
        return True

    async def settle(self, slip: Slip, notes: Notes, again: Callable[[], Awaitable[object]]) -> None:
        """See `Poll`: an assignment that has failed is its scheduler's matter."""

    async def note_failure(self, slip: Slip, notes: Notes) -> None:
        """See `Poll`."""
        await notes.remove(slip.job)


class Claimed:
    """The shipped protocol.

    Args:
        study: name of the super-study whose assignments are taken.
        settle_s: between a claim and the look at who has it.
    """

    def __init__(self, http: Http, machine: str, study: str, settle_s: float) -> None:
        self._http, self._machine, self._study, self._settle_s = http, machine, study, settle_s
        # Assignment -> row of our latest claim: after a lost session an end is told anew, with a slip that is older.
        self._claimed: dict[str, str] = {}
        self._untold = 0  # answers in a row that did not tell our row

    async def next(self, notes: Notes, attempt: NextAttempt) -> Found | None:
        """See `Poll`."""
        listed = await self._http.json("GET", "api/super-studies", query={"name": self._study})
        claims = 0
        for study in words.open_studies(listed, self._study):
            for row in words.pending(await self._rows(study)):
                if claims == MOST_CLAIMS:
                    return None
                claims += 1
                slip = Slip(id=row.id, study=study, index=row.number)
                slip = msgspec.structs.replace(slip, attempt=attempt(slip.job))
                if (found := await self._claim(slip, row, notes)) is not None:
                    return found
        return None

    async def _rows(self, study: str) -> list[Row]:
        path = f"api/super-studies/{urllib.parse.quote(study, safe='')}/assignments"
        return words.rows(await self._http.json("GET", path))

    async def _claim(self, slip: Slip, row: Row, notes: Notes) -> Found | None:
        """Claim it, and look whether we have it; None when somebody else was faster."""
        await notes.write(slip)
        try:
            reply = await self._written(slip.id)
        except Trouble as trouble:
            if not trouble.away:  # it was refused: nothing was written there
                await notes.remove(slip.job)
                raise
            log.info("whether the claim got through is looked up: %s", trouble, extra={"job": slip.job})
            reply = None
        await trio.sleep(self._settle_s)
        mine = _worker(reply) or await self._told_row_id()
        now = next((each for each in await self._rows(slip.study) if each.id == slip.id), None)
        if now is None or now.status != "RUNNING" or (now.worker != mine if mine else reply is None):
            log.info("another worker was faster", extra={"job": slip.job})
            await notes.remove(slip.job)
            return None
        slip = msgspec.structs.replace(slip, worker=now.worker)
        await notes.write(slip)
        return Found(slip, now.config or row.config, "")

    async def _written(self, id_: str) -> Any:
        path = f"api/assignments/{urllib.parse.quote(id_, safe='')}/claim"
        reply = await self._http.json("POST", path, body={"machineId": self._machine})
        if worker := _worker(reply):
            self._claimed[id_] = worker
        return reply

    async def _row_id(self) -> str:
        """Id of the dashboard's row of this worker. Raises Trouble, Odd: it does not tell now."""
        reply: Any = await self._http.json("GET", "api/heartbeat", query={"ipAddress": self._machine})
        id_ = str(reply.get("id") or "") if isinstance(reply, Mapping) else ""
        if not id_:
            raise words.Odd("the dashboard's row of this worker came without an id")
        return id_

    async def _told_row_id(self) -> str:
        """As `_row_id`; "" when an answer does not tell. Raises Trouble: there was none."""
        try:
            return await self._row_id()
        except words.Odd:
            return ""
        except Trouble as trouble:
            if trouble.away:
                raise
            return ""

    async def ours(self, slip: Slip) -> bool:
        """See `Poll`. What an earlier life did not note cannot be looked up."""
        if not slip.study:
            await trio.lowlevel.checkpoint()
            return True
        now = await self._row(slip)
        return now is not None and now.status in ("RUNNING", "COMPLETED") and await self._held(slip, now)

    async def _row(self, slip: Slip) -> Row | None:
        """What the list says of it; None when it is not there. No list, for any reason, says nothing: Trouble."""
        return next((each for each in await self._rows(slip.study) if each.id == slip.id), None)

    async def _held(self, slip: Slip, row: Row) -> bool:
        """Whether the row is in our name: the one of a claim, or the one that the dashboard has given us since.

        One that answers and never tells which is ours is not asked for ever: then the row is another worker's.

        Raises:
            Trouble, Odd: that cannot be told now.
        """
        if slip.worker in ("", row.worker):
            return True
        if row.worker in ("", self._claimed.get(slip.id)):
            return row.worker != ""
        try:
            mine = await self._row_id()
        except (Trouble, words.Odd) as error:
            is_away = isinstance(error, Trouble) and error.away
            self._untold += not is_away
            if is_away or self._untold <= MOST_UNTOLD:
                raise
            return False
        self._untold = 0
        return row.worker == mine

    async def settle(self, slip: Slip, notes: Notes, again: Callable[[], Awaitable[object]]) -> None:
        """See `Poll`."""
        failed = [each for each in (await notes.all()).values() if each.failed and each.study]
        if slip.study and slip.worker:
            tries = len(failed) + SETTLE_TRIES
            while await self._runs(slip):
                if tries == 0:
                    log.error("the dashboard may never count the study as completed", extra={"job": slip.job})
                    break
                tries -= 1
                log.info("its end completed nothing, or another: it is told again", extra={"job": slip.job})
                await self._written(slip.id)
                await again()
        for study in {each.study for each in failed}:
            await self._fail_again({each.id: each for each in failed if each.study == study}, study, notes)

    async def _runs(self, slip: Slip) -> bool:
        """Whether it is still listed as running in our name. Raises Trouble, Odd."""
        now = await self._row(slip)
        return now is not None and now.status == "RUNNING" and await self._held(slip, now)

    async def _fail_again(self, failed: Mapping[str, Slip], study: str, notes: Notes) -> None:
        rows = {each.id: each for each in await self._rows(study)}
        for id_, slip in failed.items():
            row = rows.get(id_)
            if row is None or row.status not in ("RUNNING", "COMPLETED") or not await self._held(slip, row):
                await notes.remove(slip.job)  # somebody has reset it
                continue
            if row.status == "COMPLETED":
                log.warning("the dashboard had completed an assignment that failed", extra={"job": slip.job})
                await self._written(id_)
            if (worker := self._claimed.get(id_, slip.worker)) != slip.worker:
                await notes.write(msgspec.structs.replace(slip, worker=worker))

    async def note_failure(self, slip: Slip, notes: Notes) -> None:
        """See `Poll`."""
        if slip.study and slip.worker:
            await notes.write(msgspec.structs.replace(slip, failed=True))
        else:
            await notes.remove(slip.job)


def _worker(reply: object) -> str:
    return str(reply.get("workerId") or "") if isinstance(reply, Mapping) else ""
