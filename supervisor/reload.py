"""Taking a changed configuration up without a restart.

A reload is asked for by SIGHUP, by the control API, or by the files themselves: once a second their names, inodes,
sizes and times are looked at (an editor that replaces a file atomically shows as a new inode, which a watch on the
file alone would lose). They must look the same twice before they are read: a file being written is left in peace.

The whole configuration is read and checked first. With one mistake in it the old one stays in force, and the
problems are logged and kept for the status. A good one is compared with what was loaded last (reload_plan.py), and the
changes are handed to the appliers that the program registered by key. What no applier takes, or what one fails at,
is owed a restart and stays listed until it is changed back.
"""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trio

from supervisor.config import Loaded, read
from supervisor.config_layers import drop_ins
from supervisor.errors import ConfigError, SupervisorError
from supervisor.reload_plan import RESTARTS, Apply, Change, beginnings, plan
from supervisor.settings import Settings

log = logging.getLogger(__name__)

PERIOD_S = 1.0  # the longest wait of somebody who saved a file, twice; six calls of stat cost nothing
Applier = Callable[[Settings, Sequence[Change]], Awaitable[None]]
Look = tuple[tuple[str, int, int, int], ...]  # path, inode, size, time of change in ns


@dataclass(frozen=True)
class Outcome:
    """How a reload went.

    Attributes:
        reason: what asked for it.
        problems: why the old configuration stays in force, or what could not be applied; empty when all went well.
        applied: changes that are in force now.
        restart: all changes that wait for a restart, those of earlier reloads included.
        notes: what works and should be mended all the same.
    """

    reason: str
    problems: tuple[str, ...] = ()
    applied: tuple[Change, ...] = ()
    restart: tuple[Change, ...] = ()
    notes: tuple[str, ...] = ()

    def plain(self) -> dict[str, Any]:
        """For programs; secrets are blotted out."""
        return {
            "reason": self.reason,
            "ok": not self.problems,
            "problems": list(self.problems),
            "applied": [change.shown() for change in self.applied],
            "restart": [change.shown() for change in self.restart],
            "notes": list(self.notes),
        }


