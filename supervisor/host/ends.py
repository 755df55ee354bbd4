"""How an instance ended, as data: what people read, what a fault carries, and whether it counts against the engine."""

from __future__ import annotations

import enum
import signal
from typing import Any

import msgspec

from supervisor.host.child import Exit


class Why(enum.StrEnum):
    """What ended an instance."""

    # we wanted it, and it was well
    ASKED = "asked"
    IDLE = "idle"
    EVICTED = "evicted"
    RECYCLED = "recycled"
    # it went by itself
    EXITED = "exited"
    SIGNALLED = "signalled"
    OOM_KILLED = "oom-killed"
    # it never got as far as a process that serves
    NOT_STARTED = "not-started"
    LOAD_REFUSED = "load-refused"
    # we ended it
    NO_HELLO = "no-hello"
    LOAD_STALLED = "load-stalled"
    STUCK_CANCEL = "stuck-cancel"
    HUNG = "hung"
    BROKEN_PROTOCOL = "broken-protocol"
    CLOSED_OUTPUT = "closed-output"
    MEMORY = "memory"
    SCRATCH = "scratch"
    WEDGED = "wedged"
    # nobody could
    UNKILLABLE = "unkillable"


HARMLESS = frozenset({Why.ASKED, Why.IDLE, Why.EVICTED, Why.RECYCLED})
# Whoever asked for the cancel may have been impatient: that alone puts no engine out of service.
_UNCOUNTED = HARMLESS | {Why.STUCK_CANCEL}

_PHRASES = {
    Why.ASKED: "ended as asked",
    Why.IDLE: "ended for want of work",
    Why.EVICTED: "unloaded",
    Why.RECYCLED: "replaced between two jobs",
    Why.OOM_KILLED: "killed by the kernel for want of memory",
    Why.NOT_STARTED: "not started",
    Why.LOAD_REFUSED: "ended because it could not load its model",
    Why.NO_HELLO: "ended because it did not say hello",
    Why.LOAD_STALLED: "ended because its load stood still",
    Why.STUCK_CANCEL: "ended because it ignored a cancel",
    Why.HUNG: "ended because its work stood still",
    Why.BROKEN_PROTOCOL: "killed because it broke the protocol",
    Why.CLOSED_OUTPUT: "ended because it closed its output",
    Why.MEMORY: "ended because it took too much memory",
    Why.SCRATCH: "ended because its scratch folder grew too large",
    Why.WEDGED: "ended because it would never answer",
    Why.UNKILLABLE: "not to be killed: it hangs in the kernel",
}


class End(msgspec.Struct, frozen=True, kw_only=True):
    """One end.

    Attributes:
        code, signal: of the process, where it was reaped.
        when: "while it loaded the model", "while it ran a job"; "" when it had nothing to do.
        note: what more there is to say about why: the reason of an eviction, what was measured.
    """

    why: Why
    code: int | None = None
    signal: int | None = None
    when: str = ""
    note: str = ""

    @property
    def bad(self) -> bool:
        """Whether something was wrong: worth a report."""
        return self.why not in HARMLESS

    @property
    def counts(self) -> bool:
        """Whether it counts as a failure of the engine when the next start is paced."""
        return self.why not in _UNCOUNTED

    @property
    def how(self) -> str:
        """One phrase, without when: "killed by SIGSEGV"."""
        if self.why in (Why.EXITED, Why.SIGNALLED):
            return Exit(code=self.code, signal=self.signal).describe()
        return _PHRASES[self.why]

    def phrase(self) -> str:
        """One phrase for people: "killed by SIGSEGV while it ran a job"."""
        text = f"{self.how} {self.when}".rstrip()
        return f"{text} ({self.note.rstrip('.')})" if self.note else text

    def detail(self) -> dict[str, Any]:
        """The fault's evidence: `end`, and `exit_code` or `signal` where the process was reaped."""
        detail: dict[str, Any] = {"end": str(self.why)}
        if self.code is not None:
            detail["exit_code"] = self.code
        if self.signal is not None:
            detail["signal"] = self.signal
        return detail


def judge(how: Exit | None, ours: End | None, *, oom: bool, when: str = "") -> End:
    """Tell the end from what is known.

    Args:
        how: of the process; None while it still runs.
        ours: the end that we had decided on before it; None when it went by itself.
        oom: the kernel is known to have killed for want of memory meanwhile.
        when: what it was doing, unless `ours` says.
    """
    if how is not None and how.unkillable:
        note = f"{ours.how}; {ours.note}".rstrip("; ") if ours else ""
        return End(why=Why.UNKILLABLE, when=ours.when if ours else when, note=note)
    code, number = (how.code, how.signal) if how is not None else (None, None)
    if ours is not None:
        return msgspec.structs.replace(ours, code=code, signal=number)
    if how is None:
        return End(why=Why.CLOSED_OUTPUT, when=when)
    if number is None:
        return End(why=Why.EXITED, code=code, when=when)
    # The kernel kills with SIGKILL, and so does a warden for its whole family.
    killed = oom and number == getattr(signal, "SIGKILL", 9)
    return End(why=Why.OOM_KILLED if killed else Why.SIGNALLED, signal=number, when=when)
