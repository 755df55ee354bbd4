"""How a store in SQL takes its steps: transactions, statements with named parameters, and where it must lock.

A database's own module fills this in; what the steps mean is in `sql`, `sql_reads` and `sql_shelf`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial, wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

from coordinator.store.rows import Row

P = ParamSpec("P")
T = TypeVar("T")


def whole(method: Callable[Concatenate[Any, P], T]) -> Callable[Concatenate[Any, P], T]:
    """A write that the database may make us begin again, from its first statement."""

    @wraps(method)
    def run(self: Any, /, *args: P.args, **named: P.kwargs) -> T:
        result: T = self._to_the_end(partial(method, self, *args, **named))
        return result

    return run


class SqlSteps:
    """One database. Methods that raise NotImplementedError are filled in by its class.

    Attributes:
        LOCK: behind a SELECT of rows that are changed next.
        SKIP: the same, leaving out what others are changing.
        CLOCK: the store's clock as an expression, in milliseconds since the epoch.
    """

    LOCK = ""
    SKIP = ""
    CLOCK = ""

    def _transaction(self, *, synced: bool = True) -> AbstractContextManager[int]:
        """One write transaction; yields the store's clock. Rolls back on any exception.

        Without `synced` it outlives any end of this process at once, and a loss of power from the next one that is.
        """
        raise NotImplementedError

    def _all(self, sql: str, **names: Any) -> Sequence[Row]:
        raise NotImplementedError

    def _read(self, sql: str, **names: Any) -> Sequence[Row]:
        """Rows as they were committed, outside of any transaction."""
        raise NotImplementedError

    def _to_the_end(self, call: Callable[[], T]) -> T:
        return call()

    def _hold(self, job_id: str) -> bool:
        """Lock a row that a statement did not find as wanted; False where nobody writes beside us."""
        return False

    def _one_by_one(self, name: str) -> None:
        """Let transactions that say the same name wait for each other; where nobody writes beside us, they do."""

    def _changed(self, sql: str, **names: Any) -> Row | None:
        """The row that a conditional UPDATE changed.

        When it changed none and others write beside us, it is tried again under the row's lock: what is read next is
        then what the UPDATE saw.
        """
        row = self._one(sql, **names)
        return self._one(sql, **names) if row is None and self._hold(names["id"]) else row

    def _one(self, sql: str, **names: Any) -> Row | None:
        rows = self._all(sql, **names)
        return rows[0] if rows else None
