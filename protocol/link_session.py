"""The link session: which message is legal when, for both ends, as two tables.

Theory of operation. The session table covers the connection: nothing but `hello` before `welcome`. The attempt
table covers each (job, attempt) from offer to acknowledgement; an attempt that was held through a reconnect
enters it as HELD, because its offer belongs to an earlier session. An illegal message raises and changes nothing.
What crosses on the wire is legal: a `cancel` may arrive after the attempt ended, chunks may follow a cancel, and a
worker may still speak of a held attempt while the coordinator's `ack` that fences it is on its way.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping

from protocol.link_wire import DOWN, TAGS, UP, Body, Chunk, Hello


class Role(enum.Enum):
    """Which end this session object is."""

    WORKER = "worker"
    COORDINATOR = "coordinator"


class Session(enum.Enum):
    """States of the connection."""

    CONNECTED = "connected"
    GREETED = "greeted"
    OPEN = "open"
    DRAINING = "draining"
    CLOSED = "closed"


class Attempt(enum.Enum):
    """States of one attempt within a session."""

    OFFERED = "offered"
    ACCEPTED = "accepted"
    STARTED = "started"
    HELD = "held"
    ENDED = "ended"  # complete or fail sent, ack awaited
    DONE = "done"  # declined or acknowledged


_OPEN_TAGS = (
    *("announce", "heartbeat", "heartbeat_ack", "log_batch"),
    *("pause", "resume", "shutdown", "drain", "order", "order_done"),
)

SESSION_TABLE: Mapping[tuple[Session, str], Session] = {
    (Session.CONNECTED, "hello"): Session.GREETED,
    (Session.GREETED, "welcome"): Session.OPEN,
    (Session.OPEN, "draining"): Session.DRAINING,
    (Session.DRAINING, "draining"): Session.DRAINING,
    **{(state, tag): state for state in (Session.OPEN, Session.DRAINING) for tag in _OPEN_TAGS},
    **{(state, "error"): Session.CLOSED for state in Session if state is not Session.CLOSED},
}

ATTEMPT_TABLE: Mapping[tuple[Attempt | None, str], Attempt] = {
    (None, "offer"): Attempt.OFFERED,
    (Attempt.DONE, "offer"): Attempt.OFFERED,  # a declined attempt may be offered again
    (Attempt.OFFERED, "accept"): Attempt.ACCEPTED,
    (Attempt.OFFERED, "decline"): Attempt.DONE,
    (Attempt.OFFERED, "cancel"): Attempt.OFFERED,
    (Attempt.ACCEPTED, "started"): Attempt.STARTED,
    (Attempt.ACCEPTED, "progress"): Attempt.ACCEPTED,
    (Attempt.ACCEPTED, "cancel"): Attempt.ACCEPTED,
    (Attempt.ACCEPTED, "fail"): Attempt.ENDED,
    (Attempt.ACCEPTED, "complete"): Attempt.ENDED,
    (Attempt.STARTED, "chunk"): Attempt.STARTED,
    (Attempt.STARTED, "chunk_ack"): Attempt.STARTED,
    (Attempt.STARTED, "progress"): Attempt.STARTED,
    (Attempt.STARTED, "cancel"): Attempt.STARTED,
    (Attempt.STARTED, "complete"): Attempt.ENDED,
    (Attempt.STARTED, "fail"): Attempt.ENDED,
    (Attempt.HELD, "started"): Attempt.HELD,
    (Attempt.HELD, "chunk"): Attempt.HELD,
    (Attempt.HELD, "chunk_ack"): Attempt.HELD,
    (Attempt.HELD, "progress"): Attempt.HELD,
    (Attempt.HELD, "cancel"): Attempt.HELD,
    (Attempt.HELD, "ack"): Attempt.DONE,  # fenced: the coordinator gave it to somebody else
    (Attempt.HELD, "complete"): Attempt.ENDED,
    (Attempt.HELD, "fail"): Attempt.ENDED,
    (Attempt.ENDED, "cancel"): Attempt.ENDED,
    (Attempt.ENDED, "chunk_ack"): Attempt.ENDED,
    (Attempt.ENDED, "ack"): Attempt.DONE,
    (Attempt.DONE, "cancel"): Attempt.DONE,
}
_ATTEMPT_TAGS = frozenset(tag for _, tag in ATTEMPT_TABLE)


class LinkProtocolError(Exception):
    """A message that is illegal in this state; `ours` says whose mistake it is."""

    def __init__(self, text: str, *, ours: bool) -> None:
        super().__init__(text)
        self.ours = ours


class LinkSession:
    """Judges every message of one connected span, at either end.

    `resumed` in hello marks attempts held from before. Attempts that are DONE are forgotten, so that a session
    may last for months; a `cancel` for a forgotten attempt is legal.
    """

    def __init__(self, role: Role) -> None:
        self.role = role
        self.state = Session.CONNECTED
        self._attempts: dict[tuple[str, int], Attempt] = {}
        self._next_seq: dict[tuple[str, int], int] = {}
        self._fenced: set[tuple[str, int]] = set()

    def attempt(self, job: str, attempt: int) -> Attempt | None:
        """State of an attempt; None when it is unknown or done."""
        return self._attempts.get((job, attempt))

    @property
    def open_attempts(self) -> list[tuple[str, int]]:
        """Attempts that are neither declined nor acknowledged."""
        return list(self._attempts)

    def sending(self, body: Body, job: str = "", attempt: int = 0) -> None:
        """Judge a message of ours, before it is sent."""
        self._judge(body, job, attempt, UP if self.role is Role.WORKER else DOWN, ours=True)

    def received(self, body: Body, job: str = "", attempt: int = 0) -> None:
        """Judge a message of the peer's, before it is acted upon."""
        self._judge(body, job, attempt, DOWN if self.role is Role.WORKER else UP, ours=False)

    def _judge(self, body: Body, job: str, attempt: int, table: dict[str, type[Body]], *, ours: bool) -> None:
        tag = TAGS[type(body)]
        if tag not in table:
            raise LinkProtocolError(f"{tag} does not go in this direction", ours=ours)
        if tag in _ATTEMPT_TAGS:
            self._step_attempt(tag, body, (job, attempt), ours=ours)
            return
        following = SESSION_TABLE.get((self.state, tag))
        if following is None:
            raise LinkProtocolError(f"{tag} is illegal while {self.state.value}", ours=ours)
        self.state = following
        if isinstance(body, Hello):
            self._attempts.update({(held.job, held.attempt): Attempt.HELD for held in body.held})

    def _step_attempt(self, tag: str, body: Body, key: tuple[str, int], *, ours: bool) -> None:
        if self.state not in (Session.OPEN, Session.DRAINING):
            raise LinkProtocolError(f"{tag} is illegal while {self.state.value}", ours=ours)
        if not key[0] or key[1] < 1:
            raise LinkProtocolError(f"{tag} needs a job and an attempt from 1", ours=ours)
        before = self._attempts.get(key)
        if before is None and tag in ("cancel", "chunk_ack"):
            return  # crossed the end of the attempt on the wire
        if before is None and key in self._fenced and self.role is Role.COORDINATOR and not ours:
            return  # crossed the fence: the worker speaks of an attempt that it does not yet know to be lost
        following = ATTEMPT_TABLE.get((before, tag))
        if key in self._fenced and tag == "offer":
            raise LinkProtocolError(f"{key[0]}#{key[1]} was fenced: its number cannot be offered again", ours=ours)
        if following is None:
            state = before.value if before else "unknown"
            raise LinkProtocolError(f"{tag} is illegal for {key[0]}#{key[1]}, which is {state}", ours=ours)
        if isinstance(body, Chunk):
            due = self._next_seq.get(key)
            if before is Attempt.STARTED and body.seq != (due or 0):
                raise LinkProtocolError(f"chunk {body.seq} comes where {due or 0} is due", ours=ours)
            self._next_seq[key] = body.seq + 1
        if before is Attempt.HELD and following is Attempt.DONE:
            self._fenced.add(key)
        if following is Attempt.DONE:
            self._attempts.pop(key, None)
            self._next_seq.pop(key, None)
        else:
            self._attempts[key] = following


def diagram() -> str:
    """Both tables as Mermaid state diagrams, generated so that documents cannot drift."""
    lines = ["stateDiagram-v2"]
    lines += [
        f"    {state.value} --> {following.value}: {tag}"
        for (state, tag), following in SESSION_TABLE.items()
        if tag not in _OPEN_TAGS
    ]
    lines += ["", "stateDiagram-v2"]
    for (before, tag), after in ATTEMPT_TABLE.items():
        lines.append(f"    {before.value if before else '[*]'} --> {after.value}: {tag}")
    return "\n".join(lines) + "\n"
