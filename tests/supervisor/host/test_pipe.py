"""Pipes to children: whole frames or none, and an end that a grandchild cannot hold back."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator

import pytest
import trio
import trio.testing

from supervisor.host.pipe import PipeReader, PipeWriter

MIB = 2**20


@pytest.fixture
async def ends() -> AsyncIterator[tuple[int, PipeWriter]]:
    read, write = os.pipe()
    writer = PipeWriter(write)
    try:
        yield read, writer
    finally:
        writer.close()
        os.close(read)


def drained(fd: int) -> bytes:
    os.set_blocking(fd, False)
    parts = []
    try:
        while part := os.read(fd, MIB):
            parts.append(part)
    except BlockingIOError:
        pass
    return b"".join(parts)


async def test_parts_of_a_frame_are_written_in_one_go(ends):
    read, writer = ends
    await writer.write(b"len", b"", memoryview(b"header"), b"blob")
    assert os.read(read, 100) == b"lenheaderblob"


async def test_nothing_follows_a_frame_that_was_cut_short(ends):
    read, writer = ends
    with trio.move_on_after(0.05) as patience:
        await writer.write(b"a" * 8 * MIB)  # nobody reads
    assert patience.cancelled_caught
    written = drained(read)
    assert 0 < len(written) < 8 * MIB
    with pytest.raises(trio.ClosedResourceError):  # it would be read as the rest of the frame
        await writer.write(b"b" * 10)
    assert drained(read) == b""


async def test_a_frame_that_was_not_begun_costs_nothing(ends):
    read, writer = ends
    os.write(writer._fd, b"x" * MIB)  # full
    with trio.move_on_after(0.05) as patience:
        await writer.write(b"small")
    assert patience.cancelled_caught
    assert drained(read) == b"x" * MIB
    await writer.write(b"next")
    assert drained(read) == b"next"


async def test_writers_come_one_after_the_other(ends):
    read, writer = ends
    async with trio.open_nursery() as nursery:
        nursery.start_soon(writer.write, b"1" * 3 * MIB)
        await trio.testing.wait_all_tasks_blocked(0.01)
        nursery.start_soon(writer.write, b"2")
        reader, found = PipeReader(os.dup(read), lambda: False), b""
        while len(found) < 3 * MIB + 1:
            found += await reader.read()
        reader.close()
    assert found == b"1" * 3 * MIB + b"2"


async def test_a_closed_end_is_told_and_a_missing_reader_too(ends):
    read, writer = ends
    other = os.open(os.devnull, os.O_RDONLY)
    os.dup2(other, read)
    os.close(other)
    with pytest.raises(BrokenPipeError):
        await writer.write(b"x")
    writer.close()
    writer.close()
    with pytest.raises(trio.ClosedResourceError):
        await writer.write(b"x")


async def test_a_reader_believes_the_death_of_the_writer_and_not_the_pipe():
    read, write = os.pipe()  # a grandchild holds it
    over = False
    reader = PipeReader(read, lambda: over)
    os.write(write, b"last words")
    got: list[bytes] = []

    async def listen() -> None:
        while data := await reader.read():
            got.append(data)
        got.append(b"end")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(listen)
        await trio.testing.wait_all_tasks_blocked(0.01)
        over = True
        reader.wake()
    assert got == [b"last words", b"end"]
    reader.close()
    reader.close()
    assert await reader.read() == b""
    os.close(write)
