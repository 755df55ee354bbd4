"""The link session: an illegal step raises and changes nothing; what is legal to send is legal to receive."""

from __future__ import annotations

import collections
import copy

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from protocol import link_wire as wire
from protocol.engine_wire import pack
from protocol.faults import Fault
from protocol.link_session import (
    ATTEMPT_TABLE,
    SESSION_TABLE,
    Attempt,
    LinkProtocolError,
    LinkSession,
    Role,
    Session,
    diagram,
)

RAW = pack({})
FAULT = Fault("worker_failed", "as asked")
KEYS = [("a", 1), ("a", 2), ("b", 1)]
_KEY = st.sampled_from(KEYS)
_UP_ATTEMPT = st.one_of(
    st.just(wire.Accept()),
    st.just(wire.Decline(code="busy", reason="r")),
    st.just(wire.Started()),
    st.builds(lambda seq: wire.Chunk(seq=seq, data=RAW), st.integers(0, 2)),
    st.just(wire.Progress(n=1)),
    st.just(wire.Complete()),
    st.just(wire.Fail(fault=FAULT)),
)
_UP_SESSION = st.one_of(
    st.just(wire.Announce(capabilities=wire.Capabilities())),
    st.just(wire.Heartbeat(n=1)),
    st.just(wire.LogBatch(lines=())),
    st.just(wire.Draining()),
)
_HELLO = wire.Hello(worker="w", low=1, high=1)
_HELD = wire.Hello(worker="w", low=1, high=1, held=(wire.Held(job="a", attempt=1), wire.Held(job="b", attempt=1)))
_DOWN_ATTEMPT = st.one_of(
    st.just(wire.Offer(kind="llm", model="m", params=RAW)),
    st.just(wire.Ack()),
    st.just(wire.ChunkAck(seq=0)),
    st.just(wire.Cancel()),
)
_DOWN_SESSION = st.one_of(
    st.just(wire.HeartbeatAck(n=1)),
    st.just(wire.Drain()),
    st.just(wire.Pause()),
    st.just(wire.Resume()),
    st.just(wire.ShutdownWorker()),
)
_ENDING = st.one_of(st.just(wire.Error(code="internal_error", message="m")))
_OPENING = st.sampled_from([_HELLO, _HELD, wire.Welcome(session="s", revision=1)])
ANY = st.one_of(_UP_ATTEMPT, _UP_SESSION, _DOWN_ATTEMPT, _DOWN_SESSION, _ENDING, _OPENING)


def _state(session):
    return copy.deepcopy({name: value for name, value in vars(session).items() if name != "role"})


def _try(step, body, key):
    try:
        step(body, *key)
    except LinkProtocolError:
        return False
    return True


@given(st.lists(st.tuples(ANY, _KEY), max_size=40), st.sampled_from(Role))
def test_an_illegal_step_raises_and_changes_nothing(messages, role):
    session = LinkSession(role)
    for body, key in messages:
        ours = (wire.TAGS[type(body)] in wire.UP) == (role is Role.WORKER)
        before = _state(session)
        right, wrong = (session.sending, session.received) if ours else (session.received, session.sending)
        assert not _try(wrong, body, key)
        assert _state(session) == before
        if not _try(right, body, key):
            assert _state(session) == before


class Crossing(RuleBasedStateMachine):
    """Two ends with messages in flight both ways: nothing that one end may send is illegal at the other."""

    def __init__(self) -> None:
        super().__init__()
        self.worker, self.coordinator = LinkSession(Role.WORKER), LinkSession(Role.COORDINATOR)
        self.down: collections.deque = collections.deque()
        self.up: collections.deque = collections.deque()

    @initialize(hello=st.sampled_from([_HELLO, _HELD]))
    def opens(self, hello):
        self.worker.sending(hello)
        self.coordinator.received(hello)
        self.coordinator.sending(wire.Welcome(session="s", revision=1))
        self.worker.received(wire.Welcome(session="s", revision=1))

    @rule(body=st.one_of(_UP_ATTEMPT, _UP_SESSION), key=_KEY)
    def worker_sends(self, body, key):
        if _try(self.worker.sending, body, key):
            self.up.append((body, key))

    @precondition(lambda self: self.worker.open_attempts)
    @rule(data=st.data(), body=_UP_ATTEMPT)
    def worker_works(self, data, body):
        self.worker_sends(body, data.draw(st.sampled_from(self.worker.open_attempts)))

    @rule(body=st.one_of(_DOWN_ATTEMPT, _DOWN_SESSION), key=_KEY)
    def coordinator_sends(self, body, key):
        if _try(self.coordinator.sending, body, key):
            self.down.append((body, key))

    @precondition(lambda self: self.down)
    @rule()
    def worker_receives(self):
        body, key = self.down.popleft()
        self.worker.received(body, *key)

    @precondition(lambda self: self.up)
    @rule()
    def coordinator_receives(self):
        body, key = self.up.popleft()
        self.coordinator.received(body, *key)

    @invariant()
    def when_nothing_is_in_flight_both_ends_agree(self):
        if not self.down and not self.up:
            assert self.worker.state is self.coordinator.state
            assert sorted(self.worker.open_attempts) == sorted(self.coordinator.open_attempts)
            for key in self.worker.open_attempts:
                assert self.worker.attempt(*key) is self.coordinator.attempt(*key)

    @invariant()
    def done_attempts_are_forgotten(self):
        for session in (self.worker, self.coordinator):
            assert set(session._next_seq) <= set(session.open_attempts)
            assert all(session.attempt(*key) is not Attempt.DONE for key in session.open_attempts)


