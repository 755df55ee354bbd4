"""The engine session: which message is legal when, for both ends, as two tables.

Theory of operation. An instance lives through INSTANCE states; each run through RUN states. Both tables are
keyed by (state, tag) and hold the next state; whatever is not in a table is illegal. The same tables judge
what we send and what the peer sends: a wrong message of ours raises `LocalProtocolError`, of theirs
`RemoteProtocolError`; either way nothing has changed. `valid`, `progress`, `chunk`, `started`, `result` and
`fault` for a run that has already ended are the peer's error, except that `cancel` may always cross the end of
its run on the wire, so a cancel for an ended run is legal and means nothing.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import Any

from protocol.engine_wire import FIRST_RUN, LAST_RUN, NO_RUN, Chunk, Down, RunNumber, Up


class Role(enum.Enum):
    """Which end this session object is."""

    HOST = "host"
    ENGINE = "engine"


class Instance(enum.Enum):
    """States of an instance as the wire shows it."""

    STARTING = "starting"
    GREETED = "greeted"
    LOADING = "loading"
    READY = "ready"
    FAILED = "failed"
    CLOSING = "closing"


class RunState(enum.Enum):
    """States of one run."""

    VALIDATING = "validating"
    ASKED = "asked"
    RUNNING = "running"
    CANCELLING = "cancelling"
    ENDED = "ended"


_ANY_TIME = ("log", "stats", "pong", "ping")

INSTANCE_TABLE: Mapping[tuple[Instance, str], Instance] = {
    (Instance.STARTING, "hello"): Instance.GREETED,
    (Instance.STARTING, "shutdown"): Instance.CLOSING,
    (Instance.GREETED, "load"): Instance.LOADING,
    (Instance.LOADING, "progress"): Instance.LOADING,
    (Instance.LOADING, "ready"): Instance.READY,
    (Instance.LOADING, "fault"): Instance.FAILED,
    **{(state, "shutdown"): Instance.CLOSING for state in Instance if state is not Instance.STARTING},
    (Instance.CLOSING, "progress"): Instance.CLOSING,
    (Instance.CLOSING, "ready"): Instance.CLOSING,
    (Instance.CLOSING, "fault"): Instance.CLOSING,
    (Instance.CLOSING, "hello"): Instance.CLOSING,
    **{(state, tag): state for state in Instance if state is not Instance.STARTING for tag in _ANY_TIME},
    (Instance.STARTING, "ping"): Instance.STARTING,
    (Instance.STARTING, "log"): Instance.STARTING,
    (Instance.STARTING, "pong"): Instance.STARTING,
}

# None as state: the run number was never used.
RUN_TABLE: Mapping[tuple[RunState | None, str], RunState] = {
    (None, "validate"): RunState.VALIDATING,
    (RunState.VALIDATING, "valid"): RunState.ENDED,
    (RunState.VALIDATING, "fault"): RunState.ENDED,
    (None, "run"): RunState.ASKED,
    (RunState.ASKED, "started"): RunState.RUNNING,
    (RunState.ASKED, "progress"): RunState.ASKED,
    (RunState.ASKED, "fault"): RunState.ENDED,
    (RunState.ASKED, "cancel"): RunState.CANCELLING,
    (RunState.RUNNING, "progress"): RunState.RUNNING,
    (RunState.RUNNING, "chunk"): RunState.RUNNING,
    (RunState.RUNNING, "result"): RunState.ENDED,
    (RunState.RUNNING, "fault"): RunState.ENDED,
    (RunState.RUNNING, "cancel"): RunState.CANCELLING,
    (RunState.CANCELLING, "started"): RunState.CANCELLING,
    (RunState.CANCELLING, "progress"): RunState.CANCELLING,
    (RunState.CANCELLING, "chunk"): RunState.CANCELLING,
    (RunState.CANCELLING, "result"): RunState.ENDED,
    (RunState.CANCELLING, "fault"): RunState.ENDED,
    (RunState.CANCELLING, "cancel"): RunState.CANCELLING,
    (RunState.VALIDATING, "cancel"): RunState.VALIDATING,
    (RunState.ENDED, "cancel"): RunState.ENDED,
}

# Runs are judged while the instance is READY, and may still end while it is CLOSING.
_RUN_OPENERS = ("run", "validate")


class ProtocolError(Exception):
    """A message that is illegal in this state."""


class LocalProtocolError(ProtocolError):
    """Ours: a bug in this process. Nothing was sent."""


class RemoteProtocolError(ProtocolError):
    """Theirs: the peer broke the protocol."""


class EngineSession:
    """Judges every message of one instance's life, at either end.

    Call `sending` before a message of ours is written and `received` for each of the peer's. Both raise and
    leave the session unchanged when the message is illegal.
    """

    def __init__(self, role: Role) -> None:
        self.role = role
        self.state = Instance.STARTING
        self._runs: dict[RunNumber, RunState] = {}
        self._next_seq: dict[RunNumber, int] = {}
        self._highest = NO_RUN

    @property
    def open_runs(self) -> list[RunNumber]:
        """Runs that have not ended, in the order they were opened."""
        return list(self._runs)

    def run_state(self, run: RunNumber) -> RunState | None:
        """State of a run; None when its number was never used."""
        if run in self._runs:
            return self._runs[run]
        return RunState.ENDED if FIRST_RUN <= run <= self._highest else None

    def sending(self, message: Down | Up) -> None:
        """Judge a message of ours. Raises LocalProtocolError."""
        expected = Down if self.role is Role.HOST else Up
        if not isinstance(message, expected):
            raise LocalProtocolError(f"the {self.role.value} does not send {_tag(message)}")
        self._step(message, LocalProtocolError)

    def received(self, message: Down | Up) -> None:
        """Judge a message of the peer's. Raises RemoteProtocolError."""
        expected = Up if self.role is Role.HOST else Down
        if not isinstance(message, expected):
            raise RemoteProtocolError(f"the {self.role.value} does not receive {_tag(message)}")
        self._step(message, RemoteProtocolError)

    def _step(self, message: Down | Up, error: type[ProtocolError]) -> None:
        tag = _tag(message)
        run: Any = getattr(message, "run", NO_RUN)
        if run == NO_RUN:
            if tag in _RUN_TAGS:
                raise error(f"{tag} needs a run number")
            self._step_instance(tag, error)
        else:
            self._step_run(tag, run, message, error)

    def _step_instance(self, tag: str, error: type[ProtocolError]) -> None:
        following = INSTANCE_TABLE.get((self.state, tag))
        if following is None:
            raise error(f"{tag} is illegal while {self.state.value}")
        self.state = following

    def _step_run(self, tag: str, run: RunNumber, message: Down | Up, error: type[ProtocolError]) -> None:
        ending = self.state is Instance.CLOSING and tag not in _RUN_OPENERS
        if self.state is not Instance.READY and not ending:
            raise error(f"{tag} is illegal while {self.state.value}")
        if not FIRST_RUN <= run <= LAST_RUN:
            raise error(f"run number {run} is out of range")
        before = self.run_state(run)
        following = RUN_TABLE.get((before, tag))
        if following is None:
            raise error(f"{tag} is illegal for run {run}, which is {before.value if before else 'unknown'}")
        if tag in _RUN_OPENERS and run <= self._highest:
            raise error(f"run number {run} was used before")
        if isinstance(message, Chunk) and message.seq != self._next_seq.get(run, 0):
            raise error(f"chunk {message.seq} of run {run} comes where {self._next_seq.get(run, 0)} is due")
        self._commit(tag, run, following, message)

    def _commit(self, tag: str, run: RunNumber, following: RunState, message: Down | Up) -> None:
        if tag in _RUN_OPENERS:
            self._highest = run
        if isinstance(message, Chunk):
            self._next_seq[run] = message.seq + 1
        if following is RunState.ENDED:
            self._runs.pop(run, None)
            self._next_seq.pop(run, None)
        else:
            self._runs[run] = following


_RUN_TAGS = frozenset({"validate", "run", "cancel", "valid", "started", "chunk", "result"})


def _tag(message: Down | Up) -> str:
    tag = type(message).__struct_config__.tag
    assert isinstance(tag, str)
    return tag


def diagram() -> str:
    """Both tables as Mermaid state diagrams, generated so that documents cannot drift."""
    lines = ["stateDiagram-v2"]
    for (state, tag), following in INSTANCE_TABLE.items():
        if tag not in _ANY_TIME:
            lines.append(f"    {state.value} --> {following.value}: {tag}")
    lines += ["", "stateDiagram-v2"]
    for (before, tag), after in RUN_TABLE.items():
        lines.append(f"    {before.value if before else '[*]'} --> {after.value}: {tag}")
    return "\n".join(lines) + "\n"