class Reloader:
    """Keeps the settings of a running supervisor true to its files.

    Args:
        path: worker.toml.
        settings: what was loaded at the start, and is in force.
        appliers: key or beginning of keys ("log", "worker.labels", "models.*.stall_s") -> who puts its changes into
            force; the longest beginning that matches is called, once for all its changes, with the new settings.
        environ: as for `config.load`.
        period_s: between two looks at the files.
        on_outcome: told after every reload.
        on_hangup: told when SIGHUP came because the terminal of this process was closed: that asks nobody to reload.
    """

    def __init__(
        self,
        path: Path,
        settings: Settings,
        appliers: Mapping[str, Applier],
        *,
        environ: Mapping[str, str] = os.environ,
        period_s: float = PERIOD_S,
        on_outcome: Callable[[Outcome], None] = lambda _outcome: None,
        on_hangup: Callable[[], None] = lambda: None,
    ) -> None:
        self._path = path
        self._settings = settings
        self._appliers = appliers
        self._environ = dict(environ)
        self._period_s = period_s
        self._on_outcome = on_outcome
        self._on_hangup = on_hangup
        self._lock = trio.Lock()
        self._owed: dict[tuple[str, ...], Change] = {}
        self._outcome: Outcome | None = None
        self._read: Look | None = None

    @property
    def settings(self) -> Settings:
        """What was loaded last; see `restart` for what of it is not in force."""
        return self._settings

    @property
    def restart(self) -> tuple[Change, ...]:
        """Changes that wait for a restart."""
        return tuple(self._owed.values())

    @property
    def outcome(self) -> Outcome | None:
        """How the last reload went; None before the first."""
        return self._outcome

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Heed SIGHUP and watch the files until cancelled. Started once both are in place.

        What changed between the load at the start and now is taken up by the first look.
        """
        async with trio.open_nursery() as nursery:
            if hasattr(signal, "SIGHUP"):
                await nursery.start(self._heed_signals)
            nursery.start_soon(self._watch)
            task_status.started()

    async def reload(self, reason: str) -> Outcome:
        """Read everything again now; waits for a reload under way first.

        Cancellation: what was handed to an applier may be half in force; it is for a supervisor that ends.
        """
        async with self._lock:
            self._read = await trio.to_thread.run_sync(look, self._path)
            try:
                loaded = await trio.to_thread.run_sync(read, self._path, self._environ)
            except ConfigError as error:
                return self._tell(Outcome(reason, problems=tuple(error.problems), restart=self.restart))
            return self._tell(await self._take(loaded, reason))

    async def _take(self, loaded: Loaded, reason: str) -> Outcome:
        changes = plan(self._settings, loaded.settings)
        self._settings = loaded.settings
        applied: list[Change] = []
        problems: list[str] = []
        for applier, part in self._shares(changes):
            if applier is None:
                self._owe(part)
                continue
            try:
                await applier(loaded.settings, part)
            except Exception as error:
                # A mistake in one applier must not end a worker that has jobs.
                keys = ", ".join(change.key for change in part)
                problems.append(f"{keys}: could not be taken up: {error}")
                log.warning("%s", problems[-1], exc_info=None if isinstance(error, SupervisorError) else error)
                self._owe(part)
            else:
                applied += part
        return Outcome(reason, tuple(problems), tuple(applied), self.restart, loaded.notes)

    def _shares(self, changes: Sequence[Change]) -> list[tuple[Applier | None, list[Change]]]:
        """Which applier gets what; None for what needs a restart."""
        shares: dict[str, list[Change]] = {}
        for change in changes:
            found = next((key for key in beginnings(change.path) if key in self._appliers), "")
            shares.setdefault("" if change.apply is Apply.RESTART else found, []).append(change)
        return [(self._appliers.get(key) if key else None, part) for key, part in shares.items()]

    def _owe(self, changes: Sequence[Change]) -> None:
        """Note what is not in force; a change back to what is in force takes its note away."""
        for change in changes:
            before = self._owed.pop(change.path, None)
            running = before.old if before is not None else change.old
            if change.new != running:
                self._owed[change.path] = Change(change.path, running, change.new, Apply.RESTART)

    def _tell(self, outcome: Outcome) -> Outcome:
        for problem in outcome.problems:
            log.error("%s", problem)
        if outcome.problems and not outcome.applied:
            log.error("reload (%s): the configuration has mistakes; the old one stays in force", outcome.reason)
        if outcome.applied:
            log.info("reload (%s): now in force: %s", outcome.reason, ", ".join(c.key for c in outcome.applied))
        if outcome.restart:
            keys = ", ".join(change.key for change in outcome.restart)
            log.warning("reload (%s): `%s` is needed for: %s", outcome.reason, RESTARTS, keys)
        for note in outcome.notes:
            log.warning("%s", note)
        self._outcome = outcome
        self._on_outcome(outcome)
        return outcome

    async def _heed_signals(self, task_status: trio.TaskStatus[None]) -> None:
        had_terminal = _has_terminal()
        with trio.open_signal_receiver(signal.SIGHUP) as signals:
            task_status.started()
            async for _ in signals:
                if had_terminal and not _has_terminal():
                    self._on_hangup()
                else:
                    await self.reload("SIGHUP")

    async def _watch(self) -> None:
        before: Look | None = None
        while True:
            seen = await trio.to_thread.run_sync(look, self._path, abandon_on_cancel=True)
            if self._read is None:
                self._read = seen
                if await trio.to_thread.run_sync(self._moved_on, abandon_on_cancel=True):
                    await self.reload("the files changed since the start")
            elif seen != self._read and seen == before:
                await self.reload("the files changed")
            before = seen
            await trio.sleep(self._period_s)

    def _moved_on(self) -> bool:
        """Whether the files say something else than what was loaded at the start."""
        try:
            return read(self._path, self._environ).settings != self._settings
        except ConfigError:
            return True


def look(path: Path) -> Look:
    """What tells a changed file from an unchanged one, for worker.toml and its drop-ins; missing ones are left out."""
    found = []
    for file in (path, *drop_ins(path)):
        try:
            status = file.stat()
        except OSError:
            continue
        found.append((str(file), status.st_ino, status.st_size, status.st_mtime_ns))
    return tuple(found)


def _has_terminal() -> bool:
    """Whether this process has a terminal; one that was closed is gone."""
    try:
        os.close(os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY | os.O_NONBLOCK))
    except OSError:
        return False
    return True
