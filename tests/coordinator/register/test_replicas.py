"""Two coordinators over one register in PostgreSQL, and the command beside them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, connect

from coordinator.cli.main import main
from coordinator.register import open_register
from coordinator.testing import Running, running
from protocol import link_wire as wire
from protocol.revision import LINK_SUBPROTOCOL, LINK_WIRE

WAIT_S = 60.0


@pytest.fixture
def two(space: str, tmp_path: Path) -> Iterator[tuple[Running, Running]]:
    """Each with jobs of its own; what they share is the register."""

    def options(name: str) -> Path:
        (tmp_path / name).mkdir()
        return tmp_path / name

    one, other = options("one"), options("other")
    with (
        running(one, open_register=lambda: open_register(space, one / "keys.sqlite")) as first,
        running(other, open_register=lambda: open_register(space, other / "keys.sqlite")) as second,
    ):
        yield first, second
    assert not list(tmp_path.rglob("keys.sqlite"))


@contextmanager
def session(there: Running, secret: str, name: str) -> Iterator[ClientConnection]:
    """A worker's, welcomed."""
    headers = {"authorization": f"Bearer {secret}"}
    address = there.url.replace("http", "ws") + "/v1/worker"
    with connect(address, subprotocols=[LINK_SUBPROTOCOL], additional_headers=headers, open_timeout=WAIT_S) as socket:  # type: ignore[list-item]
        hello = wire.Hello(worker=name, low=LINK_WIRE.low, high=LINK_WIRE.high, capabilities=wire.Capabilities())
        socket.send(wire.encode(hello))
        socket.recv(WAIT_S)
        yield socket


def close_code(socket: ClientConnection) -> int:
    while True:
        try:
            socket.recv(WAIT_S)
        except ConnectionClosed as closed:
            return closed.rcvd.code if closed.rcvd is not None else 0


def test_keys_are_everybodys_and_a_revocation_by_anybody_ends_sessions_everywhere(
    two: tuple[Running, Running],
    space: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    first, second = two
    for there in two:
        assert httpx.get(there.url + "/v1/models", headers=first.headers).status_code == 200
    monkeypatch.setenv("COORDINATOR_STORE", space)
    state = ["--state", str(tmp_path / "third")]
    assert main(["workers", "enrol", "--name", "box7", *state]) == 0
    token = capsys.readouterr().out.strip()
    enrolled = httpx.post(first.url + "/v1/workers/enrol", headers={"authorization": f"Bearer {token}"})
    secret = enrolled.json()["token"]
    again = httpx.post(second.url + "/v1/workers/enrol", headers={"authorization": f"Bearer {token}"})
    assert (enrolled.status_code, again.status_code) == (201, 401)
    assert main(["keys", "list", *state]) == 0
    assert secret[:12] in capsys.readouterr().out

    with session(second, secret, "box7") as at_second, session(first, first.worker_token, "w") as at_first:
        assert main(["keys", "revoke", secret[:12], *state]) == 0  # beside both
        assert close_code(at_second) == wire.CLOSE_AUTH
        second.coordinator.keys.revoke(first.worker_token[:12])  # at the other replica
        assert close_code(at_first) == wire.CLOSE_AUTH
    with pytest.raises(InvalidStatus), session(first, secret, "box7"):
        pass
