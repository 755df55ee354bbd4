"""The engine session: an illegal step raises and changes nothing; what is legal to send is legal to receive."""

from __future__ import annotations

import collections
import copy

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from protocol import engine_wire as wire
from protocol.engine_session import (
    INSTANCE_TABLE,
    RUN_TABLE,
    EngineSession,
    Instance,
    LocalProtocolError,
    ProtocolError,
    RemoteProtocolError,
    Role,
    RunState,
    diagram,
)
from protocol.faults import Fault

RAW = wire.pack({})
FAULT = Fault("engine_failed", "as asked")
_RUNS = st.integers(0, 6)
DOWN = st.one_of(
    st.just(wire.Load(model=wire.Model(name="m"), scratch="/")),
    st.builds(lambda run: wire.Validate(run=run, kind="llm", params=RAW), _RUNS),
    st.builds(lambda run: wire.Run(run=run, kind="llm", params=RAW), _RUNS),
    st.builds(lambda run: wire.Cancel(run=run), _RUNS),
    st.just(wire.Shutdown()),
    st.just(wire.Ping()),
)
UP = st.one_of(
    st.just(wire.Hello(engine="e", kinds=(), low=1, high=1, pid=1)),
    st.just(wire.Ready(device="cpu")),
    st.builds(lambda run: wire.Valid(run=run), _RUNS),
    st.builds(lambda run: wire.Started(run=run), _RUNS),
    st.builds(lambda run: wire.Progress(run=run, n=1), _RUNS),
    st.builds(lambda run, seq: wire.Chunk(run=run, seq=seq, data=RAW), _RUNS, st.integers(0, 3)),
    st.builds(lambda run: wire.Result(run=run, body=RAW), _RUNS),
    st.builds(lambda run: wire.RunFault(run=run, fault=FAULT), _RUNS),
    st.just(wire.Pong()),
    st.just(wire.Log(level="info", message="m")),
    st.just(wire.Stats()),
)


def _state(session):
    return copy.deepcopy({name: value for name, value in vars(session).items() if name != "role"})


def _try(step, message):
    try:
        step(message)
    except ProtocolError:
        return False
    return True


@given(st.lists(st.one_of(DOWN, UP), max_size=40), st.sampled_from(Role))
def test_an_illegal_step_raises_and_changes_nothing(messages, role):
    session = EngineSession(role)
    for message in messages:
        ours = isinstance(message, wire.Down) == (role is Role.HOST)
        before = _state(session)
        right, wrong = (session.sending, session.received) if ours else (session.received, session.sending)
        assert not _try(wrong, message)
        assert _state(session) == before
        if not _try(right, message):
            assert _state(session) == before


@given(st.lists(st.one_of(DOWN, UP), max_size=60))
def test_both_ends_agree_when_nothing_crosses(messages):
    host, engine = EngineSession(Role.HOST), EngineSession(Role.ENGINE)
    for message in messages:
        sender, receiver = (host, engine) if isinstance(message, wire.Down) else (engine, host)
        assert _try(sender.sending, message) == _try(receiver.received, message)
        assert _state(host) == _state(engine)


class Crossing(RuleBasedStateMachine):
    """Two ends with messages in flight both ways: nothing that one end may send is illegal at the other."""

    def __init__(self) -> None:
        super().__init__()
        self.host, self.engine = EngineSession(Role.HOST), EngineSession(Role.ENGINE)
        self.down: collections.deque[wire.Down] = collections.deque()
        self.up: collections.deque[wire.Up] = collections.deque()

    @rule(message=DOWN)
    def host_sends(self, message):
        if _try(self.host.sending, message):
            self.down.append(message)

    @rule(run=st.integers(1, 3))
    def host_runs_the_next(self, run):
        self.host_sends(wire.Run(run=self.host._highest + run, kind="llm", params=RAW))

    @rule(message=UP)
    def engine_sends(self, message):
        if _try(self.engine.sending, message):
            self.up.append(message)

    @precondition(lambda self: self.engine.open_runs)
    @rule(data=st.data())
    def engine_works(self, data):
        run = data.draw(st.sampled_from(self.engine.open_runs))
        due = self.engine._next_seq.get(run, 0)
        choices = [
            wire.Started(run=run),
            wire.Chunk(run=run, seq=due, data=RAW),
            wire.Result(run=run, body=RAW),
            wire.RunFault(run=run, fault=FAULT),
        ]
        self.engine_sends(data.draw(st.sampled_from(choices)))

    @precondition(lambda self: self.down)
    @rule()
    def engine_receives(self):
        self.engine.received(self.down.popleft())

    @precondition(lambda self: self.up)
    @rule()
    def host_receives(self):
        self.host.received(self.up.popleft())

    @invariant()
    def when_nothing_is_in_flight_both_ends_agree(self):
        if not self.down and not self.up:
            assert _state(self.host) == _state(self.engine)

    @invariant()
    def ended_runs_are_forgotten(self):
        for session in (self.host, self.engine):
            assert set(session._next_seq) <= set(session.open_runs)
            assert all(session.run_state(run) is not RunState.ENDED for run in session.open_runs)


