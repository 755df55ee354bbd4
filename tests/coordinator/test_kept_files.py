"""Files of tenants: bounds, and bytes that go with their rows."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import trio

from coordinator.blobs.folder import FolderBlobs
from coordinator.kept_files import KeptFiles, new_file_id
from coordinator.store import SqliteStore
from coordinator.store.shelf import FileRecord
from protocol.faults import FaultError
from protocol.ids import is_safe_id


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SqliteStore]:
    store = SqliteStore(tmp_path / "jobs.sqlite")
    yield store
    store.close()


@pytest.fixture
def blobs(tmp_path: Path) -> FolderBlobs:
    return FolderBlobs(tmp_path / "blobs")


def draft(tenant: str = "t", name: str = "a.txt") -> FileRecord:
    return FileRecord(id=new_file_id(), tenant=tenant, name=name, purpose="batch", blob="", size=0, sha256="")


class Some:
    """So many bytes, one by one; needs no closing when its reader has enough."""

    def __init__(self, size: int) -> None:
        self._left = size

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        if not self._left:
            raise StopAsyncIteration
        self._left -= 1
        return b"x"


def stored(blobs: FolderBlobs) -> int:
    return len(list(blobs.path("blob_" + "0" * 26).parent.iterdir()))


async def test_bytes_go_with_their_row(store: SqliteStore, blobs: FolderBlobs) -> None:
    files = KeptFiles(store, blobs)
    kept = await files.keep(await files.receive(Some(5), draft(name="n" * 999)))
    assert (kept.size, len(kept.name)) == (5, 255)
    assert (await files.find(kept.id, "t")).id == kept.id
    assert not await files.remove(kept.id, "another")
    assert stored(blobs) == 1
    assert await files.remove(kept.id, "t")
    assert stored(blobs) == 0
    with pytest.raises(FaultError) as refused:
        await files.find(kept.id, "t", "input_file_id")
    assert (refused.value.fault.code, refused.value.fault.field) == ("not_found", "input_file_id")


async def test_what_was_received_and_not_kept_is_dropped(store: SqliteStore, blobs: FolderBlobs) -> None:
    files = KeptFiles(store, blobs)
    await files.drop(await files.receive(Some(5), draft()))
    assert stored(blobs) == 0
    kept = await files.keep(await files.receive(Some(5), draft()))
    with trio.CancelScope() as scope:
        scope.cancel()
        await files.drop(kept)
    assert stored(blobs) == 1, "what is kept stays"


async def test_each_tenant_has_its_bound(store: SqliteStore, blobs: FolderBlobs) -> None:
    files = KeptFiles(store, blobs, tenant_bytes=8)
    await files.keep(await files.receive(Some(6), draft()))
    for size in (3, 100):
        with pytest.raises(FaultError, match="8 bytes"):
            await files.receive(Some(size), draft())
    await files.keep(await files.receive(Some(2), draft()))
    with pytest.raises(FaultError, match="8 bytes"):
        await files.receive(Some(0), draft())
    await files.receive(Some(8), draft("another"))
    assert (await files.receive(Some(20), draft(), bounded=False)).size == 20
    with pytest.raises(FaultError, match="exceeds 4 bytes"):
        await files.receive(Some(5), draft("another"), limit=4)


async def test_a_purge_takes_rows_and_bytes(store: SqliteStore, blobs: FolderBlobs) -> None:
    files = KeptFiles(store, blobs)
    await files.keep(await files.receive(Some(1), draft()), keep_s=10)
    lasting = await files.keep(await files.receive(Some(1), draft()))
    store.shift_clock(10_000)
    await files.purge()
    assert [file.id for file in await files.list("t", 10)] == [lasting.id]
    assert stored(blobs) == 1


def test_ids_look_like_openais_and_may_stand_in_urls() -> None:
    made = {new_file_id() for _ in range(100)}
    assert len(made) == 100
    assert all(one.startswith("file-") and is_safe_id(one) for one in made)
