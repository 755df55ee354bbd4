"""Dying and hanging; more of both in test_misbehave.py."""

from __future__ import annotations

import pytest

from protocol.engine_wire import Cancel, Model, Ping, Pong

MODULE = "engines.synthetic.misbehave"


@pytest.fixture
def child(spawn):
    child = spawn(MODULE)
    child.load(Model(name="synthetic-bad", device="cpu"))
    yield child
    child.process.kill()


def test_a_deadlock_of_two_threads_leaves_the_pings_alive(child):
    child.begin("llm", {"prompt": "deadlock"})
    child.receive()  # started
    child.send(Cancel(run=1))
    child.send(Ping(n=5))
    assert child.receive() == Pong(n=5)
    with pytest.raises(TimeoutError):
        child.receive(0.3)
