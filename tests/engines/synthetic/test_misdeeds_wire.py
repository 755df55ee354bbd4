"""Noise and broken wires; the frames that break it are in test_misbehave.py."""

from __future__ import annotations

import os
import select
import time

import pytest

from protocol.engine_session import RemoteProtocolError
from protocol.engine_wire import Model, Ping, Result, WireError
from protocol.framing import FramingError

MODULE = "engines.synthetic.misbehave"


@pytest.fixture
def child(spawn):
    child = spawn(MODULE)
    child.load(Model(name="synthetic-bad", device="cpu"))
    yield child
    child.process.kill()


@pytest.mark.parametrize("frame", ["4gib", "64blobs", "nested"])
def test_more_frames_that_must_not_be_believed(child, frame):
    child.begin("llm", {"prompt": f"frame:{frame}"})
    with pytest.raises((FramingError, WireError)):
        _receive_for_ever(child)


def test_words_after_the_end(child):
    child.begin("llm", {"prompt": "frame:late"})
    child.receive()  # started
    assert isinstance(child.receive(), Result)
    with pytest.raises(RemoteProtocolError):
        child.receive()


def test_a_flood_of_chunks_is_whole_and_in_order(child):
    answer = child.run("llm", {"prompt": "flood-chunks:5000"}, stream=True)
    assert answer.body.content == "sent 5000 chunks"
    said = [chunk["delta"]["content"] for chunk in answer.chunks]
    assert said == [*(f"{number} " for number in range(5000)), "sent 5000 chunks"]


def test_a_flood_on_descriptor_1_does_not_reach_the_wire(child):
    assert child.run("llm", {"prompt": "flood-stdout:1"}).body.content == "wrote 1 MiB"
    assert len(child.stderr()) > 2**20


def _receive_for_ever(child):
    while True:
        child.receive()


def test_a_closed_input_hears_nothing_and_stays(child):
    child.begin("llm", {"prompt": "close-stdin"})
    child.receive()  # started
    until = time.monotonic() + 60
    with pytest.raises(BrokenPipeError):
        _ping_until(child, until)
    assert child.process.poll() is None


def _ping_until(child, until):
    while time.monotonic() < until:
        child.send(Ping(n=1))


def test_a_closed_output_ends_the_pipe_and_not_the_process(child):
    child.begin("llm", {"prompt": "close-stdout"})
    fd = child.process.stdout.fileno()
    while select.select([fd], [], [], 60)[0] and os.read(fd, 2**16):
        pass  # what it said before
    assert select.select([fd], [], [], 0)[0]  # the end of the file
    assert os.read(fd, 1) == b""
    assert child.process.poll() is None