TestCrossing = Crossing.TestCase
TestCrossing.settings = settings(max_examples=150, stateful_step_count=50, deadline=None)


# ---- promises of the tables, one by one


def _open(role=Role.COORDINATOR, hello=_HELLO):
    session = LinkSession(role)
    up, down = (session.sending, session.received) if role is Role.WORKER else (session.received, session.sending)
    up(hello)
    down(wire.Welcome(session="s", revision=1))
    return session, up, down


def test_an_attempt_from_offer_to_acknowledgement():
    session, up, down = _open()
    down(wire.Offer(kind="llm", model="m", params=RAW), "a", 1)
    for body in (wire.Accept(), wire.Started(), wire.Chunk(seq=0, data=RAW), wire.Complete()):
        up(body, "a", 1)
    assert session.attempt("a", 1) is Attempt.ENDED
    down(wire.Ack(), "a", 1)
    assert session.open_attempts == []
    down(wire.Cancel(), "a", 1)


@pytest.mark.parametrize("body", [wire.Heartbeat(n=1), wire.Draining(), wire.Accept()])
def test_nothing_but_hello_before_welcome(body):
    session = LinkSession(Role.COORDINATOR)
    with pytest.raises(LinkProtocolError) as caught:
        session.received(body, "a", 1)
    assert caught.value.ours is False
    session.received(_HELLO)
    with pytest.raises(LinkProtocolError):
        session.received(body, "a", 1)


def test_the_late_words_of_a_fenced_attempt_are_legal_for_the_coordinator_alone():
    session, up, down = _open(hello=_HELD)
    down(wire.Ack(verdict="fenced"), "a", 1)
    for body in (wire.Chunk(seq=7, data=RAW), wire.Progress(n=1), wire.Complete()):
        up(body, "a", 1)
    assert session.attempt("a", 1) is None
    with pytest.raises(LinkProtocolError, match="was fenced"):
        down(wire.Offer(kind="llm", model="m", params=RAW), "a", 1)
    _, up, down = _open(Role.WORKER, _HELD)
    down(wire.Ack(verdict="fenced"), "a", 1)
    with pytest.raises(LinkProtocolError) as caught:
        up(wire.Complete(), "a", 1)
    assert caught.value.ours is True


def test_chunks_come_without_gaps_except_when_held():
    _, up, down = _open()
    down(wire.Offer(kind="llm", model="m", params=RAW), "a", 1)
    up(wire.Accept(), "a", 1)
    up(wire.Started(), "a", 1)
    with pytest.raises(LinkProtocolError, match="where 0 is due"):
        up(wire.Chunk(seq=1, data=RAW), "a", 1)
    _, up, _ = _open(hello=_HELD)
    up(wire.Chunk(seq=9, data=RAW), "a", 1)


@pytest.mark.parametrize("key", [("", 1), ("a", 0), ("a", -1)])
def test_a_message_about_an_attempt_names_it(key):
    _, _, down = _open()
    with pytest.raises(LinkProtocolError, match="needs a job"):
        down(wire.Cancel(), *key)


def test_every_state_of_the_tables_can_be_reached():
    assert set(SESSION_TABLE.values()) == set(Session) - {Session.CONNECTED}
    assert set(ATTEMPT_TABLE.values()) | {Attempt.HELD} == set(Attempt)


def test_every_message_belongs_to_one_of_the_tables():
    known = {tag for _, tag in SESSION_TABLE} | {tag for _, tag in ATTEMPT_TABLE}
    assert known == set(wire.UP) | set(wire.DOWN)


def test_the_diagram_tells_every_row():
    assert diagram().count("-->") >= len(ATTEMPT_TABLE)