TestCrossing = Crossing.TestCase
TestCrossing.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)


# ---- promises of the tables, one by one


def _ready(role=Role.ENGINE):
    session = EngineSession(role)
    host, engine = (session.sending, session.received) if role is Role.HOST else (session.received, session.sending)
    engine(wire.Hello(engine="e", kinds=(), low=1, high=1, pid=1))
    host(wire.Load(model=wire.Model(name="m"), scratch="/"))
    engine(wire.Ready(device="cpu"))
    return session, host, engine


def test_a_run_from_beginning_to_end():
    session, host, engine = _ready()
    host(wire.Run(run=1, kind="llm", params=RAW))
    assert session.run_state(1) is RunState.ASKED
    engine(wire.Started(run=1))
    engine(wire.Chunk(run=1, seq=0, data=RAW))
    engine(wire.Chunk(run=1, seq=1, data=RAW))
    engine(wire.Result(run=1, body=RAW))
    assert session.run_state(1) is RunState.ENDED
    host(wire.Cancel(run=1))
    assert session.open_runs == []


@pytest.mark.parametrize(
    "message",
    [
        wire.Result(run=1, body=RAW),  # before started
        wire.Chunk(run=1, seq=0, data=RAW),
        wire.Valid(run=1),
        wire.Started(run=2),  # never asked
        wire.RunFault(run=0, fault=FAULT),  # the load is over
        wire.Ready(device="cpu"),
        wire.Progress(run=0, n=1),
        wire.Result(run=0, body=RAW),
        wire.Started(run=2**32),
    ],
)
def test_what_an_engine_may_not_say(message):
    _, host, engine = _ready()
    host(wire.Run(run=1, kind="llm", params=RAW))
    with pytest.raises(LocalProtocolError):
        engine(message)


def test_whose_mistake_it_is():
    with pytest.raises(RemoteProtocolError):
        EngineSession(Role.HOST).received(wire.Ready(device="cpu"))
    with pytest.raises(LocalProtocolError):
        EngineSession(Role.HOST).sending(wire.Load(model=wire.Model(name="m"), scratch="/"))
    with pytest.raises(LocalProtocolError, match="does not send"):
        EngineSession(Role.HOST).sending(wire.Pong())  # type: ignore[arg-type]


def test_numbers_are_used_once_and_in_order():
    _, host, _ = _ready()
    host(wire.Run(run=5, kind="llm", params=RAW))
    for run in (5, 4, 1):
        with pytest.raises(RemoteProtocolError):
            host(wire.Run(run=run, kind="llm", params=RAW))
    with pytest.raises(RemoteProtocolError):
        host(wire.Run(run=wire.LAST_RUN + 1, kind="llm", params=RAW))
    host(wire.Run(run=wire.LAST_RUN, kind="llm", params=RAW))


def test_chunks_come_without_gaps():
    _, host, engine = _ready()
    host(wire.Run(run=1, kind="llm", params=RAW))
    engine(wire.Started(run=1))
    for seq in (1, -1):
        with pytest.raises(LocalProtocolError, match="where 0 is due"):
            engine(wire.Chunk(run=1, seq=seq, data=RAW))


def test_after_shutdown_runs_may_end_but_none_begins():
    session, host, engine = _ready()
    host(wire.Run(run=1, kind="llm", params=RAW))
    host(wire.Shutdown())
    assert session.state is Instance.CLOSING
    engine(wire.Started(run=1))
    engine(wire.RunFault(run=1, fault=FAULT))
    with pytest.raises(RemoteProtocolError):
        host(wire.Run(run=2, kind="llm", params=RAW))


def test_every_state_of_the_tables_can_be_reached():
    assert {state for _, state in INSTANCE_TABLE.items()} == set(Instance) - {Instance.STARTING} | {Instance.STARTING}
    assert set(RUN_TABLE.values()) == set(RunState)


def test_the_diagram_tells_every_row():
    text = diagram()
    assert text.count("-->") >= len(RUN_TABLE)
    assert "[*] --> asked: run" in text
