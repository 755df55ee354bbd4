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
from supervisor.config_commands import origins
from supervisor.config_edit import Edited, StaleEdit, edit
from supervisor.config_layers import drop_ins, read_layers
from supervisor.errors import ConfigError
from supervisor.reload import Outcome, Reloader

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
            etag = read_layers(self._path, {}).etag
            loaded = read(self._path, self._environ)
        except ConfigError as error:
            problems = error.problems
            settings = masked(self._reloader.settings)
            values: list[dict[str, Any]] = []
        else:
            settings, etag, notes = masked(loaded.settings), loaded.layers.etag, loaded.notes
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
            What came of it, and the new etag.

        Raises:
            StaleEdit: the files changed since.
            ConfigError: the result would not be valid, with every problem; the file stands.
            NoPermission: the file cannot be written.

        Cancellation: not before the file is written; what it says is then taken up by the watch over the files.
        """
        async with self._editing:
            edited = await trio.to_thread.run_sync(self._edit, changes, etag)
            outcome = await self._reloader.reload(REASON)
        return _told(edited, outcome), edited.etag

    def _edit(self, changes: Mapping[str, Any], etag: str) -> Edited:
        try:
            return edit(self._path, changes, if_match=etag)
        except StaleEdit:
            raise
        except ConfigError:
            # Another program may have written between two looks of ours; then that is what there is to say.
            if etag and read_layers(self._path, {}).etag != etag:
                raise StaleEdit([f"{self._path}: was changed since it was shown; look at it again"]) from None
            raise


def _told(edited: Edited, outcome: Outcome) -> dict[str, Any]:
    """How an edit went: `applied` is in force, `restart` waits, `stronger` are keys that something overrides."""
    plain = outcome.plain()
    del plain["reason"]
    return {**plain, "stronger": edited.stronger}
