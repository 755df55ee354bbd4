"""Assignments that the dashboard believes to be ours, on disk: one small file for each, until its end is told.

The journal begins with an accepted offer, but a dashboard's assignment is taken before there is an offer, and an
attempt without output files leaves no slip in the next life. So a note is written before an assignment is asked for or
as soon as it was given, and goes before its end is told: told twice, an end could meet the next study.
"""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
from pathlib import Path

import trio

from supervisor.link.dialects.goliat_wire import Slip
from supervisor.link.outbox import sync_folder

log = logging.getLogger(__name__)


class Notes:
    """See the module.

    Args:
        folder: private to this dialect; made when it is needed.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    async def write(self, slip: Slip) -> None:
        """Note an assignment. Raises OSError."""
        await trio.to_thread.run_sync(self._write, slip)

    def _write(self, slip: Slip) -> None:
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=self._folder, prefix=".", delete=False) as out:
            try:
                out.write(slip.text())
                out.flush()
                os.fsync(out.fileno())
                Path(out.name).replace(self._folder / f"{slip.job}.json")
            except BaseException:
                with contextlib.suppress(OSError):
                    Path(out.name).unlink()
                raise
        sync_folder(self._folder)

    async def remove(self, job: str) -> None:
        """Forget it. Raises OSError."""

        def remove() -> None:
            path = self._folder / f"{job}.json"
            if path.exists():
                path.unlink()
                sync_folder(self._folder)

        await trio.to_thread.run_sync(remove)

    async def all(self) -> dict[str, Slip]:
        """Job -> slip, of all lives. What cannot be read is left out. Raises OSError."""

        def read() -> dict[str, Slip]:
            found = {}
            for path in sorted(self._folder.glob("[!.]*.json")):
                try:
                    slip = Slip.read(path.read_bytes())
                except ValueError as error:
                    log.warning("%s is not read: %s", path, error)
                else:
                    found[slip.job] = slip
            return found

        return await trio.to_thread.run_sync(read)
