"""What every register does: read, and write in one transaction at a time that may note a change for all replicas."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from coordinator.store.rows import Row
from coordinator.store.sql_steps import SqlSteps

T = TypeVar("T")
ACTS_MS = 180 * 86_400_000  # how long it is remembered who did what


class Turn:
    """One writing transaction; others write after it.

    Attributes:
        now_ms: milliseconds since the epoch, by the register's clock.
    """

    def __init__(self, register: Register, now_ms: int) -> None:
        self._register, self._change = register, 0
        self.now_ms = now_ms

    @property
    def change(self) -> int:
        """The number of this change; every row that replicas keep in memory takes it as `changed`."""
        if not self._change:
            rows = self.all("UPDATE changes SET number = number + 1 WHERE one = 1 RETURNING number")
            self._change = int(rows[0]["number"])
        return self._change

    def act(self, who: str, what: str) -> None:
        """Note an admin's act, at most one in a turn; every coordinator writes it into its log. Never a secret."""
        self.all(
            "INSERT INTO acts (number, at_ms, who, what) VALUES (:number, :at, :who, :what) RETURNING number",
            number=self.change,
            at=self.now_ms,
            who=who[:200],
            what=what[:1000],
        )
        self.all("DELETE FROM acts WHERE at_ms < :old RETURNING number", old=self.now_ms - ACTS_MS)

    def all(self, sql: str, **names: Any) -> Sequence[Row]:
        """Rows of one statement; one that changes rows says RETURNING."""
        return self._register._all(sql, **names)

    def one(self, sql: str, **names: Any) -> Row | None:
        """Its first row."""
        rows = self.all(sql, **names)
        return rows[0] if rows else None


class Register(SqlSteps):
    """One register. Methods block; on an event loop run them in a thread. Raise StoreError, StoreAway, FaultError."""

    def write(self, work: Callable[[Turn], T]) -> T:
        """Run `work` in one transaction; an exception undoes it. It may be begun again from its first statement."""

        def once() -> T:
            with self._transaction() as now:
                self._all(f"SELECT number FROM changes WHERE one = 1{self.LOCK}")
                return work(Turn(self, now))

        return self._to_the_end(once)

    def read(self, sql: str, **names: Any) -> Sequence[Row]:
        """Rows as they are committed."""
        return self._read(sql, **names)

    def replicas(self) -> int:
        """How many coordinators that are alive use this register, at least 1."""
        return 1

    def close(self) -> None:
        """Close it; later calls raise StoreError. Calling it again does nothing."""
        raise NotImplementedError
