"""What an attempt may leave, and what stays of it: one contract on a folder and on S3."""

from __future__ import annotations

import hashlib
import os
import random
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio

from coordinator.blobs.base import Blobs, StoredBlob
from coordinator.blobs.bounds import MAX_RESULT_BYTES, NONE, WIDEST, Bounds, bounds_of, parse
from coordinator.blobs.folder import FolderBlobs
from coordinator.blobs.room import Rooms
from coordinator.testing_link import pieces
from protocol.faults import FaultError
from protocol.link_wire import RESULT_FILE
from protocol.work import PARAMS, Kind

DATA = random.Random(1).randbytes(3 * 2**20 + 17)
DIGEST = hashlib.sha256(DATA).hexdigest()
ODD = "a b?%2e#ü+&=*.png"
Make = Callable[..., Blobs]


def code(caught: pytest.ExceptionInfo[FaultError]) -> str:
    return caught.value.fault.code


async def put(
    blobs: Blobs, name: str, data: bytes, digest: str = "", at: int = 0, bounds: Bounds = WIDEST, attempt: int = 1
) -> StoredBlob:
    async def source() -> AsyncGenerator[bytes, None]:
        for start in range(0, len(data), 2**16):
            yield data[start : start + 2**16]

    async with aclosing(source()) as came:
        return await blobs.put_output("job_1", attempt, name, came, digest, at, bounds)


def test_every_kind_has_bounds_and_they_survive_the_url() -> None:
    for kind in (*PARAMS, "x-any"):
        bounds = bounds_of(kind)
        assert parse(bounds.text()) == bounds
        assert bounds.together <= bounds.files * bounds.each
        assert bounds.of(RESULT_FILE) == MAX_RESULT_BYTES
    assert [kind for kind in PARAMS if bounds_of(kind) == NONE] == [
        Kind.LLM,
        Kind.EMBEDDING,
        Kind.RERANK,
        Kind.AUDIO_STT,
    ]
    for text in ("", "1-2", "1-2-3-4", "-1-2-3", "1-2-3\n", "9" * 30 + "-1-1", "²-1-1"):
        with pytest.raises(FaultError) as caught:
            parse(text)
        assert code(caught) == "forbidden"


TWO = Bounds(2, 3 * 2**20, 4 * 2**20)


async def broken(data: bytes) -> AsyncIterator[bytes]:
    yield data
    raise ConnectionResetError


async def leave_part(
    blobs: Blobs, data: bytes, attempt: int = 1, bounds: Bounds = WIDEST, size: int = 2 * 2**20
) -> str:
    """The first bytes of an output, whose connection breaks then; its digest."""
    digest = hashlib.sha256(data).hexdigest()
    with pytest.raises(ConnectionResetError):
        await blobs.put_output("job_1", attempt, "part", broken(data[:size]), digest, 0, bounds)
    return digest


async def test_outputs_and_parts_are_counted_together(make: Make) -> None:
    blobs = make()
    await put(blobs, "a", b"a", "", 0, TWO, 1)
    await leave_part(blobs, DATA)
    await put(blobs, RESULT_FILE, b"c", "", 0, TWO, 1)
    for again in (blobs, make()):
        with pytest.raises(FaultError, match="at most 2 output files and a result") as caught:
            await put(again, "d", b"d", hashlib.sha256(b"d").hexdigest(), 0, TWO, 1)
        assert code(caught) == "payload_too_large"
    a = hashlib.sha256(b"a").hexdigest()
    assert (await put(blobs, "a", b"a", a, 0, TWO, 1)).sha256 == a, "it came again"
    await put(blobs, "d", b"d", "", 0, TWO, 2)


async def test_the_bytes_of_all_files_and_parts_are_bounded_together(make: Make) -> None:
    blobs, near = make(), Bounds(9, 3 * 2**20, 0)
    near = msgspec.structs.replace(near, together=6 * 2**20 - MAX_RESULT_BYTES)
    await put(blobs, "a", b"a" * 2 * 2**20, "", 0, near, 1)
    other = await leave_part(blobs, b"b" * 3 * 2**20, bounds=near)
    with pytest.raises(FaultError, match="files of this attempt exceed 6291456 bytes together") as caught:
        await put(make(), "c", DATA[: 2**21 + 1], DIGEST, 0, near)
    assert code(caught) == "payload_too_large"
    assert await blobs.received("job_1", 1, DIGEST) == 0, "what was too much is not kept"
    # What is left of the part is just as much as there is room for.
    rest = await blobs.received("job_1", 1, other)
    assert rest == 2 * 2**20
    await put(blobs, "part", b"b" * 2**20, other, rest, near)


async def test_a_file_alone_is_bounded_by_its_name_and_kind(make: Make) -> None:
    blobs = make()
    for name, data, bounds, words in (
        ("a", DATA, TWO, "The file 'a' exceeds 3145728 bytes"),
        ("a", b"", NONE, "makes no files"),
    ):
        for digest in ("", hashlib.sha256(data).hexdigest()):
            with pytest.raises(FaultError, match=words) as caught:
                await put(blobs, name, data, digest, 0, bounds, 1)
            assert code(caught) == "payload_too_large"
    assert await blobs.received("job_1", 1, DIGEST) == 0
    assert (await put(blobs, RESULT_FILE, DATA, DIGEST, 0, NONE, 1)).size == len(DATA)


async def test_files_that_come_side_by_side_are_counted_as_they_come(make: Make) -> None:
    blobs, begun, more = make(), trio.Event(), trio.Event()

    async def slowly() -> AsyncIterator[bytes]:
        yield b"x"
        begun.set()
        await more.wait()

    only = Bounds(1, 9, 9)
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(partial(blobs.put_output, "job_1", 1, "slow", slowly(), "", 0, only))
            await begun.wait()
            await put(blobs, RESULT_FILE, b"r", "", 0, only, 1)
            with pytest.raises(FaultError, match="at most 1 output files"):
                await put(blobs, "b", b"b", "", 0, only, 1)
            more.set()


