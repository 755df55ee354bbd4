"""What an engine is doing when it says nothing.

Theory of operation. This module never decides that an engine has to go: progress within its limit and the job's
deadline decide. It says *why* nothing comes, for the incident report and for those few answers that make waiting
pointless. A heartbeat alone gives both false alarms (a library that computes with the interpreter lock held answers
no ping) and misses (two Python threads that wait for each other leave the thread that answers pings alone), so the
diagnosis is a table of four things: how long ago the engine answered, how long ago work moved, how much CPU it used
since we last looked, and what its threads wait for. Measured on real children, each row for three seconds:

    doing                          beats   state, CPU    diagnosis
    nothing, or C without the lock yes     S   0 %       working while no work is in flight, else deadlocked
    numpy, a pure Python loop      yes     R 100 %       working
    regex or big numbers, lock held no     R 100 %       busy-in-C
    asleep in C, lock held         no      S   0 %       wedged
    native mutexes crossed         no      S   0 %       wedged
    Python locks crossed           yes     S   0 %       deadlocked
    SIGSTOP                        no      T   0 %       stopped
    a call that never returns      no      D   0 %       uninterruptible

A GPU that works for the engine counts as its CPU does: many libraries sleep until the kernel is done. An engine on a
GPU of which nothing is known is never called wedged. `wedged` and `stopped` come from soft evidence and may end an
engine early only after two strikes.
"""

from __future__ import annotations

import collections
import enum
import time
from collections.abc import Callable

import msgspec
import trio

from supervisor.host import family, procfs

# How often the host should ping. An answer that is missing three times is late.
BEAT_S = 1.0
LATE_S = 3.0
# Shares of one core. Below the first an engine does nothing, from the second on it works. The first is not nought: each
# Python thread that waits for the interpreter lock wakes 200 times a second to look for it.
IDLE_SHARE = 0.05
BUSY_SHARE = 0.20
# Share of the GPU's time; a desktop's own use stays below it most of the time.
GPU_BUSY_SHARE = 0.05
# A disk or a network file system may take this long; longer is a driver or a mount that hangs.
UNINTERRUPTIBLE_S = 5.0
# The same soft diagnosis for two spells of this length ends an engine early.
STRIKE_S = 5.0
STRIKES = 2
# Threads that are looked at one by one, and only when something is amiss: about 15 microseconds each.
_MAX_THREADS = 128


class Diagnosis(enum.StrEnum):
    """Why nothing comes, if nothing comes."""

    WORKING = "working"
    BUSY_IN_C = "busy-in-C"
    WEDGED = "wedged"
    DEADLOCKED = "deadlocked"
    STOPPED = "stopped"
    UNINTERRUPTIBLE = "uninterruptible"
    UNKNOWN = "unknown"

    def describe(self) -> str:
        """One sentence for people."""
        return _SENTENCES[self]


_SENTENCES = {
    Diagnosis.WORKING: "The engine works, or has nothing to do.",
    Diagnosis.BUSY_IN_C: "The engine computes in native code and answers nothing meanwhile.",
    Diagnosis.WEDGED: "The engine sleeps in native code and answers nothing.",
    Diagnosis.DEADLOCKED: "The engine's work stands still and uses no CPU; it waits for a lock or for an outsider.",
    Diagnosis.STOPPED: "The engine was stopped (SIGSTOP, a debugger or a freezer).",
    Diagnosis.UNINTERRUPTIBLE: "The engine hangs in the kernel, where no signal reaches it.",
    Diagnosis.UNKNOWN: "What the engine does cannot be told.",
}


