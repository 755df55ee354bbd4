"""A primary with a synchronous standby: what was acknowledged is on both before anybody is told."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from urllib.parse import quote

import psycopg

from coordinator.testing_postgres import PostgresServer

PATIENCE_S = 60.0


class Pair:
    """Two running servers; `now` is the one that takes writes."""

    def __init__(self) -> None:
        self.now = PostgresServer(durable=True)
        self.now.start()
        self.standby: PostgresServer | None = None

    @property
    def servers(self) -> list[PostgresServer]:
        """Both, or the one that is left; the primary first."""
        return [self.now, self.standby] if self.standby is not None else [self.now]

    def add_standby(self) -> None:
        """Copy the primary, follow it, and let no commit be acknowledged before the copy has it."""
        standby = self.standby = PostgresServer(durable=True)
        shutil.rmtree(standby.data)
        source = f"postgresql://bulkhead@/?host={quote(str(self.now.folder), safe='')}&application_name=standby"
        subprocess.run(
            [str(standby._bin / "pg_basebackup"), *("-D", str(standby.data), "-d", source), *("-R", "-c", "fast")],
            check=True,
            stdout=subprocess.PIPE,
            **standby._as_user(),
        )
        os.chmod(standby.data, 0o700)
        standby.start()
        with psycopg.connect(self.now.url, autocommit=True) as admin:
            admin.execute("ALTER SYSTEM SET synchronous_standby_names = '*'")
            admin.execute("SELECT pg_reload_conf()")
            self._until(admin, "SELECT count(*) FROM pg_stat_replication WHERE sync_state = 'sync'", 1)

    def fail_over(self) -> None:
        """The primary dies as in a crash and never comes back; the standby takes its place."""
        assert self.standby is not None
        self.now.stop(signal.SIGQUIT)
        dead, self.now, self.standby = self.now, self.standby, None
        with psycopg.connect(self.now.url, autocommit=True) as admin:
            admin.execute("SELECT pg_promote()")
            self._until(admin, "SELECT pg_is_in_recovery()::int", 0)
        dead.remove()

    def remove(self) -> None:
        """Stop and delete everything."""
        for server in self.servers:
            server.remove()

    @staticmethod
    def _until(admin: psycopg.Connection[tuple[object, ...]], question: str, wanted: int) -> None:
        end = time.monotonic() + PATIENCE_S
        while True:
            row = admin.execute(question.encode()).fetchone()
            if row is not None and row[0] == wanted:
                return
            if time.monotonic() > end:
                raise TimeoutError(question)
            time.sleep(0.05)
