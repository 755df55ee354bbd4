"""`coordinator usage`: what jobs used, as a table, CSV or JSON; straight from the store, also of a running one."""

from __future__ import annotations

import argparse
import contextlib
import sqlite3
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from coordinator import config as configuration
from coordinator.cli.showing import cell, line, say, table
from coordinator.store.base import StoreError
from coordinator.store.opening import SQLITE, STORE_FILE, is_postgres
from coordinator.store.rows import Row
from coordinator.store.sql_usage import SqlUsage
from coordinator.store.sqlite_schema import CLOCK as SQLITE_CLOCK
from coordinator.usage.report import GROUPS, as_csv, groups, report, span
from protocol.faults import FaultError

OK, FAILED, USAGE = 0, 1, 64
POSTGRES_CLOCK = "now_ms()"


class _FileReader(SqlUsage):
    """A SQLite store that is only read, so it takes no lock: a coordinator may serve from it."""

    CLOCK = SQLITE_CLOCK

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise StoreError(f"{path}: There is no such store; give --state, or --store.")
        try:
            self._file = sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True, isolation_level=None)
        except sqlite3.Error as error:
            raise StoreError(f"{path} cannot be read: {error}.") from None
        self._file.row_factory = sqlite3.Row

    def _read(self, sql: str, **names: Any) -> Sequence[Row]:
        try:
            return self._file.execute(sql, names).fetchall()
        except sqlite3.OperationalError as error:
            raise StoreError(f"The store cannot be read: {error}; has this version's coordinator opened it?") from None

    def close(self) -> None:
        """Close the file."""
        self._file.close()


@contextlib.contextmanager
def reader(where: str, state: Path, *, pooled: bool = False) -> Iterator[SqlUsage]:
    """The store of a coordinator, for reading only.

    Args:
        where: as `[store]` names it; "" is the file in the state folder.

    Raises:
        StoreError: there is none, or it cannot be reached.
    """
    if not is_postgres(where):
        path = Path(where.removeprefix(SQLITE)) if where else state / STORE_FILE
        with contextlib.closing(_FileReader(path)) as found:
            yield found
        return
    from coordinator.store.postgres_link import PostgresLink

    link = PostgresLink(where, pooled=pooled, connections=1)

    class _DatabaseReader(SqlUsage):
        CLOCK = POSTGRES_CLOCK

        def _read(self, sql: str, **names: Any) -> Sequence[Row]:
            return link.read(sql, names)

    try:
        yield _DatabaseReader()
    finally:
        link.close()


def add_parser(commands: Any, shared: argparse.ArgumentParser) -> None:
    """Add the command to the parser of `coordinator`."""
    usage = commands.add_parser("usage", parents=[shared], help="what jobs used, by tenant, key, worker, model or day")
    usage.add_argument("--from", dest="begin", default="", metavar="DAY", help="first day, such as 2026-01-01 (UTC)")
    usage.add_argument("--to", dest="end", default="", metavar="DAY", help="last day; default: today")
    usage.add_argument("--by", default="worker", metavar="NAMES", help=f"of {', '.join(GROUPS)}; several with commas")
    usage.add_argument("--tenant", help="only this one's")
    usage.add_argument("--store", metavar="URL", help="postgres://… or sqlite:PATH; default: as the coordinator's")
    form = usage.add_mutually_exclusive_group()
    form.add_argument("--csv", action="store_true", help="for a spreadsheet")
    form.add_argument("--json", action="store_true", help="as GET /v1/usage answers")
    usage.set_defaults(command=run)


def run(arguments: argparse.Namespace) -> int:
    """Print the report. Raises StoreError, Refusal."""
    settings = configuration.merged(configuration.load(arguments.config), arguments)
    where = configuration.store_address(settings)
    try:
        group_by = groups(arguments.by)
        with reader(where, configuration.state_dir(settings), pooled=settings.store_pooled) as store:
            now = int(store._read(f"SELECT {store.CLOCK} AS now")[0]["now"])
            days = span(arguments.begin, arguments.end, now)
            found = report(store.usage(*days, group_by, arguments.tenant), days, group_by)
    except FaultError as error:
        sys.stderr.write(f"coordinator usage: {error}\n")
        return USAGE if error.fault.code == "invalid_parameter" else FAILED
    if arguments.json:
        say(found)
    elif arguments.csv:
        sys.stdout.write(as_csv(found))
    else:
        _print_table(found)
    return OK


def _print_table(found: dict[str, Any]) -> None:
    """The columns that have something in them."""
    rows = found["data"]
    names = [*found["group_by"], "jobs"]
    names += [name for name in (rows[0] if rows else ()) if name not in names and any(row[name] for row in rows)]
    line(f"{found['from']} to {found['to']} (UTC)")
    table([tuple(names), *(tuple(_amount(row[name]) for name in names) for row in rows)])


def _amount(value: object) -> str:
    return cell(f"{value:g}" if isinstance(value, float) else value, 1000) or "-"
