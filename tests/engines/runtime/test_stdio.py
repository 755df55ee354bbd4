"""The engine's end of the pipe, over real pipes: whole frames whatever the pipe takes at once."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from engines.runtime.stdio import Wire
from protocol import engine_wire as wire
from protocol.framing import FrameDecoder

ROOT = Path(__file__).parents[3]


@pytest.fixture
def ends() -> Iterator[tuple[int, int, int, int]]:
    """(ours to write to the engine, the engine's in, the engine's out, ours to read from it)"""
    engine_in, to_engine = os.pipe()
    from_engine, engine_out = os.pipe()
    fds = [to_engine, engine_in, engine_out, from_engine]
    yield to_engine, engine_in, engine_out, from_engine
    for fd in fds:
        try:
            os.close(fd)
        except OSError:
            pass  # closed by the test


def test_frames_come_however_the_bytes_are_cut(ends: tuple[int, int, int, int]) -> None:
    to_engine, engine_in, engine_out, _ = ends
    data = b"".join(b"".join(map(bytes, wire.encode(wire.Ping(n=n)))) for n in range(3))
    half = len(data) // 2

    def speak() -> None:
        os.write(to_engine, data[:half])
        os.write(to_engine, data[half:])
        os.close(to_engine)

    thread = threading.Thread(target=speak)
    thread.start()
    found = [wire.decode_down(frame) for frame in Wire(engine_in, engine_out).frames()]
    thread.join()
    assert found == [wire.Ping(n=0), wire.Ping(n=1), wire.Ping(n=2)]


def test_a_frame_larger_than_the_pipe_and_than_one_writev_arrives_whole(ends: tuple[int, int, int, int]) -> None:
    _, engine_in, engine_out, from_engine = ends
    channel = Wire(engine_in, engine_out)
    parts = [memoryview(bytes([number]) * 50_000) for number in range(40)]  # 2 MB in more parts than writev takes
    expected = b"".join(parts)
    thread = threading.Thread(target=channel.write, args=(parts,))
    thread.start()
    found = b""
    while len(found) < len(expected):
        found += os.read(from_engine, 2**16)
    thread.join()
    assert found == expected


def test_frames_of_several_threads_are_never_mixed(ends: tuple[int, int, int, int]) -> None:
    _, engine_in, engine_out, from_engine = ends
    channel = Wire(engine_in, engine_out)
    bodies = {run: wire.pack({"text": str(run) * 30_000}) for run in range(1, 5)}

    def speak(run: int) -> None:
        for seq in range(5):
            channel.write(channel.encode(wire.Chunk(run=run, seq=seq, data=bodies[run])))

    threads = [threading.Thread(target=speak, args=(run,)) for run in bodies]
    for thread in threads:
        thread.start()
    decoder, found = FrameDecoder(), []
    while len(found) < 20:
        decoder.feed(os.read(from_engine, 2**16))
        found += [wire.decode_up(frame) for frame in decoder]
    for thread in threads:
        thread.join()
    for run, body in bodies.items():
        own = [chunk for chunk in found if chunk.run == run]
        assert [chunk.seq for chunk in own] == [0, 1, 2, 3, 4]
        assert {bytes(chunk.data) for chunk in own} == {bytes(body)}


def test_it_answers_in_kind(ends: tuple[int, int, int, int]) -> None:
    _, engine_in, engine_out, _ = ends
    channel = Wire(engine_in, engine_out)
    assert bytes(channel.encode(wire.Pong(n=1))[0])[:1] == b"\0"
    channel.json = True
    assert b"".join(map(bytes, channel.encode(wire.Pong(n=1)))) == b'{"t":"pong","n":1}\n'


def test_a_host_that_is_gone_ends_the_process() -> None:
    code = (
        "import os\nfrom engines.runtime.stdio import Wire\n"
        "read, write = os.pipe()\nos.close(read)\n"
        "Wire(0, write).write([memoryview(b'x')])\nraise SystemExit(9)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert b"the host closed the pipe" in done.stderr