async def test_of_an_attempt_that_is_over_only_what_is_kept_stays(make: Make) -> None:
    blobs = make()
    kept = await blobs.put_output("job_1", 2, ODD, pieces(b"kept"))
    junk = [await blobs.put_output("job_1", n, name, pieces(b"junk")) for n, name in ((2, ODD), (2, "b"), (1, "a"))]
    other = await blobs.put_output("job_10", 2, "a", pieces(b"x"))
    parts = [await leave_part(blobs, DATA, attempt) for attempt in (2, 1)]
    assert blobs.touched == {("job_1", 1), ("job_1", 2), ("job_10", 2)}
    found = make().left_lately(3600.0)
    assert found["job_1", 2] == {"", kept.key, junk[0].key, junk[1].key}
    assert found["job_10", 2] == {other.key}
    later = make()
    later._now_s = lambda: time.time() + 7200.0
    assert later.left_lately(3600.0) == {("job_1", 1): {""}, ("job_1", 2): {""}}, "parts are always looked at"
    blobs.tidy("job_1", 2, {kept.key})
    blobs.tidy("job_1", 2, {kept.key})
    assert [blobs.size(one.key) for one in (kept, *junk, other)] == [4, None, None, 4, 1]
    assert [await blobs.received("job_1", n, digest) for n, digest in zip((2, 1), parts, strict=True)] == [0, 2 * 2**20]
    blobs.tidy("job_1", 1, ())
    assert make().left_lately(3600.0) == {("job_1", 2): {kept.key}, ("job_10", 2): {other.key}}


async def test_names_that_nobody_of_us_gave_are_passed_over(make: Make, tmp_path: Path) -> None:
    blobs = make()
    output = await blobs.put_output("job_1", 1, "a", pieces(b"a"))
    for name in (".nfs000000000001", "job_1.x.y", f"job_1.².{DIGEST}", f"*.1.{DIGEST}"):
        (blobs._drafts._folder / "parts" / name).write_bytes(b"x")
    if isinstance(blobs, FolderBlobs):
        (tmp_path / "blobs/out/.nfs000000000002").write_bytes(b"x")
        (tmp_path / "blobs/out/job_1/.nfs000000000003").write_bytes(b"x")
    else:
        import obstore

        for name in ("out/x", "out/job_1/x", f"out/job_1/x/{DIGEST}-YQ", f"out/job_1/1/{DIGEST}-A", "up/x/1", "up/x"):
            obstore.put(blobs._store, name, b"x")  # type: ignore[attr-defined]
    for again in (blobs, make()):
        assert again.left_lately(3600.0) == {("job_1", 1): {output.key}}
        assert await again.find_named("job_1", 1, "a") == output.key
        await again.put_output("job_1", 1, "a", pieces(b"a"), bounds=Bounds(1, 9, 9))


def test_a_folder_that_goes_while_it_is_looked_at_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blobs = FolderBlobs(tmp_path / "blobs")
    for job in ("job_1", "job_2"):
        (tmp_path / "blobs" / "out" / job / "1").mkdir(parents=True)
    gone, scandir, listdir = tmp_path / "blobs" / "out" / "job_1", os.scandir, os.listdir

    def going(look: Callable[..., Any], path: Any) -> Any:
        if str(path) == str(gone) and gone.exists():
            (gone / "1").rmdir()
            gone.rmdir()
        return look(path)

    monkeypatch.setattr(os, "listdir", partial(going, listdir))
    monkeypatch.setattr(os, "scandir", partial(going, scandir))
    assert blobs.left_lately(3600.0) == {("job_2", 1): set()}


async def test_what_is_made_whole_during_a_look_at_what_lies_there_is_counted(tmp_path: Path) -> None:
    """The look began before: it may not have seen it."""
    lying: dict[str, int] = {}
    looking, go, looks = trio.Event(), threading.Event(), 0

    def look(_job: str, _attempt: int) -> dict[str, int]:
        nonlocal looks
        looks += 1
        found = dict(lying)
        if looks == 2:
            trio.from_thread.run_sync(looking.set)
            assert go.wait(60.0)
        return found

    rooms, only, refused = Rooms(look), Bounds(1, 9, 9), trio.Event()

    async def third() -> None:
        with pytest.raises(FaultError, match="at most 1 output files"):
            async with rooms.enter("job_1", 1, "c", "", 9, only):
                pass
        refused.set()

    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            async with rooms.enter("job_1", 1, "a", DIGEST, 9, only) as first:
                async with rooms.enter("job_1", 1, RESULT_FILE, "", 9, only):
                    lying["0" * 64 + "-" + RESULT_FILE] = 1
                nursery.start_soon(third)
                await looking.wait()
                lying[first.key] = 1
            go.set()
            await refused.wait()


async def test_what_comes_for_an_attempt_while_it_is_tidied_is_refused_or_noted(make: Make) -> None:
    blobs = make()

    async def data() -> AsyncGenerator[bytes, None]:
        yield DATA
        blobs.touched.clear()
        await trio.to_thread.run_sync(blobs.tidy, "job_1", 1, ())

    with pytest.raises(FaultError) as caught:
        async with aclosing(data()) as source:
            await blobs.put_output("job_1", 1, "a", source, DIGEST)
    assert code(caught) in ("conflict", "not_found")
    assert blobs.touched == {("job_1", 1)}
    assert await blobs.find_named("job_1", 1, "a") is None
