"""Frames there and back, and what is none."""

from __future__ import annotations

import msgspec
import pytest

from coordinator.records import WorkerView
from coordinator.replicas import frames
from protocol import link_wire as wire

VIEW = WorkerView(id="w1", accepting=True, reason="", running=1, slots=2, models=("m",))
ALL: list[frames.Frame] = [
    frames.StartedFrame("job", 1),
    frames.ChunkFrame("job", 2, 3, b"\x81"),
    frames.ProgressFrame("job", 1, 4, None, "load", "…"),
    frames.EndedFrame("job", 7),
    frames.StopFrame("job", 1, "why"),
    frames.WatchFrame("job", False),
    frames.FleetFrame((frames.RemoteWorker(VIEW, wire.Capabilities()),), first=False),
    frames.JoinedFrame("w1"),
    frames.OrderFrame("w1", b"x"),
    frames.AnswerFrame("w1", b"y"),
]


@pytest.mark.parametrize("count", [0, 1, 15, 16, 300, 70_000])
def test_a_message_is_the_array_of_its_frames(count: int) -> None:
    data = frames.encode(frames.EndedFrame("job", 1))
    assert frames.decode(frames.message([data] * count)) == [frames.EndedFrame("job", 1)] * count


def test_every_frame_comes_as_it_went() -> None:
    assert frames.decode(frames.message([frames.encode(frame) for frame in ALL])) == ALL
    assert {type(frame) for frame in ALL} == set(frames.Frame.__subclasses__())


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xc1",
        b"\x80",
        b"\x91\x80",
        msgspec.msgpack.encode([["?", "job"]]),
        msgspec.msgpack.encode([["c", "job", 1, -1, b""]]),
        msgspec.msgpack.encode([["c", "job", 1, 0, "text"]]),
        msgspec.msgpack.encode([["e", "j" * 300]]),
        msgspec.msgpack.encode([["e", "job"]])[:-1],
        b"\x91" * 100_000,
    ],
)
def test_what_is_no_frames_is_refused(data: bytes) -> None:
    with pytest.raises(frames.FrameError):
        frames.decode(data)
