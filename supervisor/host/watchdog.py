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

import enum
import time
from collections.abc import Callable

import msgspec
import trio

from supervisor.host import family, procfs

# How often the host should ping. An answer that is missing three times is late.
BEAT_S = 1.0
LATE_S = 3.0
# Shares of one core. Below the first an engine does nothing, from the second on it works.
IDLE_SHARE = 0.02
BUSY_SHARE = 0.20
# Share of the GPU's time; a desktop's own use stays below it most of the time.
GPU_BUSY_SHARE = 0.05
# A disk or a network file system may take this long; longer is a driver or a mount that hangs.
UNINTERRUPTIBLE_S = 5.0
# The same soft diagnosis for two spells of this length ends an engine early.
STRIKE_S = 5.0
STRIKES = 2
# Shorter spells say nothing about the CPU: /proc counts in hundredths of a second.
_SHORTEST_S = 0.25
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
    Diagnosis.DEADLOCKED: "The engine answers, but its work stands still and uses no CPU.",
    Diagnosis.STOPPED: "The engine was stopped (SIGSTOP, a debugger or a freezer).",
    Diagnosis.UNINTERRUPTIBLE: "The engine hangs in the kernel, where no signal reaches it.",
    Diagnosis.UNKNOWN: "What the engine does cannot be told.",
}


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of an engine at one moment.

    Attributes:
        beat_s: seconds since it last answered; None when it was never asked.
        progress_s: seconds since work last moved; None when no work is in flight.
        cpu_share: CPU used since we last looked, in cores; None when we look for the first time.
        state: of the thread that says most: D, else T, else R, else S; "" when there is nothing to read.
        state_s: how long that thread has been found in D without having run in between; 0 for other states.
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


def classify(facts: Facts) -> Diagnosis:
    """The table of this module's theory."""
    if not facts.state or facts.state in "ZXx":
        return Diagnosis.UNKNOWN
    if facts.state in "Tt":
        return Diagnosis.STOPPED
    if facts.state == "D" and facts.state_s > UNINTERRUPTIBLE_S:
        return Diagnosis.UNINTERRUPTIBLE
    late = facts.beat_s is not None and facts.beat_s > LATE_S
    still = facts.progress_s is not None and facts.progress_s > LATE_S
    if not late and not still:
        return Diagnosis.WORKING
    if _works(facts):
        return Diagnosis.BUSY_IN_C if late else Diagnosis.WORKING
    if facts.cpu_share is None or facts.cpu_share >= IDLE_SHARE or (facts.on_gpu and facts.gpu_share is None):
        return Diagnosis.UNKNOWN
    return Diagnosis.WEDGED if late else Diagnosis.DEADLOCKED


def _works(facts: Facts) -> bool:
    # R with little CPU is an engine that would run if it were let; a short D is a disk that answers.
    computes = facts.cpu_share is not None and facts.cpu_share >= BUSY_SHARE
    return computes or facts.state in "RD" or (facts.gpu_share or 0.0) >= GPU_BUSY_SHARE


class _Thread(msgspec.Struct):
    """When a thread was first found in D, and by which numbers we would see that it ran since."""

    since: float
    ran: tuple[int | None, int, int]


class Watchdog:
    """Watches one engine. Its owner tells it what came over the wire and asks `sample` about once a second.

    Args:
        leader: pid of the child that we started; the engine below it is found.
        clock: seconds that do not pass while the machine sleeps.
    """

    def __init__(self, leader: int, *, told: int | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self.leader = leader
        self.told = told
        self.gpu_share: float | None = None
        self.on_gpu = False
        self.strikes = 0
        self.diagnosis = Diagnosis.UNKNOWN
        self._clock = clock
        self._beat: float | None = None
        self._progress: float | None = None
        self._pid = 0
        self._before: tuple[float, int] | None = None  # when, ticks
        self._cpu_share: float | None = None
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
        self._look(now)
        self.diagnosis = classify(self.facts())
        self._strike(now)
        return self.diagnosis

    @property
    def hopeless(self) -> bool:
        """Whether waiting for the limit is pointless: two strikes of a soft diagnosis, or stuck in the kernel."""
        return self.strikes >= STRIKES or self.diagnosis is Diagnosis.UNINTERRUPTIBLE

    # ---- looking

    def _look(self, now: float) -> None:
        whole = procfs.stat(self._engine())
        if whole is None:
            self._facts, self._before, self._cpu_share = Facts(), None, None
            return
        if self._before is None or whole.ticks < self._before[1]:
            self._before = (now, whole.ticks)
        elif now - self._before[0] >= _SHORTEST_S:
            self._cpu_share = (whole.ticks - self._before[1]) / procfs.TICKS_PER_S / (now - self._before[0])
            self._before = (now, whole.ticks)
        state, state_s, where = whole.state, 0.0, ""
        beat_s, progress_s = _age(now, self._beat), _age(now, self._progress)
        amiss = (beat_s or 0.0) > BEAT_S or (progress_s or 0.0) > BEAT_S or state != "S"
        if amiss and state not in "ZXx":
            state, state_s, where = self._threads(now, whole.state)
        else:
            self._held.clear()
        self._facts = Facts(
            cpu_share=self._cpu_share,
            state=state,
            state_s=state_s,
            wchan=where,
            gpu_share=self.gpu_share,
            on_gpu=self.on_gpu,
        )

    def _engine(self) -> int:
        """The engine's pid, looked up again until it is below the leader and whenever it is gone."""
        if self._pid in (0, self.leader) or procfs.stat(self._pid) is None:
            self._pid = family.engine_pid(self.leader, self.told)
            self._before, self._cpu_share = None, None
            self._held.clear()
        return self._pid

    def _threads(self, now: float, leading: str) -> tuple[str, float, str]:
        """State, how long it lasts, and wchan of the thread that says most."""
        states: dict[str, int] = {}
        held: dict[int, _Thread] = {}
        for thread in procfs.threads(self._pid)[:_MAX_THREADS]:
            seen = procfs.stat(self._pid, thread)
            if seen is None:
                continue
            states.setdefault(seen.state, thread)
            if seen.state == "D":
                ran = (procfs.ran_ns(self._pid, thread), seen.ticks, seen.faults)
                known = self._held.get(thread)
                held[thread] = known if known is not None and known.ran == ran else _Thread(now, ran)
        self._held = held
        if held:
            thread = min(held, key=lambda number: held[number].since)
            return "D", now - held[thread].since, procfs.wchan(self._pid, thread)
        for state in ("T", "t", "R"):
            if state in states:
                return state, 0.0, procfs.wchan(self._pid, states[state])
        return leading, 0.0, procfs.wchan(self._pid)

    def _strike(self, now: float) -> None:
        if self.diagnosis not in (Diagnosis.WEDGED, Diagnosis.STOPPED):
            self.strikes, self._struck = 0, (self.diagnosis, now)
        elif self._struck[0] is not self.diagnosis:
            self.strikes, self._struck = 0, (self.diagnosis, now)
        else:
            self.strikes = min(STRIKES, int((now - self._struck[1]) / STRIKE_S))


def _age(now: float, then: float | None) -> float | None:
    return None if then is None else now - then
