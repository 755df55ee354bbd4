"""The holds of this worker while it lives: kept on disk, lifted when their time has come, told to those who act.

Everybody who wants work to stop puts a hold here; nobody else says "paused". What follows from the list (nothing is
accepted any more, the coordinator is told, models are unloaded) is done by those who were given `on_change`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path

import trio

from supervisor.intake import holds
from supervisor.intake.holds import Hold, Holds, Mode, Source
from supervisor.state import write_atomically

log = logging.getLogger(__name__)

# The wall clock may be set, and a laptop may sleep: an end is looked for at least this often.
LOOK_S = 5.0


class Pausing:
    """See the module.

    Args:
        path: holds.json in the state folder.
        now: the wall clock, in seconds since the epoch.

    Attributes:
        on_change: called after every change, on the trio thread; must not block.
        on_warm: told the models that come back after a hold, after `on_change`; must not block.
        loaded: names of the models that are loaded now, on one GPU or ("") at all.
    """

    def __init__(self, path: Path, *, now: Callable[[], float] = time.time) -> None:
        self._path, self._now = path, now
        self._changed = trio.Event()
        self.on_change: Callable[[], None] = lambda: None
        self.on_warm: Callable[[tuple[str, ...]], None] = lambda _models: None
        self.loaded: Callable[[str], tuple[str, ...]] = lambda _gpu: ()
        self._holds = self._read().at(now())
        if text := self._holds.reason():
            log.warning("still paused from an earlier life: %s; `supervisor resume` lifts the operator's hold", text)

    def holds(self) -> Holds:
        """Those in force."""
        return self._holds.at(self._now())

    def reason(self, kind: str = "", gpu: str = "") -> str:
        """Why no work (of this kind, on this GPU) is taken, as a phrase; "" when it is."""
        return self.holds().reason(kind, gpu)

    def left_s(self) -> float | None:
        """How long until work is taken again by itself; None when that is not known, or there is no hold."""
        until = self.holds().until
        return None if until is None else max(0.0, until - self._now())

    def put(
        self,
        source: Source,
        reason: str = "",
        *,
        for_s: float | None = None,
        mode: Mode = Mode.STOP,
        gpu: str = "",
        kind: str = "",
    ) -> Hold:
        """Hold from now on; replaces an earlier hold of this source and scope."""
        now = self._now()
        until = None if for_s is None else now + for_s
        warm = () if mode is Mode.STOP else self.loaded(gpu)
        hold = Hold(source=source, reason=reason, since=now, until=until, mode=mode, gpu=gpu, kind=kind, warm=warm)
        self._set(self.holds().put(hold))
        log.info("paused: %s%s", self.reason(kind, gpu), "" if for_s is None else f", for {for_s:g} s")
        return hold

    def lift(self, source: Source, *, gpu: str = "", kind: str = "") -> bool:
        """Lift the hold of this source and scope; False when it had none."""
        before = self.holds()
        after = before.lift(source, gpu=gpu, kind=kind)
        if after == before:
            return False
        self._set(after)
        log.info("the hold of the %s is lifted%s", source, f"; still {text}" if (text := self.reason()) else "")
        return True

    async def run(self) -> None:
        """Lift holds whose time has come. Runs until cancelled."""
        while True:
            end = self._holds.next_end()
            wait_s = float("inf") if end is None else min(max(0.0, end - self._now()), LOOK_S)
            with trio.move_on_after(wait_s):
                await self._changed.wait()
            self._changed = trio.Event()
            if (left := self.holds()) != self._holds:
                log.info("a hold has run out%s", f"; still {text}" if (text := left.reason()) else "")
                self._set(left)

    def _set(self, new: Holds) -> None:
        warm = holds.to_reload(self._holds, new)
        self._holds = new
        try:
            write_atomically(self._path, holds.encode(new))
        except OSError as error:
            log.error("the holds cannot be kept, and a restart would forget them: %s", error)
        self._changed.set()
        self.on_change()
        if warm:
            self.on_warm(warm)

    def _read(self) -> Holds:
        try:
            found, problem = holds.decode(self._path.read_bytes())
        except FileNotFoundError:
            return Holds()
        except OSError as error:
            found, problem = Holds(), f"the file of holds cannot be read: {error.strerror}"
        if problem:
            log.error("%s: %s", self._path, problem)
        return found
