"""What a coordinator wants of the other replicas, where there are any."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

from coordinator.fleet import Key
from coordinator.kept_lines import Lines
from protocol.faults import FaultError, refuse

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response

    from coordinator.records import JobRecord

AGAIN_S = 2  # what a worker is told to wait whose replica is not reached


class Reach(NamedTuple):
    """How the other replicas are reached.

    Attributes:
        known: those that live, by the database.
        connected: those of them that are told of tokens as they come.
        dropped: frames that found no place on their way, since the start of this one.
    """

    known: int
    connected: int
    dropped: int


class Upload(NamedTuple):
    """A result that is a file, sent by a studio worker that was admitted.

    Attributes:
        request: its body was not read yet.
        worker, job: ids.
        most: bytes that its body may have.
        idle_s: it is ended when nothing of it comes for so long.
    """

    request: Request
    worker: str
    job: str
    most: int
    idle_s: float


def not_reached() -> FaultError:
    """The replica that could take an upload is not reached now: 503, after which a worker sends it again."""
    message = "The replica that this worker is connected to is not reached now; send the file again."
    return refuse("overloaded", message, retry_after_s=AGAIN_S)


class Elsewhere(Protocol):
    """The other replicas. No method that tells waits, and none is sure: the rows tell them later, too."""

    def stop(self, gateway: str, key: Key, reason: str) -> None:
        """A replica holds an attempt that its row went on without."""

    def joined(self, worker: str) -> None:
        """A worker has connected here."""

    def reach(self) -> Reach | None:
        """How they are reached; None where there can be none."""

    async def lines(self, job: str, worker: str, limit: int) -> tuple[list[Lines], list[str]]:
        """What workers' logs said of a job there, and the names of those that did not answer in time."""

    async def upload(self, record: JobRecord, upload: Upload) -> Response | None:
        """Have an upload for this job judged where the worker's session is; None when that is not known to be there.

        Raises:
            FaultError: overloaded: by its row the job is the worker's there, and that replica is not reached now;
                payload_too_large.
            ClientDisconnect: the worker left while sending.
        """


class Nobody:
    """There are no other replicas."""

    def stop(self, gateway: str, key: Key, reason: str) -> None:
        """Nothing to do."""

    def joined(self, worker: str) -> None:
        """Nothing to do."""

    def reach(self) -> Reach | None:
        """There can be none."""
        return None

    async def lines(self, job: str, worker: str, limit: int) -> tuple[list[Lines], list[str]]:
        """Nobody to ask."""
        return [], []

    async def upload(self, record: JobRecord, upload: Upload) -> Response | None:
        """There is no other session."""
        return None
