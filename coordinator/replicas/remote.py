"""Workers that are connected to another replica, as this one sees and orders them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from coordinator.fleet import FOREVER, Fleet, Worker, view_of
from coordinator.replicas.frames import AnswerFrame, OrderFrame, RemoteWorker
from protocol import link_wire as wire
from protocol.faults import refuse

_MAY_BE_SAID = (wire.Pause, wire.Resume, wire.Drain, wire.ShutdownWorker, wire.Order)
RETRY_HINT_S = 2


class RemotePort:
    """The way to a worker by way of its replica; `send` says so when that cannot be reached."""

    def __init__(self, worker: str, push: Callable[[OrderFrame], bool]) -> None:
        self._worker, self._push = worker, push

    def send(self, body: wire.Body, job: str = "", attempt: int = 0) -> None:
        """Have it said. Raises FaultError(no_worker) when the other replica is not reached now."""
        if not isinstance(body, _MAY_BE_SAID) or not self._push(OrderFrame(self._worker, wire.encode(body))):
            message = f"The replica that the worker {self._worker} is connected to is not reached now; try again."
            raise refuse("no_worker", message, retry_after_s=RETRY_HINT_S)

    def close(self, code: str, message: str) -> None:
        """A session is ended by the replica that has it."""
        raise refuse("unsupported", f"The worker {self._worker} is connected to another replica.")


def remote_worker(told: RemoteWorker, port: RemotePort, before: Worker | None = None) -> Worker:
    """A worker of another replica in the form that listings, orders and placing use; `before`: as it was told last."""
    worker = Worker(told.view.id, port, told.capabilities)
    worker.draining, worker.revision, worker.protocol = told.draining, told.revision, told.view.protocol
    worker.view, worker.refuses = told.view, frozenset(told.refuses)
    if before is not None:
        worker.orders = before.orders  # who waits for an answer still does
    return worker


def told_of(fleet: Fleet, now: float = FOREVER) -> list[RemoteWorker]:
    """All workers that are connected here, for the other replicas; `now` is the fleet's clock, in seconds."""
    refused = fleet.refusals.by_worker()
    return [_told(worker, now, refused.get(worker.id, ())) for worker in fleet.workers.values()]


def told_of_one(fleet: Fleet, worker: Worker, now: float) -> RemoteWorker:
    """The same of one of them."""
    return _told(worker, now, fleet.refusals.refused_by(worker.id))


def _told(worker: Worker, now: float, refuses: Sequence[str]) -> RemoteWorker:
    view = view_of(worker, now)
    return RemoteWorker(view, worker.capabilities, worker.draining, worker.revision, tuple(refuses))


def deliver(worker: Worker, frame: OrderFrame, answer: Callable[[AnswerFrame], None]) -> None:
    """Say to a worker of ours what another replica wants said; what it may not want is not said."""
    try:
        body = wire.decode_body(wire.decode_envelope(frame.message), wire.DOWN)
    except (wire.EnvelopeError, wire.BodyError):
        return
    if not isinstance(body, _MAY_BE_SAID):
        return
    if isinstance(body, wire.Order):
        worker.orders[body.id] = lambda done: answer(AnswerFrame(worker.id, wire.encode(done)))
    if isinstance(body, wire.Resume):
        worker.pardon()
    worker.port.send(body)


def order_done(message: bytes) -> wire.OrderDone | None:
    """The answer to an order; None for anything else."""
    try:
        body = wire.decode_body(wire.decode_envelope(message), wire.UP)
    except (wire.EnvelopeError, wire.BodyError):
        return None
    return body if isinstance(body, wire.OrderDone) else None
