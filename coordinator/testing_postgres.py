"""A PostgreSQL server of a test's own: from the system's binaries, in a folder of its own, on a Unix socket.

PostgreSQL refuses to run as root, so there it runs as another user. Needs nothing that is not installed: no service,
no port, no password.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import psycopg

START_S = 60.0
STOP_S = 30.0
LEAST_VERSION = 15
PACKAGE = "postgresql-15"
DEBIAN = Path("/usr/lib/postgresql")
_QUICK = ("fsync=off", "synchronous_commit=off", "full_page_writes=off")
_SMALL = ("listen_addresses=", "shared_buffers=64MB", "max_connections=120", "autovacuum_naptime=5s")


def binaries() -> Path | None:
    """The folder of the newest server that is installed, 15 or later; None without one."""
    versions = [path for path in DEBIAN.glob("*/bin") if path.parent.name.isdigit() and (path / "initdb").exists()]
    fit = [path for path in versions if int(path.parent.name) >= LEAST_VERSION]
    if fit:
        return max(fit, key=lambda path: int(path.parent.name))
    found = shutil.which("initdb")
    return Path(found).resolve().parent if found else None


def why_not() -> str:
    """Why no server can be started here; "" when one can."""
    if os.name != "posix":
        return "a PostgreSQL server of the tests' own is started on POSIX systems only"
    return "" if binaries() else f"no PostgreSQL server is installed (Debian: {PACKAGE})"


class PostgresServer:
    """A running server. `url` names its socket, the superuser `bulkhead`, and the database `postgres`.

    Attributes:
        folder: of the data, the socket and the log; removed by `remove`.
        settings: `name=value` of postgresql.conf, for every start.
    """

    def __init__(self, *, durable: bool = False, settings: tuple[str, ...] = ()) -> None:
        """Make the data folder. Without `durable` nothing is synced: quick, and good for tests of logic."""
        found = binaries()
        assert found is not None, why_not()
        self._bin = found
        self._user = _unprivileged()
        self.settings = (*_SMALL, *(() if durable else _QUICK), *settings)
        self.folder = Path(tempfile.mkdtemp(prefix="bulkhead-pg-"))
        self._process: subprocess.Popen[bytes] | None = None
        if self._user is not None:
            os.chown(self.folder, self._user.pw_uid, self._user.pw_gid)
        arguments = ("-D", str(self.data), "-U", "bulkhead", "--auth=trust", "--no-sync", "-E", "UTF8", "--no-locale")
        subprocess.run([str(self._bin / "initdb"), *arguments], check=True, stdout=subprocess.PIPE, **self._as_user())

    @property
    def data(self) -> Path:
        """PostgreSQL's data folder."""
        return self.folder / "data"

    @property
    def url(self) -> str:
        """Where clients of this machine find it."""
        return f"postgresql://bulkhead@/postgres?host={quote(str(self.folder), safe='')}"

    def start(self) -> None:
        """Start, and return when it takes connections. Raises TimeoutError with the log's end."""
        options = [word for setting in self.settings for word in ("-c", setting)]
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [str(self._bin / "postgres"), "-D", str(self.data), "-k", str(self.folder), *options],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C is for us: clients come to their end before the server does
                **self._as_user(),
            )
        until = time.monotonic() + START_S
        while True:
            try:
                psycopg.connect(self.url, connect_timeout=5).close()
                return
            except psycopg.OperationalError:
                if time.monotonic() > until or self._process.poll() is not None:
                    tail = (self.folder / "log").read_text(errors="replace")[-2000:]
                    raise TimeoutError(f"PostgreSQL did not start:\n{tail}") from None
            time.sleep(0.02)

    def stop(self, number: int = signal.SIGINT) -> None:
        """SIGINT: connections are cut, data is written. SIGQUIT: as a crash. Waits for the end."""
        if self._process is None:
            return
        self._process.send_signal(number)
        try:
            self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(STOP_S)
        self._process = None

    def remove(self) -> None:
        """Stop and delete everything."""
        self.stop(signal.SIGQUIT)
        shutil.rmtree(self.folder, ignore_errors=True)

    @contextlib.contextmanager
    def space(self) -> Iterator[str]:
        """URL of an empty schema of its own; it is dropped at the end."""
        name = f"t_{secrets.token_hex(6)}"
        with psycopg.connect(self.url, autocommit=True) as admin:
            admin.execute(f"CREATE SCHEMA {name}".encode())
        try:
            yield f"{self.url}&options={quote(f'-csearch_path={name}')}"
        finally:
            with psycopg.connect(self.url, autocommit=True) as admin:
                admin.execute("SET client_min_messages = warning")
                admin.execute(f"DROP SCHEMA {name} CASCADE".encode())

    def _as_user(self) -> dict[str, Any]:
        if self._user is None:
            return {"cwd": self.folder}
        return {"cwd": self.folder, "user": self._user.pw_uid, "group": self._user.pw_gid, "extra_groups": []}


def _unprivileged() -> pwd.struct_passwd | None:
    """Whom to run it as; None means as we are."""
    if os.geteuid() != 0:
        return None
    for name in ("postgres", "nobody"):
        with contextlib.suppress(KeyError):
            return pwd.getpwnam(name)
    raise RuntimeError("PostgreSQL refuses to run as root, and there is neither a user postgres nor nobody")


@contextlib.contextmanager
def postgres_server(*, durable: bool = False, settings: tuple[str, ...] = ()) -> Iterator[PostgresServer]:
    """A server as long as the context lasts."""
    server = PostgresServer(durable=durable, settings=settings)
    try:
        server.start()
        yield server
    finally:
        server.remove()