class Bounds(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds from which on something counts; tests shorten them."""

    late_s: float = LATE_S
    strike_s: float = STRIKE_S
    uninterruptible_s: float = UNINTERRUPTIBLE_S


BOUNDS = Bounds()


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of an engine at one moment.

    Attributes:
        beat_s: seconds since it last answered; None when it was never asked.
        progress_s: seconds since work last moved; None when no work is in flight.
        cpu_share: CPU used over the last `LATE_S`, in cores; None until we have looked twice.
        state: of the thread that says most: D, else T, else R, else S; "" when there is nothing to read.
        state_s: how long that thread has been found so at every look; in D, also without having run in between.
        wchan: kernel function that this thread waits in.
        gpu_share: use of its GPU, 0 to 1; None when it is not known.
        on_gpu: whether the model was loaded onto a GPU.
    """

    beat_s: float | None = None
    progress_s: float | None = None
    cpu_share: float | None = None
    state: str = ""
    state_s: float = 0.0
    wchan: str = ""
    gpu_share: float | None = None
    on_gpu: bool = False


def classify(facts: Facts, bounds: Bounds = BOUNDS) -> Diagnosis:
    """The table of this module's theory."""
    if not facts.state or facts.state in "ZXx":
        return Diagnosis.UNKNOWN
    if facts.state in "Tt":
        return Diagnosis.STOPPED
    late = facts.beat_s is not None and facts.beat_s > bounds.late_s
    still = facts.progress_s is not None and facts.progress_s > bounds.late_s
    if not late and not still:
        return Diagnosis.WORKING
    if facts.state == "D" and facts.state_s > bounds.uninterruptible_s:
        return Diagnosis.UNINTERRUPTIBLE
    if _works(facts):
        return Diagnosis.BUSY_IN_C if late else Diagnosis.WORKING
    if facts.cpu_share is None or facts.cpu_share >= IDLE_SHARE or (facts.on_gpu and facts.gpu_share is None):
        return Diagnosis.UNKNOWN
    return Diagnosis.WEDGED if late else Diagnosis.DEADLOCKED


def _works(facts: Facts) -> bool:
    computes = facts.cpu_share is not None and facts.cpu_share >= BUSY_SHARE
    # Found in R look after look, with little CPU: it would run if the box let it. Found once: it just looked for the
    # interpreter lock. A short D is a disk that answers.
    starved = facts.state == "R" and facts.state_s > 0
    return computes or starved or facts.state == "D" or (facts.gpu_share or 0.0) >= GPU_BUSY_SHARE


class _Thread(msgspec.Struct):
    """Since when a thread has been found in R or D, and by which numbers we would see that it ran since."""

    state: str
    since: float
    ran: tuple[int | None, int, int] | None


class Watchdog:
    """Watches one engine. Its owner tells it what came over the wire and asks `sample` about once a second.

    Args:
        leader: pid of the child that we started; the engine below it is found.
        told: the pid of the engine's hello, once there was one.
        clock: seconds; best those that do not pass while the machine sleeps.

    Attributes:
        gpu_share, on_gpu: as in `Facts`; set by the owner whenever it learns them.
        diagnosis: of the latest sample.
        strikes: how many spells of `STRIKE_S` in a row were wedged, or stopped; at most `STRIKES`.
    """

    def __init__(
        self,
        leader: int,
        *,
        told: int | None = None,
        clock: Callable[[], float] = time.monotonic,
        bounds: Bounds = BOUNDS,
    ) -> None:
        self.leader = leader
        self.told = told
        self.gpu_share: float | None = None
        self.on_gpu = False
        self.strikes = 0
        self.diagnosis = Diagnosis.UNKNOWN
        self._clock = clock
        self._bounds = bounds
        self._sampled: float | None = None
        self._beat: float | None = None
        self._progress: float | None = None
        self._pid = 0
        self._spent: collections.deque[tuple[float, int]] = collections.deque()  # when, ticks
        self._held: dict[int, _Thread] = {}
        self._struck = (Diagnosis.UNKNOWN, 0.0)  # the diagnosis being counted, and since when
        self._facts = Facts()

    # ---- told by the owner

    def beat(self) -> None:
        """The engine answered: any frame counts."""
        self._beat = self._clock()

    def progress(self) -> None:
        """Work was handed to it, or moved."""
        self._progress = self._clock()

    def rest(self) -> None:
        """No work is in flight any more."""
        self._progress = None

    # ---- asked by the owner

    def facts(self) -> Facts:
        """What the latest sample saw, with the ages as of now."""
        now = self._clock()
        return msgspec.structs.replace(self._facts, beat_s=_age(now, self._beat), progress_s=_age(now, self._progress))

    async def sample(self) -> Diagnosis:
        """Look at the process once and count strikes.

        A checkpoint; the reading itself is a few small files that never block (see procfs.py).
        """
        await trio.lowlevel.checkpoint()
        now = self._clock()
        self._forgive_absence(now)
        self._look(now)
        self.diagnosis = classify(self.facts(), self._bounds)
        self._strike(now)
        return self.diagnosis

    def slept(self, seconds: float) -> None:
        """The machine slept for so long: what was young then is young now. For clocks that count sleep."""
        if self._beat is not None:
            self._beat = min(self._beat + seconds, self._clock())
        if self._progress is not None:
            self._progress = min(self._progress + seconds, self._clock())

    def _forgive_absence(self, now: float) -> None:
        """A supervisor that was stopped itself has asked nothing and read nothing meanwhile."""
        gap_s = 0.0 if self._sampled is None else now - self._sampled
        if gap_s > self._bounds.late_s:
            self.slept(gap_s)
            self.strikes, self._struck = 0, (Diagnosis.UNKNOWN, now)
        self._sampled = now

    # ---- looking

    def _look(self, now: float) -> None:
        whole = procfs.stat(self._engine())
        if whole is None:
            self._facts = Facts()
            return
        state, state_s, where = whole.state, 0.0, ""
        beat_s, progress_s = _age(now, self._beat), _age(now, self._progress)
        soon_s = self._bounds.late_s / 3
        if (beat_s or 0.0) > soon_s or (progress_s or 0.0) > soon_s or state != "S":
            state, state_s, where = self._threads(now, whole.state)
        else:
            self._held.clear()
        self._facts = Facts(
            cpu_share=self._share(now, whole.ticks),
            state=state,
            state_s=state_s,
            wchan=where,
            gpu_share=self.gpu_share,
            on_gpu=self.on_gpu,
        )

    def _engine(self) -> int:
        """The engine's pid, looked up again until it is below the leader and whenever it is gone."""
        if self._pid in (0, self.leader) or procfs.stat(self._pid) is None:
            before, self._pid = self._pid, family.engine_pid(self.leader, self.told)
            if self._pid != before:
                self._spent.clear()
                self._held.clear()
        return self._pid

    def _share(self, now: float, ticks: int) -> float | None:
        """CPU over the last `late_s`, or since the first look: shorter spells are lost in hundredths of a second."""
        self._spent.append((now, ticks))
        while len(self._spent) > 2 and now - self._spent[1][0] >= self._bounds.late_s:
            self._spent.popleft()
        then, before = self._spent[0]
        return (ticks - before) / procfs.TICKS_PER_S / (now - then) if now > then else None

    def _threads(self, now: float, leading: str) -> tuple[str, float, str]:
        """State, how long it lasts, and wchan of the thread that says most."""
        states: dict[str, int] = {}
        held: dict[int, _Thread] = {}
        for thread in procfs.threads(self._pid)[:_MAX_THREADS]:
            seen = procfs.stat(self._pid, thread)
            if seen is None:
                continue
            states.setdefault(seen.state, thread)
            if seen.state in "RD":
                ran = (procfs.ran_ns(self._pid, thread), seen.ticks, seen.faults) if seen.state == "D" else None
                known = self._held.get(thread)
                same = known is not None and (known.state, known.ran) == (seen.state, ran)
                held[thread] = known if known is not None and same else _Thread(seen.state, now, ran)
        self._held = held
        for state in "DTtR":
            if state in states:
                longest = {number: found.since for number, found in held.items() if found.state == state}
                thread = min(longest, key=longest.__getitem__, default=states[state])
                return state, now - longest.get(thread, now), procfs.wchan(self._pid, thread)
        return leading, 0.0, procfs.wchan(self._pid)

    def _strike(self, now: float) -> None:
        soft = self.diagnosis in (Diagnosis.WEDGED, Diagnosis.STOPPED)
        if not soft or self._struck[0] is not self.diagnosis:
            self.strikes, self._struck = 0, (self.diagnosis, now)
        elif now - self._struck[1] >= self._bounds.strike_s:  # at most one for each time that we looked
            self.strikes, self._struck = min(STRIKES, self.strikes + 1), (self.diagnosis, now)


def _age(now: float, then: float | None) -> float | None:
    return None if then is None else now - then
