"""The outbox: whole files or none, and nothing that the engine did not say."""

from __future__ import annotations

import errno
import hashlib
import os

import msgspec
import pytest

from protocol.engine_wire import OutputFile
from protocol.faults import FaultError
from supervisor.link import outbox as outboxes
from supervisor.link.outbox import Outbox


@pytest.fixture
async def box(tmp_path):
    made = Outbox(tmp_path / "outbox", 1000)
    await made.sweep(())
    return made


def described(data: bytes, name: str = "a.bin", **wrong: object) -> OutputFile:
    said = OutputFile(name, "x/y", len(data), hashlib.sha256(data).hexdigest())
    return msgspec.structs.replace(said, **wrong)


def opener(path):
    return lambda: os.open(path, os.O_RDONLY)


async def test_files_are_copied_counted_and_dropped(box, tmp_path):
    source = tmp_path / "source"
    source.write_bytes(b"q" * 700)
    size = await box.keep("j", 1, [(described(b"q" * 700), opener(source)), (described(b"in", "b.bin"), b"in")])
    assert size == box.held_bytes == 702
    source.write_bytes(b"another")
    fd = box.open("j", 1, "a.bin")
    assert os.read(fd, 1000) == b"q" * 700
    os.close(fd)
    await box.drop("j", 1)
    assert box.held_bytes == 0
    assert not box.folder("j", 1).exists()
    await box.drop("j", 1)


async def test_it_says_when_it_is_full(box):
    assert box.reason() == ""
    await box.keep("j", 1, [(described(b"x" * 1000), b"x" * 1000)])
    assert box.reason().startswith("1 result with 0.0 GiB wait")
    await box.drop("j", 1)
    assert box.reason() == ""


@pytest.mark.parametrize(
    ("wrong", "word"), [({"size": 5}, "grew"), ({"size": 7}, "shrank"), ({"sha256": "00" * 32}, "sha256")]
)
async def test_a_file_that_is_not_what_was_said_leaves_nothing(box, tmp_path, wrong, word):
    source = tmp_path / "source"
    source.write_bytes(b"abcdef")
    with pytest.raises(FaultError, match=word):
        await box.keep("j", 1, [(described(b"ok", "b.bin"), b"ok"), (described(b"abcdef", **wrong), opener(source))])
    assert box.held_bytes == 0
    assert not box.folder("j", 1).exists()


async def test_a_full_disk_leaves_nothing(box, monkeypatch):
    def full(_fd: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(outboxes.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        await box.keep("j", 1, [(described(b"x"), b"x")])
    assert not box.folder("j", 1).exists()


async def test_what_no_row_names_is_swept(box):
    for job in ("a", "b"):
        await box.keep(job, 1, [(described(b"x"), b"x")])
    await box.sweep([("b", 1)])
    assert not box.folder("a", 1).exists()
    assert box.folder("b", 1).exists()


async def test_the_content_is_synced_before_its_name(box, monkeypatch):
    order = []
    real = os.fsync

    def spy(fd: int) -> None:
        order.append(os.readlink(f"/proc/self/fd/{fd}").rpartition("/")[2])
        real(fd)

    monkeypatch.setattr(outboxes.os, "fsync", spy)
    await box.keep("j", 1, [(described(b"x"), b"x")])
    assert order == ["a.bin", "j.1", "outbox"]
