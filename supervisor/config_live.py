"""The configuration of a running supervisor, for its control API: what is in force and why, and edits of it.

What is shown is what the files say, with the place of each value; what of it is not in force yet waits for a restart
and is listed. Files with mistakes in them are shown as these mistakes, beside the settings that are in force.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import trio

from supervisor.config import masked, read
from supervisor.config_edit import edit
from supervisor.config_edit import etag as etag_of
from supervisor.config_layers import drop_ins
from supervisor.config_shown import origins
from supervisor.errors import ConfigError
from supervisor.reload import Reloader
from supervisor.reload_plan import Apply, plan

REASON = "the control API"


class LiveConfig:
    """See the module.

    Args:
        path: worker.toml.
        reloader: what takes changes up.
        environ: as for `config.load`.
    """

    def __init__(self, path: Path, reloader: Reloader, environ: Mapping[str, str] = os.environ) -> None:
        self._path, self._reloader, self._environ = path, reloader, environ
        self._editing = trio.Lock()

    async def shown(self) -> tuple[dict[str, Any], str]:
        """What there is to see, and its etag; "" when the files cannot be told apart from others, being no TOML."""
        return await trio.to_thread.run_sync(self._shown)

    def _shown(self) -> tuple[dict[str, Any], str]:
        problems: list[str] = []
        notes: tuple[str, ...] = ()
        etag = ""
        try:
            etag = etag_of(self._path)  # first: if they change meanwhile, an edit of what is shown is refused
            loaded = read(self._path, self._environ)
        except ConfigError as error:
            problems = error.problems
            settings = masked(self._reloader.settings)
            values: list[dict[str, Any]] = []
        else:
            settings, notes = masked(loaded.settings), loaded.notes
            values = origins(loaded, settings)
        told = {
            "path": str(self._path),
            "files": [str(file) for file in (self._path, *drop_ins(self._path))],
            "settings": settings,
            "values": values,
            "restart": [change.shown() for change in self._reloader.restart],
            "problems": problems,
            "notes": list(notes),
        }
        return told, etag

    async def edit(self, changes: Mapping[str, Any], etag: str) -> tuple[dict[str, Any], str]:
        """Change worker.toml and take the changes up.

        Args:
            changes: dotted key -> plain value; None takes the key out.
            etag: of what whoever edits has seen; "" edits whatever stands there.

        Returns:
            What came of it, and the new etag: `applied` is in force, `restart` waits for one, `problems` says what
            could not be taken up, `stronger` has the edited keys that a drop-in or a variable overrides.

        Raises:
            StaleEdit: the files changed since.
            ConfigError: the result would not be valid, with every problem; the file stands.
            NoPermission: the file cannot be written.

        Cancellation: not before the file is written; what it says is then taken up by the watch over the files.
        """
        async with self._editing:
            before = self._reloader.settings
            edited = await trio.to_thread.run_sync(lambda: edit(self._path, changes, if_match=etag))
            outcome = await self._reloader.reload(REASON)
            told = outcome.plain()
        del told["reason"]
        if not outcome.problems:
            # The watch over the files may have been faster than we: what is in force is told, whoever took it up.
            owed = {change.path for change in self._reloader.restart}
            differs = plan(before, self._reloader.settings)
            told["applied"] = [
                change.shown() for change in differs if change.apply is not Apply.RESTART and change.path not in owed
            ]
        return {**told, "stronger": edited.stronger}, edited.etag
