"""What the pipes do around the overlapped operations, which are played."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import trio

from supervisor.host.containment import windows_pipe
from supervisor.host.containment.windows_pipe import OverlappedReader, OverlappedWriter, gathered

sys.path.insert(0, str(Path(__file__).parent))
from windows_kernel import BookKernel

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the operations are played")


class Wire:
    """Plays ReadFile and WriteFile with an IOCP behind them."""

    def __init__(self) -> None:
        self.send, self.receive = trio.open_memory_channel[bytes](100)
        self.written: list[bytes] = []
        self.most = 2**30
        self.broken = False

    async def read_into(self, _handle: int, view: memoryview) -> int:
        try:
            data = await self.receive.receive()
        except trio.EndOfChannel:
            raise BrokenPipeError(232, "the pipe is being closed") from None
        view[: len(data)] = data
        return len(data)

    async def write_from(self, _handle: int, view: memoryview) -> int:
        await trio.lowlevel.checkpoint()
        if self.broken:
            raise BrokenPipeError(232, "the pipe is being closed")
        self.written.append(bytes(view[: self.most]))
        return len(self.written[-1])


@pytest.fixture
def wire(monkeypatch: pytest.MonkeyPatch) -> Wire:
    played = Wire()
    monkeypatch.setattr(windows_pipe, "_read_into", played.read_into)
    monkeypatch.setattr(windows_pipe, "_write_from", played.write_from)
    return played


@pytest.fixture
def kernel() -> BookKernel:
    return BookKernel()


def reader(kernel: BookKernel, over=lambda: False) -> tuple[OverlappedReader, int]:
    ours, _theirs = kernel.pipe(ours_reads=True, size=1)
    return OverlappedReader(kernel, ours, over), ours


async def test_what_was_written_is_read_and_then_the_end(kernel: BookKernel, wire: Wire):
    pipe, _ = reader(kernel)
    wire.send.send_nowait(b"one")
    wire.send.send_nowait(b"two")
    wire.send.close()
    assert [await pipe.read(), await pipe.read(), await pipe.read(), await pipe.read()] == [b"one", b"two", b"", b""]
    pipe.close()
    pipe.close()
    assert await pipe.read() == b""
    assert kernel.calls.count("close ours r") == 1


async def test_a_grandchild_that_holds_the_pipe_cannot_hold_us(kernel: BookKernel, wire: Wire):
    dead = False
    pipe, handle = reader(kernel, lambda: dead)
    got: list[bytes] = []

    async def read() -> None:
        while data := await pipe.read():
            got.append(data)
        got.append(b"")

    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(read)
            await trio.testing.wait_all_tasks_blocked()
            dead = True
            kernel.waiting[handle] = 4  # last words that are still in the pipe
            pipe.wake()
            await trio.testing.wait_all_tasks_blocked()
            assert got == []
            wire.send.send_nowait(b"last")
            kernel.waiting[handle] = 0
    assert got == [b"last", b""]


async def test_cancelling_a_read_is_not_taken_for_a_wake(kernel: BookKernel, wire: Wire):
    pipe, _ = reader(kernel)
    with trio.move_on_after(0.01) as scope:
        await pipe.read()
    assert scope.cancelled_caught
    wire.send.send_nowait(b"kept")
    assert await pipe.read() == b"kept"


async def test_closing_wakes_the_reader_before_the_handle_goes(kernel: BookKernel, wire: Wire):
    pipe, _ = reader(kernel)
    got: list[bytes] = []

    async def read() -> None:
        got.append(await pipe.read())

    async with trio.open_nursery() as nursery:
        nursery.start_soon(read)
        await trio.testing.wait_all_tasks_blocked()
        pipe.close()
    assert got == [b""]


async def test_frames_are_written_whole_and_in_order(kernel: BookKernel, wire: Wire):
    wire.most = 70_000  # Windows may take less than all
    pipe = OverlappedWriter(kernel, kernel.pipe(ours_reads=False, size=1)[0])
    big = bytes(range(256)) * 1000
    await pipe.write(b"head", memoryview(b"er"), b"", big, b"tail")
    assert b"".join(wire.written) == b"header" + big + b"tail"
    pipe.close()
    with pytest.raises(trio.ClosedResourceError):
        await pipe.write(b"x")


async def test_writing_to_a_dead_child_is_a_broken_pipe(kernel: BookKernel, wire: Wire):
    wire.broken = True
    pipe = OverlappedWriter(kernel, kernel.pipe(ours_reads=False, size=1)[0])
    with pytest.raises(BrokenPipeError):
        await pipe.write(b"x")


def test_small_parts_are_joined_and_large_ones_left_alone():
    large = memoryview(bytes(100_000))
    found = list(gathered([b"a", b"", b"b", large, b"c" * 40_000, b"d" * 40_000, b"e"]))
    assert [len(part) for part in found] == [2, 100_000, 40_000, 40_001]
    assert found[1] is large
    assert list(gathered([])) == []
