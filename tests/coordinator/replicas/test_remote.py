"""Workers of other replicas: only what may be said to them is carried."""

from __future__ import annotations

import pytest

from coordinator.fleet import Worker
from coordinator.replicas.frames import AnswerFrame, OrderFrame
from coordinator.replicas.remote import RemotePort, deliver, order_done
from protocol import link_wire as wire
from protocol.faults import FaultError


class Said:
    def __init__(self) -> None:
        self.bodies: list[wire.Body] = []

    def send(self, body: wire.Body, job: str = "", attempt: int = 0) -> None:
        self.bodies.append(body)

    def close(self, code: str, message: str) -> None:
        raise AssertionError


def test_an_order_is_said_and_its_answer_goes_back() -> None:
    said, answers = Said(), list[AnswerFrame]()
    worker = Worker("w1", said, wire.Capabilities())
    deliver(worker, OrderFrame("w1", wire.encode(wire.Order(id="n", verb="probe"))), answers.append)
    assert said.bodies == [wire.Order(id="n", verb="probe")]
    done = wire.OrderDone(id="n", ok=True, message="Well.")
    worker.orders.pop("n")(done)
    assert [order_done(one.message) for one in answers] == [done]


@pytest.mark.parametrize("message", [b"", wire.encode(wire.Ack(), "job", 1), wire.encode(wire.Welcome("s", 1))])
def test_nothing_else_is_said_to_a_worker(message: bytes) -> None:
    said = Said()
    deliver(Worker("w1", said, wire.Capabilities()), OrderFrame("w1", message), lambda _answer: None)
    assert said.bodies == []
    assert order_done(message) is None


def test_a_replica_that_is_not_reached_is_a_fault_to_try_again() -> None:
    with pytest.raises(FaultError) as refused:
        RemotePort("w1", lambda _frame: False).send(wire.Drain())
    assert refused.value.fault.code == "no_worker"
    with pytest.raises(FaultError):
        RemotePort("w1", lambda _frame: True).send(wire.Ack(), "job", 1)
