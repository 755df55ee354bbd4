"""The door between replicas: who may come in, and what becomes of what is no frame."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, connect

from coordinator.replicas import frames
from coordinator.testing import Running
from tests.coordinator.replicas.rig import PATIENCE_S, SECRET, until

Two = tuple[Running, Running]


@contextlib.contextmanager
def knocking(one: Running, **changed: str) -> Iterator[ClientConnection]:
    """A connection as another replica makes it."""
    replicas = one.coordinator.replicas
    assert replicas is not None
    headers = {
        "authorization": f"Bearer {SECRET}",
        frames.FROM: "gw_test",
        frames.TO: replicas.name,
        **{name.replace("_", "-"): value for name, value in changed.items()},
    }
    url = replicas._doorway.url + frames.PATH
    with connect(url, additional_headers=headers, proxy=None, compression=None, open_timeout=PATIENCE_S) as socket:
        yield socket


@pytest.mark.parametrize(
    ("changed", "status", "words"),
    [
        ({"authorization": "Bearer another-secret-of-all"}, 401, "secret_file"),
        ({"authorization": ""}, 401, "secret_file"),
        ({"x-bulkhead-from": ""}, 400, "x-bulkhead-from"),
        ({"x-bulkhead-to": "gw_gone"}, 421, "not gw_gone"),
    ],
)
def test_who_is_no_replica_that_means_us_is_refused(two: Two, changed: Any, status: int, words: str) -> None:
    with pytest.raises(InvalidStatus) as refused, knocking(two[0], **changed):
        pass
    assert refused.value.response.status_code == status
    assert words in bytes(refused.value.response.body).decode()


def test_a_replica_that_reaches_itself_is_told_so(two: Two) -> None:
    replicas = two[0].coordinator.replicas
    assert replicas is not None
    with pytest.raises(InvalidStatus) as refused, knocking(two[0], **{"x-bulkhead-from": replicas.name}):
        pass
    assert refused.value.response.status_code == 409
    assert b"advertise" in bytes(refused.value.response.body)


@pytest.mark.parametrize("data", [b"\xc1", "text", msgspec.msgpack.encode([["?"]])])
def test_what_is_no_frames_ends_the_connection_alone(two: Two, data: bytes | str) -> None:
    with knocking(two[0]) as socket:
        socket.send(data)
        with pytest.raises(ConnectionClosed) as closed:
            socket.recv(PATIENCE_S)
        assert closed.value.rcvd is not None
        assert closed.value.rcvd.code == 4002
    with knocking(two[0]) as again:
        again.send(frames.message([frames.encode(frames.EndedFrame("job_of_nobody"))]))
        again.ping().wait(PATIENCE_S)


def test_what_a_replica_told_is_void_when_it_has_left(two: Two) -> None:
    replicas = two[0].coordinator.replicas
    assert replicas is not None
    with knocking(two[0]) as socket:
        told = [frames.WatchFrame("job_x", True), frames.JoinedFrame("nobody"), frames.StopFrame("job_x", 1, "why")]
        socket.send(frames.message([frames.encode(frame) for frame in told]))
        until(lambda: "job_x" in replicas._followers)
    until(lambda: "job_x" not in replicas._followers)
