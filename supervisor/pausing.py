"""The holds of this worker while it lives: kept on disk, lifted when their time has come, told to those who act.

Everybody who wants work to stop puts a hold here; nobody else says "paused". What follows from the list (nothing is
accepted any more, the coordinator is told, models are unloaded) is done by those who were given `on_change`.

A hold with an end is over when the clock on the wall shows that end, or when it has lasted as long as it was put for,
whichever comes first: a clock that is set forward ends it early, one that is set back makes it no longer, and the time
that the machine sleeps counts. Both are looked at every `LOOK_S`, and at once for whoever asks.

Holds outlive a restart, and the models that one of them sent away come back when it ends, also when that was while
nobody looked. What the coordinator or an update wanted is of one life only: they say it again.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import msgspec
import trio

from supervisor.intake import holds
from supervisor.intake.holds import Hold, Holds, Mode, Sight, Source
from supervisor.observe.paced import Paced
from supervisor.state import write_atomically
from supervisor.suspend import system_clocks

log = logging.getLogger(__name__)

# The wall clock may be set, and a laptop may sleep: an end is looked for at least this often.
LOOK_S = 5.0
# The clock on the wall is corrected all the time by a little; less than this is no reason to move an end.
SET_BACK_S = 5.0
OF_ONE_LIFE = (Source.COORDINATOR, Source.UPDATE)


def always_on() -> Callable[[], float]:
    """A clock in seconds that is never set and goes on while the machine sleeps, where the system has one."""
    clocks = system_clocks()
    return clocks.always if clocks else time.monotonic


class Pausing:
    """See the module.

    Args:
        path: holds.json in the state folder.
        now: the wall clock, in seconds since the epoch.
        length: a clock that is never set, in seconds.

    Attributes:
        on_change: called after every change, on the trio thread; must not block.
        on_warm: told the models that come back after a hold, after `on_change`; must not block.
        loaded: names of the models that are loaded now, on one GPU or ("") at all.
    """

    def __init__(
        self, path: Path, *, now: Callable[[], float] = time.time, length: Callable[[], float] | None = None
    ) -> None:
        self._path, self._now, self._length = path, now, length or always_on()
        self._said = Paced(log, "words about holds", self._length)
        self._changed = trio.Event()
        self.on_change: Callable[[], None] = lambda: None
        self.on_warm: Callable[[tuple[str, ...]], None] = lambda _models: None
        self.loaded: Callable[[str], tuple[str, ...]] = lambda _gpu: ()
        self._lost = self._unkept = ""
        self._ends: dict[tuple[Source, str, str], tuple[float, float]] = {}  # until, and the same by `length`
        self._told = self._read()
        self._holds = _of_this_life(self._told).at(now())
        if text := self._holds.reason():
            log.warning("still paused from an earlier life: %s; `supervisor resume` lifts the operator's hold", text)

    def holds(self) -> Holds:
        """Those in force."""
        self._keep_to_length()
        return self._holds.at(self._now())

    def reason(self, kind: str = "", gpu: str = "") -> str:
        """Why no work (of this kind, on this GPU) is taken, as a phrase; "" when it is."""
        return self.holds().reason(kind, gpu)

    def left_s(self) -> float | None:
        """How long until work is taken again by itself; None when that is not known, or there is no hold."""
        return self._left(self.holds().until)

    def kinds_held(self, kinds: Iterable[str], gpus: Iterable[str] = ()) -> dict[str, tuple[str, float | None]]:
        """Cordons of task kinds, for a model on these GPUs.

        Returns:
            Kind -> why no jobs of it are taken, as a phrase, and for how many more seconds (None: not known).
        """
        found, where = self.holds(), tuple(gpus)
        return {
            kind: (why, self._left(holds.last_end(found.cordons(kind, where))))
            for kind, why in found.kinds_held(kinds, where).items()
        }

    def sights(self) -> tuple[Sight, ...]:
        """What the owner must know about the list itself: that it could not be read or kept."""
        return tuple(
            Sight(source=Source.OPERATOR, text=text, unknown=True) for text in (self._lost, self._unkept) if text
        )

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
        """Hold from now on; replaces an earlier hold of this source and scope.

        Raises:
            ValueError: a hold of one task kind cannot unload: a model may serve other kinds as well.
        """
        if kind and mode is not Mode.STOP:
            raise ValueError("a hold of one task kind can only stop accepting; unload the model itself instead")
        now = self._now()
        until = None if for_s is None else now + for_s
        warm = () if mode is Mode.STOP else self.loaded(gpu)
        hold = Hold(source=source, reason=reason, since=now, until=until, mode=mode, gpu=gpu, kind=kind, warm=warm)
        self._ends.pop(hold.key, None)
        self._set(self.holds().put(hold))
        span = "" if for_s is None else f", for {for_s:g} s"
        self._said.say(logging.INFO, "paused: %s%s", self.reason(kind, gpu), span)
        return hold

    def lift(self, source: Source, *, gpu: str = "", kind: str = "") -> bool:
        """Lift the hold of this source and scope; False when it had none."""
        before = self.holds()
        after = before.lift(source, gpu=gpu, kind=kind)
        if after == before:
            return False
        self._set(after)
        still = f"; still {text}" if (text := self.reason()) else ""
        self._said.say(logging.INFO, "the hold of the %s is lifted%s", source, still)
        return True

    def forget_warm(self, models: Iterable[str]) -> None:
        """These were unloaded for good: no hold brings them back."""
        gone = tuple(models)
        self._told = self._told.forget(gone)  # also of what ended and was not looked at yet
        after = self.holds().forget(gone)
        if after != self._holds:
            self._set(after)

    async def run(self) -> None:
        """Lift holds whose time has come, those first that ended while nobody looked. Runs until cancelled."""
        while True:
            if (left := self.holds()) != self._told:
                if len(left.items) < len(self._told.items):
                    log.info("a hold has run out%s", f"; still {text}" if (text := left.reason()) else "")
                self._set(left)
            end = self._holds.next_end()
            wait_s = float("inf") if end is None else min(max(0.0, end - self._now()), LOOK_S)
            with trio.move_on_after(wait_s):
                await self._changed.wait()
            self._changed = trio.Event()

    def _left(self, until: float | None) -> float | None:
        return None if until is None else max(0.0, until - self._now())

    def _keep_to_length(self) -> None:
        """Bring forward the end of what would last longer than it was put for: the clock was set back."""
        now, length = self._now(), self._length()
        items, ends = [], {}
        for hold in self._holds.items:
            until = hold.until
            if until is not None:
                known = self._ends.get(hold.key)
                if known is None or known[0] != until:
                    # Of an earlier life its length is all that is known; since then the clock may have been set back.
                    known = (until, length + max(0.0, min(until - now, until - hold.since)))
                if until - now > known[1] - length + SET_BACK_S:
                    until = now + max(0.0, known[1] - length)
                    known = (until, known[1])
                    log.info("the clock was set back; the hold of the %s ends with its time all the same", hold.source)
                ends[hold.key] = known
            items.append(hold if until == hold.until else msgspec.structs.replace(hold, until=until))
        self._holds, self._ends = Holds(tuple(items)), ends

    def _set(self, new: Holds) -> None:
        warm = holds.to_reload(self._told, new)
        self._holds = self._told = new
        try:
            write_atomically(self._path, holds.encode(new))
        except OSError as error:
            self._unkept = f"holds cannot be kept, and a restart would forget them: {error.strerror}"
            log.error("the holds cannot be kept, and a restart would forget them: %s", error)
        else:
            self._unkept = ""
        self._changed.set()
        self.on_change()
        if warm:
            self.on_warm(warm)

    def _read(self) -> Holds:
        try:
            data = self._path.read_bytes()
            found, problem = holds.decode(data)
        except FileNotFoundError:
            return Holds()
        except OSError as error:
            data, found, problem = b"", Holds(), f"the file of holds cannot be read: {error.strerror}"
        if problem:
            log.error("%s: %s", self._path, problem)
            self._lost = f"holds of an earlier life are lost: {problem}{self._set_aside(data)}"
        return found

    def _set_aside(self, data: bytes) -> str:
        """Keep what cannot be read from being overwritten. Returns a phrase about where it is."""
        aside = self._path.with_suffix(".json.unreadable")
        try:
            write_atomically(aside, data)
        except OSError:
            return ""
        return f"; kept as {aside}"


def _of_this_life(found: Holds) -> Holds:
    for each in found.items:
        if each.source in OF_ONE_LIFE:
            found = found.lift(each.source, gpu=each.gpu, kind=each.kind)
    return found
