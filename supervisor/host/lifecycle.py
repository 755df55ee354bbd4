"""The life of an engine instance as its lane tells it: one table of states and events.

Theory of operation. A lane has at most one instance, and the state of both is one word. The table is keyed by (state,
event) and holds the next state; whatever is not in it is illegal, raises, and changes nothing. The lane is the only
one that steps; everybody else reads the word in `InstanceStatus`. An instance ends through `stopping`, whatever the
reason; only then, when the process is gone and its memory is back, it is decided what follows: `cold` (a new one may
start at once), `backoff` (after a pause) or `quarantined` (out of service until a probe passes).
"""

from __future__ import annotations

import enum
from collections.abc import Mapping


class State(enum.StrEnum):
    """States of a lane and its instance."""

    COLD = "cold"
    STARTING = "starting"  # files are checked, room is made, the process starts; until its hello
    LOADING = "loading"
    READY = "ready"
    BUSY = "busy"
    DRAINING = "draining"  # takes no new runs, ends when those it has are done
    STOPPING = "stopping"  # until the process is dead and its memory is back
    BACKOFF = "backoff"
    QUARANTINED = "quarantined"


class Event(enum.StrEnum):
    """What moves a lane from one state to the next."""

    DEMAND = "demand"  # somebody wants the model
    GREETED = "greeted"
    LOADED = "loaded"
    TAKE = "take"  # a run got a slot
    EMPTIED = "emptied"  # the last run left its slot
    DRAIN = "drain"
    END = "end"  # asked, broken, dead or given up: see ends.py
    GONE = "gone"
    PAUSE = "pause"
    BAR = "bar"
    RETRY = "retry"
    LIFT = "lift"
    SHUT = "shut"  # the lane itself ends, after its instance


_S, _E = State, Event

TABLE: Mapping[tuple[State, Event], State] = {
    (_S.COLD, _E.DEMAND): _S.STARTING,
    (_S.COLD, _E.BAR): _S.QUARANTINED,  # remembered from an earlier life
    (_S.STARTING, _E.GREETED): _S.LOADING,
    (_S.STARTING, _E.END): _S.STOPPING,
    (_S.LOADING, _E.LOADED): _S.READY,
    (_S.LOADING, _E.END): _S.STOPPING,
    (_S.READY, _E.TAKE): _S.BUSY,
    (_S.READY, _E.END): _S.STOPPING,
    (_S.BUSY, _E.TAKE): _S.BUSY,
    (_S.BUSY, _E.EMPTIED): _S.READY,
    (_S.BUSY, _E.DRAIN): _S.DRAINING,
    (_S.BUSY, _E.END): _S.STOPPING,
    (_S.DRAINING, _E.END): _S.STOPPING,
    (_S.STOPPING, _E.GONE): _S.COLD,
    (_S.STOPPING, _E.PAUSE): _S.BACKOFF,
    (_S.STOPPING, _E.BAR): _S.QUARANTINED,
    (_S.BACKOFF, _E.RETRY): _S.COLD,
    (_S.QUARANTINED, _E.LIFT): _S.COLD,
    **{(state, _E.SHUT): _S.COLD for state in State},
}

# States with a process, or with one about to be.
ALIVE = frozenset({_S.STARTING, _S.LOADING, _S.READY, _S.BUSY, _S.DRAINING})
LOADED = frozenset({_S.READY, _S.BUSY, _S.DRAINING})


class IllegalStep(Exception):
    """A bug of the lane's: an event that its state does not know. Nothing has changed."""


class Life:
    """The state of one lane; only the lane calls `step`."""

    def __init__(self) -> None:
        self.state = State.COLD

    def step(self, event: Event) -> State:
        """Apply an event. Raises IllegalStep."""
        following = TABLE.get((self.state, event))
        if following is None:
            raise IllegalStep(f"{event.value} is illegal while {self.state.value}")
        self.state = following
        return following


def diagram() -> str:
    """The table as a Mermaid state diagram, generated so that documents cannot drift."""
    lines = ["stateDiagram-v2", f"    [*] --> {State.COLD.value}"]
    lines += [
        f"    {state.value} --> {following.value}: {event.value}"
        for (state, event), following in TABLE.items()
        if event is not Event.SHUT
    ]
    return "\n".join(lines) + "\n"
