"""Deployments, placements and workers in SQL that both databases understand."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

import msgspec

from coordinator.deploy.plan import Changes
from coordinator.deploy.spec import Candidate, Deployment, Placement, now_called
from coordinator.store.deployments import Plan, Standing, Wish
from coordinator.store.rows import LATER, Row, turn_step
from coordinator.store.sql_steps import whole
from coordinator.store.sql_turns import SqlTurns
from protocol.link_wire import Capabilities

MOVE = 500  # jobs in one transaction, when they are to wait for another model
FORGET_WORKER_MS = 3_600_000
FORGET_LEAVING_MS = 366 * 86_400_000  # a worker that was away for longer keeps what it has
# One that is to leave a worker which was not here for an hour waits for that worker, and is nothing to anybody else.
_SHOWN = "(state <> 'leaving' OR worker IN (SELECT worker FROM presence))"
_WAITING_FOR = (
    "SELECT seq, needs, kind, priority, tenant FROM jobs WHERE state = 'queued' AND model = :old ORDER BY vt, seq"
)
_pack = msgspec.msgpack.encode
_deployment = msgspec.msgpack.Decoder(Deployment).decode
_capabilities = msgspec.msgpack.Decoder(Capabilities).decode


class SqlDeploy(SqlTurns):
    """The part of a store that keeps deployments.

    Attributes:
        ALIVE: when the coordinator with which a worker had its session last said that it lives, or NULL where there is
            but one coordinator.
    """

    ALIVE = "NULL"
    gateway: str = ""
    silent_ms: int = 0

    @whole
    def deploy(self, name: str, wish: Wish) -> Deployment:
        """Ask for a model to be served, or for another revision, number or choice of workers of it."""
        with self._transaction() as now:
            self._one_by_one(f"deployment {name}")  # of two that ask at once the second sees what the first made of it
            row = self._one(f"SELECT body FROM deployments WHERE name = :name{self.LOCK}", name=name)
            asked = wish(None if row is None else _deployment(row["body"]))
            if row is None:
                made = Deployment(asked=asked, created_ms=now, changed_ms=now)
                self._one(
                    "INSERT INTO deployments (name, body) VALUES (:name, :body) RETURNING name",
                    name=asked.name,
                    body=_pack(made),
                )
                return made
            known = _deployment(row["body"])
            if known.leaving:  # its name was given back
                known = msgspec.structs.replace(known, current="", served=None)
            served = known.of(known.current) if known.current else None
            if served is not None and served.revision == asked.revision:
                served = None
            changed = msgspec.structs.replace(
                known, asked=asked, served=served, version=known.version + 1, changed_ms=now, leaving=False
            )
            self._save(changed)
            return changed

    @whole
    def undeploy(self, name: str) -> Deployment | None:
        """Ask for no worker any more."""
        with self._transaction() as now:
            row = self._one(f"SELECT body FROM deployments WHERE name = :name{self.LOCK}", name=name)
            if row is None:
                return None
            known = _deployment(row["body"])
            none = msgspec.structs.replace(known.asked, replicas=0)
            changed = msgspec.structs.replace(
                known, asked=none, version=known.version + 1, changed_ms=now, leaving=True
            )
            self._save(changed)
            return changed

    def deployments(self) -> list[Deployment]:
        """All, by name."""
        return [_deployment(row["body"]) for row in self._read("SELECT body FROM deployments ORDER BY name")]

    def placements(self, worker: str | None = None) -> list[Placement]:
        """All, or those of one worker; without those that wait for a worker which was not here for an hour."""
        mine = "" if worker is None else " AND worker = :worker"
        names = {} if worker is None else {"worker": worker}
        rows = self._read(
            f"SELECT * FROM placements WHERE {_SHOWN}{mine} ORDER BY deployment, revision, worker", **names
        )
        return [_placement(row) for row in rows]

    @whole
    def seen(self, worker: str, capabilities: Capabilities, *, draining: bool) -> None:
        """A worker is connected to this coordinator and announces this."""
        with self._transaction(synced=False) as now:
            self._one(
                "INSERT INTO presence (worker, gateway, connected, draining, body, changed_ms) "
                "VALUES (:worker, :me, 1, :draining, :body, :now) ON CONFLICT (worker) DO UPDATE SET "
                "gateway = :me, connected = 1, draining = :draining, body = :body, changed_ms = :now RETURNING worker",
                worker=worker,
                me=self.gateway,
                draining=int(draining),
                body=_pack(capabilities),
                now=now,
            )

    @whole
    def lost(self, worker: str) -> None:
        """Its session with this coordinator is over; another may have it by now."""
        with self._transaction(synced=False) as now:
            self._one(
                "UPDATE presence SET connected = 0, changed_ms = :now WHERE worker = :worker AND gateway = :me "
                "AND connected = 1 RETURNING worker",
                worker=worker,
                me=self.gateway,
                now=now,
            )

    def present(self) -> set[str]:
        """The workers of which is written down that they are connected to this coordinator."""
        sql = "SELECT worker FROM presence WHERE gateway = :me AND connected = 1"
        return {row["worker"] for row in self._read(sql, me=self.gateway)}

    @whole
    def all_lost(self) -> None:
        """This coordinator has just begun: whoever was connected to its last life is not."""
        with self._transaction(synced=False) as now:
            self._all(
                "UPDATE presence SET connected = 0, changed_ms = :now WHERE gateway = :me AND connected = 1 "
                "RETURNING worker",
                me=self.gateway,
                now=now,
            )

    def candidates(self) -> dict[str, Candidate]:
        """All workers, those included that were here in the last hour."""
        return self._candidates(self._read(self._present()))

    def standing(self, plan: Plan) -> Standing:
        """What there is, and whether `plan` would change some of it."""
        deployments, placements = self.deployments(), self.placements()
        candidates = self.candidates() if deployments else {}
        mine = _by_deployment(placements)
        changing = any(plan(one, mine.get(one.name, []), candidates) != _NOTHING for one in deployments)
        absent = any(one.lost_ms >= FORGET_WORKER_MS for one in candidates.values())
        return Standing(deployments, placements, not changing and not absent, self._clock())

    def _clock(self) -> int:
        return int(self._read(f"SELECT {self.CLOCK} AS now")[0]["now"])

    @whole
    def replan(self, plan: Plan) -> list[Deployment]:
        """Apply what `plan` says of every deployment; all that are left."""
        with self._transaction() as now:
            self._all(
                "DELETE FROM placements WHERE state = 'leaving' AND changed_ms < :old RETURNING worker",
                old=now - FORGET_LEAVING_MS,
            )
            rows = self._all(f"SELECT body FROM deployments ORDER BY name{self.SKIP}")
            candidates = self._candidates(self._there())
            placements = _by_deployment(map(_placement, self._all(f"SELECT * FROM placements WHERE {_SHOWN}")))
            for one in itertools.chain.from_iterable(placements.values()):
                _count(candidates, one)
            for row in rows:
                deployment = _deployment(row["body"])
                changes = plan(deployment, placements.get(deployment.name, []), candidates)
                for one in changes.add:  # so that the next one is not put on the same worker
                    _count(candidates, one)
                self._apply(deployment, changes, now)
            return [_deployment(row["body"]) for row in self._all("SELECT body FROM deployments ORDER BY name")]

    def _there(self) -> list[Row]:
        """All workers, after those were forgotten that were away for long, also those whose coordinator did not live to
        say that they left."""
        there = []
        for row in self._all(self._present()):
            if self._lost_ms(row) < FORGET_WORKER_MS:
                there.append(row)
                continue
            self._all(
                "DELETE FROM presence WHERE worker = :worker AND gateway = :gateway AND changed_ms = :changed_ms "
                "RETURNING worker",
                worker=row["worker"],
                gateway=row["gateway"],
                changed_ms=row["changed_ms"],
            )
        return there

    def _present(self) -> str:
        return f"SELECT presence.*, {self.ALIVE} AS alive_ms, {self.CLOCK} AS now FROM presence"

    def _apply(self, deployment: Deployment, changes: Changes, now: int) -> None:
        for one in changes.add:
            self._all(
                "INSERT INTO placements (deployment, revision, worker, state, reason, failures, changed_ms) "
                "VALUES (:deployment, :revision, :worker, 'wanted', '', 0, :now) "
                "ON CONFLICT (deployment, revision, worker) DO UPDATE SET state = 'wanted', reason = '', failures = 0, "
                "changed_ms = :now WHERE placements.state = 'leaving' RETURNING worker",
                deployment=one.deployment,
                revision=one.revision,
                worker=one.worker,
                now=now,
            )
        for one in changes.leave:
            self._move(one, "leaving", now)
        if changes.current is not None:
            self._flip(deployment, changes.current, now)
        elif changes.over:
            self._all("DELETE FROM deployments WHERE name = :name RETURNING name", name=deployment.name)

    def _flip(self, deployment: Deployment, revision: str, now: int) -> None:
        """From now on this revision answers; the jobs that wait follow in `redirect`."""
        self._save(
            msgspec.structs.replace(
                deployment, current=revision, served=None, version=deployment.version + 1, changed_ms=now
            )
        )

    def redirect(self) -> int:
        """Jobs that wait for a revision that answers no more, or for a name that a deployment took: to who answers."""
        moved = 0
        for old, new in self._strays():
            rows = self._read(_WAITING_FOR, old=old)
            for first in range(0, len(rows), MOVE):
                moved += self._let_wait_for(old, new, rows[first : first + MOVE])
        return moved

    @whole
    def _let_wait_for(self, old: str, new: str, rows: Sequence[Row]) -> int:
        """Each takes a turn among those that wait there, in the order that they had; the tags of two models say nothing
        of each other. What starts later has none yet."""
        sql = (
            f"UPDATE jobs SET model = :model, vt = CASE WHEN vt >= {LATER} THEN vt ELSE {self._turn} END "
            "WHERE seq = :seq AND state = 'queued' AND model = :old RETURNING id"
        )
        moved = 0
        with self._transaction():
            for row in rows:
                names = {name: row[name] for name in ("seq", "needs", "kind", "priority", "tenant")}
                moved += len(self._all(sql, old=old, model=new, step=turn_step(), **names))
        return moved

    def _strays(self) -> list[tuple[str, str]]:
        """(model that jobs wait for, model for which they shall wait); a step of the index per model that is waited
        for, however many jobs wait."""
        first = "SELECT min(model) FROM jobs WHERE state = 'queued'"
        rows = self._read(
            f"WITH RECURSIVE line (model) AS ({first} UNION ALL SELECT ({first} AND model > line.model) FROM line "
            "WHERE line.model IS NOT NULL) SELECT model FROM line WHERE model IS NOT NULL"
        )
        deployments = {one.name: one for one in self.deployments()} if rows else {}
        found = [(row["model"], now_called(row["model"], deployments)) for row in rows]
        moves = [(old, new) for old, new in found if old != new]
        if all("@" in new for _, new in moves):
            return moves
        # A revision of what is not deployed any more: while somebody announces it, its jobs are done there.
        announced = {offer.name for one in self.candidates().values() for offer in one.capabilities.models}
        return [(old, new) for old, new in moves if "@" in new or old not in announced]

    @whole
    def placed(self, placement: Placement, was: Sequence[str]) -> bool:
        """Write how far a placement is, when it is still in one of the states `was`."""
        with self._transaction() as now:
            row = self._one(
                f"SELECT state FROM placements WHERE {_THIS}{self.LOCK}",
                **_names(placement),
            )
            if row is None or row["state"] not in was:
                return False
            self._one(
                "UPDATE placements SET state = :state, reason = :reason, failures = :failures, changed_ms = :now "
                f"WHERE {_THIS} RETURNING worker",
                state=placement.state,
                reason=placement.reason[:1000],
                failures=placement.failures,
                now=now,
                **_names(placement),
            )
            return True

    @whole
    def unplaced(self, placement: Placement) -> None:
        """Its worker has let go of it."""
        sql = f"DELETE FROM placements WHERE {_THIS} AND state = 'leaving' RETURNING worker"
        with self._transaction():
            self._all(sql, **_names(placement))

    def _move(self, placement: Placement, state: str, now: int) -> None:
        self._all(
            "UPDATE placements SET state = :state, changed_ms = :now "
            f"WHERE {_THIS} AND state <> :state RETURNING worker",
            state=state,
            now=now,
            **_names(placement),
        )

    def _save(self, deployment: Deployment) -> None:
        self._one(
            "UPDATE deployments SET body = :body WHERE name = :name RETURNING name",
            name=deployment.name,
            body=_pack(deployment),
        )

    def _candidates(self, rows: Sequence[Row]) -> dict[str, Candidate]:
        return {row["worker"]: self._candidate(row) for row in rows}

    def _candidate(self, row: Row) -> Candidate:
        lost_ms = self._lost_ms(row)
        return Candidate(
            worker=row["worker"],
            capabilities=_capabilities(row["body"]),
            connected=lost_ms == 0,
            lost_ms=lost_ms,
            draining=bool(row["draining"]),
        )

    def _lost_ms(self, row: Row) -> int:
        """For how long the worker has been away; 0 while it is here."""
        now, alive = row["now"], row["alive_ms"]
        silent = alive is not None and alive <= now - self.silent_ms
        if row["connected"] and not silent:
            return 0
        last = max(row["changed_ms"], alive or 0) if silent else row["changed_ms"]
        return max(1, int(now - last))


_NOTHING = Changes()
_THIS = "deployment = :deployment AND revision = :revision AND worker = :worker"


def _names(placement: Placement) -> dict[str, str]:
    return {"deployment": placement.deployment, "revision": placement.revision, "worker": placement.worker}


def _placement(row: Row) -> Placement:
    return Placement(**{name: row[name] for name in Placement.__struct_fields__})


def _count(candidates: dict[str, Candidate], placement: Placement) -> None:
    """One model more that its worker has, or is to have."""
    candidate = candidates.get(placement.worker)
    if candidate is not None and placement.state != "leaving":
        candidates[placement.worker] = msgspec.structs.replace(candidate, placed=candidate.placed + 1)


def _by_deployment(placements: Iterable[Placement]) -> dict[str, list[Placement]]:
    found: dict[str, list[Placement]] = {}
    for one in placements:
        found.setdefault(one.deployment, []).append(one)
    return found
