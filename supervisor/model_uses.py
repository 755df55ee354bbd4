"""Loads of pulled models, as the models folder sees them: noted, protected, and explained when they cannot be.

A supervisor that has loaded a model holds a lock on it until it ends or lets go: `supervisor models gc` and `remove`
leave the model alone meanwhile, even when its entry has left worker.toml. The kernel takes the lock back from a
supervisor that is killed.

A file that is not there is the model's fault, `load_failed`, and its sentence says what became of the pull that should
have brought it: a gated repository, a file that has moved, a pull still at work.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import trio

from protocol.faults import refuse
from supervisor.host.work import ModelSpec
from supervisor.model_store import Store, home_of

log = logging.getLogger(__name__)
_TRIES, _BETWEEN_S = 40, 0.05  # a lock that is only asked about is free again within microseconds, a deletion may last


class ModelUses:
    """The models that this supervisor has loaded.

    Args:
        verify: checks a model's files, returns its revision, raises FaultError (`Digests.verify`).
    """

    def __init__(self, verify: Callable[[ModelSpec], Awaitable[str]]) -> None:
        self._verify = verify
        self._held: dict[tuple[Path, str], int] = {}

    async def verify(self, spec: ModelSpec) -> str:
        """Note the load, check the files, and return the model's revision: to be called before each load.

        Raises:
            FaultError: `load_failed` when a file is not there, with the reason and the cure; else what `verify`
                raises.
        """
        for role, text in spec.model.files.items():
            path = Path(text)
            home = await trio.to_thread.run_sync(home_of, path)
            if home is not None:
                await self._use(spec, *home)
            if not await trio.to_thread.run_sync(os.path.lexists, path):
                sentence = f"Model {spec.name!r}: {path} is not there: {_why(home)}."
                raise refuse("load_failed", sentence, f"files.{role}", missing=str(path))
        return await self._verify(spec)

    async def _use(self, spec: ModelSpec, store: Store, key: str) -> None:
        held = self._held.get((store.models, key))
        if held is not None:
            store.note_load(held)
            return
        for _ in range(_TRIES):
            try:
                lock = store.use(key)
            except OSError as error:
                # Models of another user's, or on a read-only disk: whoever may delete them has to know.
                log.debug("The load of %s cannot be noted: %s", key, error)
                return
            if lock is not None:
                self._held[store.models, key] = lock
                return
            await trio.sleep(_BETWEEN_S)
        sentence = f"Model {spec.name!r}: it is being deleted from {store.models}; pull it again."
        raise refuse("load_failed", sentence)

    def keep_only(self, paths: set[Path]) -> None:
        """Let go of models that the configuration no longer names and of which no instance is left.

        Args:
            paths: files and folders of the models that stay.
        """
        homes = {(home[0].models, home[1]) for path in paths if (home := home_of(path)) is not None}
        for key in self._held.keys() - homes:
            os.close(self._held.pop(key))

    def close(self) -> None:
        """Let go of all."""
        self.keep_only(set())


def _why(home: tuple[Store, str] | None) -> str:
    """The latter half of the sentence: why a file is missing, and the cure."""
    if home is None:
        return "it was moved or deleted; put it back, or correct the path in worker.toml"
    store, key = home
    if store.is_pulled_now(key):
        return "a pull of it is at work; it can be loaded when that is through"
    failure = store.failure(key)
    if failure is not None:
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(failure.at))
        return f"the pull of {when} failed: {failure.message.rstrip('.')}"
    manifest = store.manifest(key)
    with contextlib.suppress(OSError):
        if manifest is None and store.staging(key).is_dir():
            return "its pull was interrupted; run the same `supervisor models pull` again"
    if manifest is not None:
        source = manifest.source + (f":{manifest.file}" if manifest.file else "")
        return f"it was deleted; `supervisor models pull {source} --name {manifest.name} --force` brings it back"
    return "it was deleted or never pulled; `supervisor models pull` brings it"
