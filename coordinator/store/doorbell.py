"""The doorbell between coordinators that share a database: LISTEN and NOTIFY, each on a connection of its own.

NOTIFY takes a lock of the whole database at commit, so it is never part of a job's transaction, and many rings within
a few milliseconds are one. A ring that is lost costs the poll's half second and never a job.

The gathering time is the same for any number of replicas: ten that ring without a pause make 1100 rings a second, each
heard by ten, which costs the database a quarter of a core. Some dozens would want a longer one.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable

import psycopg

from coordinator.store.base import StoreError
from coordinator.store.postgres_link import Connection

log = logging.getLogger(__name__)

CHANNEL = "bulkhead_jobs"
COALESCE_S = 0.005
LISTEN_S = 0.2  # how long one look at the connection takes, and the end of the thread at most
RECONNECT_S = 1.0


class Doorbell:
    """Rings of this coordinator go out, those of others come in. Two threads, until `close`.

    Args:
        connect: makes a connection; may raise StoreError.
        me: this coordinator, whose own rings are not heard.
        on_ring: called in a thread; also after a connection was made, because rings before that are lost.
    """

    def __init__(self, connect: Callable[[], Connection], me: str, on_ring: Callable[[], None]) -> None:
        self._connect, self._me, self._on_ring = connect, me, on_ring
        self._wanted, self._closed = threading.Event(), threading.Event()
        self.heard = threading.Event()  # set once the channel is listened to
        self._threads = [
            threading.Thread(target=self._again, args=(step,), name=f"doorbell-{name}", daemon=True)
            for name, step in (("out", self._send), ("in", self._hear))
        ]
        for thread in self._threads:
            thread.start()

    def ring(self) -> None:
        """There is work. Returns at once."""
        self._wanted.set()

    def close(self) -> None:
        """End both threads."""
        self._closed.set()
        self._wanted.set()
        for thread in self._threads:
            thread.join()

    def _again(self, step: Callable[[Connection], None]) -> None:
        """Run a step on a connection, and on another one when that breaks."""
        while not self._closed.is_set():
            try:
                connection = self._connect()
            except StoreError as error:
                log.warning("The doorbell is silent, the poll goes on: %s", error)
                self._closed.wait(RECONNECT_S)
                continue
            with contextlib.closing(connection):
                try:
                    step(connection)
                except psycopg.Error as error:
                    log.warning("The doorbell's connection broke: %s", str(error).strip())
            self._closed.wait(0 if self._closed.is_set() else COALESCE_S)

    def _send(self, connection: Connection) -> None:
        while True:
            self._wanted.wait()
            if self._closed.wait(COALESCE_S):
                return
            self._wanted.clear()  # before it is sent: what is rung for from now on needs another one
            connection.execute("SELECT pg_notify(%s, %s)", (CHANNEL, self._me))

    def _hear(self, connection: Connection) -> None:
        connection.execute(f"LISTEN {CHANNEL}")
        self.heard.set()
        self._on_ring()
        while not self._closed.is_set():
            if any(note.payload != self._me for note in connection.notifies(timeout=LISTEN_S, stop_after=1)):
                self._on_ring()
