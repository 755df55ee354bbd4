"""Fair turns: which of the waiting jobs of several tenants comes next.

Start-time fair queueing. A job gets a tag when it is submitted, and the lowest tag of a priority is claimed first:

    tag = max(now served, last tag of its tenant's that waits) + cost / weight

What is served now is the highest tag that a worker accepted, so a tenant with a thousand jobs does not make another
wait for all of them, and one that has a single job waiting at any time has its whole share. Nothing that only waits
says what is served, so a job that nobody can take holds nobody up, and neither one that was offered and declined, or
that is to be tried again by hand (`tries` is 0 then). It is read from the jobs' own rows, by index: no row is there
that submissions or claims of several coordinators would have to wait for.

Jobs of one model and kind that need the same stand in a line (`needs`), each served at the pace of its own workers.
So a tenant's tags follow each other within a line, and what is served now is that of the line. Where that is long
past, it is that of the whole model, so that a line that was idle does not go before the others; but what comes into a
line stands beside the first that waits there, not behind all that waits there because other lines were faster.

A job that was asked to start later has no turn before: its tag is beyond `LATER` until it is due, and `_ripen` gives
it one then. A thousand of them that are due at once stand behind each other like any others.

Costs are what is known at the submission, and a tag is not changed when a job took longer or shorter: what a tenant
uses while nobody else waits would be held against it later. The next submissions cost what such jobs took.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property

from coordinator.store.rows import LATER, Row
from coordinator.store.sql_steps import SqlSteps

RIPEN = 200  # jobs that get their turn at once, or as many as a claim wants when these are more
MOST_RIPE = 2_000
_SAME_NEEDS = "model = :model AND needs = :needs AND priority = :priority"
_LINE = f"{_SAME_NEEDS} AND kind = :kind"
# Neither max() nor min(), nor the bare tenant: before it has statistics, PostgreSQL would read all rows of them.
_WAITING = f"SELECT vt FROM jobs WHERE state = 'queued' AND {_SAME_NEEDS} {{0}} LIMIT 1"
_SERVED = f"SELECT vt FROM jobs WHERE tries > 0 AND {{0}} AND vt < {LATER} ORDER BY vt DESC LIMIT 1"
_OF_LINE = _SERVED.format(_LINE)
_OF_MODEL = _SERVED.format("model = :model AND priority = :priority")
_GONE = "SELECT vt FROM turns WHERE model = :model AND priority = :priority"
_FIRST = _WAITING.format("ORDER BY vt")
_LAST = _WAITING.format(f"AND kind = :kind AND tenant || '' = :tenant AND vt < {LATER} ORDER BY vt DESC")
_RIPE = (
    f"SELECT seq, model, needs, kind, priority, tenant, vt - {LATER} AS step FROM jobs "
    f"WHERE state = 'queued' AND vt >= {LATER} AND run_after_ms <= :now ORDER BY run_after_ms, seq LIMIT :most"
)
_KEEP = f"""
    INSERT INTO turns (model, priority, vt)
    SELECT CAST(:model AS TEXT), :priority, :vt WHERE NOT EXISTS (
        SELECT 1 FROM jobs WHERE tries > 0 AND model = :model AND priority = :priority AND vt >= :vt AND vt < {LATER})
    ON CONFLICT (model, priority) DO UPDATE SET vt = excluded.vt WHERE turns.vt < excluded.vt RETURNING vt
"""


class SqlTurns(SqlSteps):
    """The part of a store that gives turns.

    Attributes:
        MOST, LEAST: the database's words for the larger, or smaller, of several values.
    """

    MOST = "max"
    LEAST = "min"

    @cached_property
    def _turn(self) -> str:
        """The tag of a job, as an expression of :model, :needs, :kind, :priority, :tenant and :step."""
        model = f"{self.MOST}(coalesce(({_OF_MODEL}), 0), coalesce(({_GONE}), 0))"
        ahead = f"{self.LEAST}({model} + :step, coalesce(({_FIRST}), {LATER}))"
        return f"{self.MOST}(coalesce(({_OF_LINE}), 0) + :step, {ahead}, coalesce(({_LAST}), 0) + :step)"

    def _ripen(self, now: int, wanted: int = 0) -> None:
        """Give their turns to jobs that were asked to start later and are due by now."""
        for row in self._all(f"{_RIPE}{self.SKIP}", now=now, most=min(max(RIPEN, wanted), MOST_RIPE)):
            names = {name: row[name] for name in ("seq", "model", "needs", "kind", "priority", "tenant", "step")}
            self._all(f"UPDATE jobs SET vt = {self._turn} WHERE seq = :seq RETURNING seq", **names)

    def _keep_turns(self, deleted: Iterable[Row]) -> None:
        """Remember how far turns were, when the rows that say so are deleted in this transaction."""
        far: dict[tuple[str, int], int] = {}
        for row in deleted:
            if row["tries"] and row["vt"] < LATER:
                key = (row["model"], row["priority"])
                far[key] = max(far.get(key, 0), row["vt"])
        for (model, priority), vt in sorted(far.items()):  # in one order, as others do it meanwhile
            self._all(_KEEP, model=model, priority=priority, vt=vt)
