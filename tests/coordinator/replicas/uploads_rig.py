"""What the tests of uploads share: a studio worker with its session at one replica, its uploads at another."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from urllib.parse import urlsplit

from coordinator.replicas.replicas import Replicas
from coordinator.testing import Running
from coordinator.testing_studio import Admitted, StudioSocket
from tests.coordinator.replicas.rig import PATIENCE_S
from tests.coordinator.studio_rig import House

FORM = {"content-type": "multipart/form-data; boundary=x"}


def replicas(one: Running | House) -> Replicas:
    """A replica's part that reaches the others."""
    found = (one.there if isinstance(one, House) else one).coordinator.replicas
    assert found is not None
    return found


@contextlib.contextmanager
def session(here: House, at: str, worker: Admitted | None = None) -> Iterator[tuple[Admitted, StudioSocket]]:
    """A worker with its session at one replica, whose uploads come to `here`."""
    worker = worker or here.worker()
    worker.url = at
    with worker.session() as it:
        worker.url = here.url
        yield worker, it


def content(house: House, job: str) -> list[bytes]:
    """The job's files, as a client gets them."""
    found = house.job(job)
    assert found["state"] == "succeeded", found
    return [house.client.get(file["url"]).raise_for_status().content for file in found["files"]]


def form(data: bytes, end: bytes = b"\r\n--x--\r\n") -> bytes:
    """The body of an upload."""
    return b'--x\r\ncontent-disposition: form-data; name="image"\r\n\r\n' + data + end


class Slow(contextlib.AbstractContextManager["Slow"]):
    """An upload whose bytes a test sends as it likes."""

    def __init__(self, worker: Admitted, job: str, data: bytes, length: int | None = None) -> None:
        self.body = form(data)
        address = urlsplit(worker.url)
        self.head = (
            f"POST {worker.base}/workers/{worker.id}/jobs/{job}/complete HTTP/1.1\r\nhost: x\r\n"
            f"authorization: Bearer {worker.token}\r\ncontent-type: multipart/form-data; boundary=x\r\n"
            f"content-length: {len(self.body) if length is None else length}\r\n\r\n"
        ).encode()
        self.socket = socket.create_connection((address.hostname, address.port), timeout=PATIENCE_S)

    def send(self, first: int, last: int | None = None) -> None:
        """Some of the body, with the head before it when it is the first."""
        self.socket.sendall((self.head if first == 0 else b"") + self.body[first:last])

    def status(self) -> tuple[int, bytes]:
        """Read the answer; its status and its whole text."""
        answer = b""
        while b"\r\n\r\n" not in answer:
            piece = self.socket.recv(65536)
            assert piece, "it hung up"
            answer += piece
        return int(answer.split()[1]), answer

    def __exit__(self, *_: object) -> None:
        self.socket.close()


def held(house: House, job: str) -> str:
    """How a replica holds the job: offered, running or abandoned."""

    async def look() -> str:
        attempts = house.there.coordinator.parts.dispatcher.attempts.fleet.all_attempts()
        return next((one.state for _, one in attempts if one.job == job), "")

    return house.there.call(look)
