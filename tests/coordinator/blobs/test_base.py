"""Files of jobs: stored whole or not at all, inside the folder, behind signatures."""

from __future__ import annotations

import errno
import hashlib
import os
import random
import stat
import time
from collections.abc import AsyncIterator
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest
import trio

from coordinator.blobs.base import ORPHAN_S, StoredBlob, is_safe_name
from coordinator.blobs.bounds import WIDEST
from coordinator.blobs.drafts import YOUNG_S
from coordinator.blobs.folder import FolderBlobs
from coordinator.testing_link import pieces
from protocol.engine_wire import MAX_OUTPUT_FILES
from protocol.faults import FaultError

DATA = random.Random(1).randbytes(3 * 2**20 + 17)
DIGEST = hashlib.sha256(DATA).hexdigest()
ABSENT = "blob_" + "0" * 26


@pytest.fixture
def blobs(tmp_path: Path) -> FolderBlobs:
    return FolderBlobs(tmp_path / "blobs")


def leftovers(tmp_path: Path) -> list[str]:
    return os.listdir(tmp_path / "blobs" / "tmp")


def code(caught: pytest.ExceptionInfo[FaultError]) -> str:
    return caught.value.fault.code


async def test_what_is_put_is_what_is_read(blobs: FolderBlobs, tmp_path: Path) -> None:
    stored = await blobs.put(pieces(DATA), len(DATA), DIGEST)
    assert (stored.size, stored.sha256) == (len(DATA), DIGEST)
    assert await blobs.read(stored.key, len(DATA)) == DATA
    async with await blobs.open(stored.key) as file:
        assert await file.read(10) == DATA[:10]
    assert stat.S_IMODE(blobs.path(stored.key).stat().st_mode) == 0o600
    assert leftovers(tmp_path) == []
    with pytest.raises(FaultError) as caught:
        await blobs.read(stored.key, len(DATA) - 1)
    assert code(caught) == "payload_too_large"


async def test_empty_files_are_files(blobs: FolderBlobs) -> None:
    stored = await blobs.put(pieces(b""), 0)
    assert stored.size == 0
    assert await blobs.read(stored.key, 0) == b""


@pytest.mark.parametrize(
    ("limit", "expected", "fault"), [(len(DATA) - 1, "", "payload_too_large"), (2**30, "0" * 64, "upload_failed")]
)
async def test_a_refused_file_leaves_nothing(
    blobs: FolderBlobs, tmp_path: Path, limit: int, expected: str, fault: str
) -> None:
    with pytest.raises(FaultError) as caught:
        await blobs.put(pieces(DATA), limit, expected)
    assert code(caught) == fault
    assert leftovers(tmp_path) == []
    assert os.listdir(tmp_path / "blobs" / "in") == []


async def test_a_sender_that_breaks_off_or_is_cancelled_leaves_nothing(blobs: FolderBlobs, tmp_path: Path) -> None:
    async def broken() -> AsyncIterator[bytes]:
        yield DATA
        raise ConnectionResetError

    async def endless() -> AsyncIterator[bytes]:
        yield DATA
        await trio.sleep_forever()

    with pytest.raises(ConnectionResetError):
        await blobs.put(broken(), 2**30)
    with trio.move_on_after(0.2) as scope:
        await blobs.put(endless(), 2**30)
    assert scope.cancelled_caught
    assert leftovers(tmp_path) == []
    assert os.listdir(tmp_path / "blobs" / "in") == []


async def test_a_full_disk_is_a_typed_refusal(
    blobs: FolderBlobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_fd: int, _data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("coordinator.blobs.drafts.os.write", full)
    with pytest.raises(FaultError) as caught:
        await blobs.put(pieces(DATA), 2**30)
    assert (code(caught), caught.value.fault.http_status) == ("storage_full", 507)
    assert leftovers(tmp_path) == []


async def test_a_write_may_be_short(blobs: FolderBlobs, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    monkeypatch.setattr("coordinator.blobs.drafts.os.write", lambda fd, data: write(fd, data[:100_000]))
    stored = await blobs.put(pieces(DATA), 2**30)
    assert await blobs.read(stored.key, len(DATA)) == DATA


@pytest.mark.parametrize(
    "key",
    [
        "",
        "secret",
        "../secret",
        "blob_../../secret",
        "/etc/passwd",
        "job/1/../../../secret",
        f"job/1/{DIGEST}-../../x",
        f"job/1/{DIGEST}-a/b",
        f"job/1/{DIGEST}-",
        f"../1/{DIGEST}-x",
        f"job/../{DIGEST}-x",
        f"job/-1/{DIGEST}-x",
        f"job/1/{DIGEST}x",
        f"job/1/{DIGEST}-x\n",
        f"job/²/{DIGEST}-x",
        ABSENT + "\n",
    ],
)
async def test_no_key_leads_out_of_the_folder(blobs: FolderBlobs, key: str) -> None:
    with pytest.raises(FaultError) as caught:
        blobs.path(key)
    assert code(caught) == "not_found"
    with pytest.raises(FaultError) as caught:
        await blobs.open(key)
    assert code(caught) == "not_found"


async def test_a_missing_file_is_not_found(blobs: FolderBlobs) -> None:
    with pytest.raises(FaultError) as caught:
        await blobs.open(ABSENT)
    assert code(caught) == "not_found"


async def test_outputs_are_found_by_size_and_digest_only(blobs: FolderBlobs) -> None:
    stored = await blobs.put_output("job_1", 2, "a b ü.png", pieces(b"abc"))
    digest = hashlib.sha256(b"abc").hexdigest()
    assert stored == StoredBlob(f"job_1/2/{digest}-a b ü.png", 3, digest)
    assert await blobs.find_output("job_1", 2, "a b ü.png", 3, digest) == stored.key
    for wrong in (
        ("job_1", 2, "a b ü.png", 4, digest),
        ("job_1", 2, "a b ü.png", 3, "0" * 64),
        ("job_1", 1, "a b ü.png", 3, digest),
        ("job_2", 2, "a b ü.png", 3, digest),
        ("job_1", 2, "b.png", 3, digest),
        ("job_1", 2, "../x", 3, digest),
        ("job_1", 2, "a b ü.png", 3, "not hex"),
        ("../x", 2, "a b ü.png", 3, digest),
    ):
        assert await blobs.find_output(*wrong) is None, wrong
    await blobs.put_output("job_1", 2, "a b ü.png", pieces(b"abcd"))
    latest = await blobs.find_named("job_1", 2, "a b ü.png")
    assert latest is not None
    assert await blobs.read(latest, 9) == b"abcd"
    assert await blobs.find_named("job_1", 2, "other") is None
    assert await blobs.find_named("job_9", 2, "other") is None


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "a\\b", "a\0b", "a\nb", "x" * 151, "ü" * 76])
async def test_unsafe_names_are_refused(blobs: FolderBlobs, name: str) -> None:
    assert not is_safe_name(name)
    with pytest.raises(FaultError) as caught:
        await blobs.put_output("job_1", 1, name, pieces(b"x"))
    assert code(caught) == "invalid_request"


async def test_an_attempt_cannot_leave_any_number_of_files(blobs: FolderBlobs) -> None:
    for n in range(MAX_OUTPUT_FILES + 1):  # and the file of its result
        await blobs.put_output("job_1", 1, f"f{n}", pieces(b"x"))
    with pytest.raises(FaultError) as caught:
        await blobs.put_output("job_1", 1, "one more", pieces(b"x"))
    assert code(caught) == "payload_too_large"
    await blobs.put_output("job_1", 2, "another attempt", pieces(b"x"))


async def test_delete_takes_a_jobs_files_and_no_others(blobs: FolderBlobs) -> None:
    mine, other = await blobs.put(pieces(b"x"), 9), await blobs.put(pieces(b"y"), 9)
    await blobs.put_output("job_1", 1, "a", pieces(b"x"))
    kept = await blobs.put_output("job_2", 1, "a", pieces(b"x"))
    blobs.delete("job_1", [mine.key, ABSENT])
    assert not blobs.path(mine.key).exists()
    assert await blobs.find_named("job_1", 1, "a") is None
    assert blobs.path(other.key).exists()
    assert blobs.path(kept.key).exists()


async def test_orphans_are_swept_when_they_are_old(tmp_path: Path) -> None:
    now = time.time()
    blobs = FolderBlobs(tmp_path / "blobs", now_s=lambda: now)
    used, orphan = await blobs.put(pieces(b"x"), 9), await blobs.put(pieces(b"y"), 9)
    await blobs.put_output("job_known", 1, "a", pieces(b"x"))
    await blobs.put_output("job_lost", 1, "a", pieces(b"x"))

    def sweep() -> int:
        return blobs.sweep(lambda key: key == used.key, lambda job: job == "job_known")

    assert sweep() == 0
    now += ORPHAN_S + 60
    assert sweep() == 2
    assert blobs.path(used.key).exists()
    assert not blobs.path(orphan.key).exists()
    assert await blobs.find_named("job_known", 1, "a")
    assert await blobs.find_named("job_lost", 1, "a") is None


def test_what_a_killed_coordinator_was_receiving_goes_once_it_is_not_young(tmp_path: Path) -> None:
    FolderBlobs(tmp_path / "blobs")
    for name, age_s in (("half", YOUNG_S + 60), ("young", 0)):
        (tmp_path / "blobs" / "tmp" / name).write_bytes(b"x")
        os.utime(tmp_path / "blobs" / "tmp" / name, (time.time() - age_s,) * 2)
    FolderBlobs(tmp_path / "blobs")
    assert leftovers(tmp_path) == ["young"]


async def test_where_no_lock_is_seen_by_other_machines_an_upload_under_way_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some shared folders take a lock and keep it to the machine; this machine's clock may be wrong, too."""
    blobs, begun, more = FolderBlobs(tmp_path / "blobs"), trio.Event(), trio.Event()
    monkeypatch.setattr("coordinator.blobs.drafts.fcntl.flock", lambda _fd, _how: None)

    async def slowly() -> AsyncIterator[bytes]:
        yield DATA[: 2 * 2**20]
        begun.set()
        await more.wait()
        yield DATA[2 * 2**20 :]

    stored: list[StoredBlob] = []

    async def put() -> None:
        stored.append(await blobs.put(slowly(), len(DATA), DIGEST))

    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(put)
            await begun.wait()
            await trio.to_thread.run_sync(lambda: FolderBlobs(tmp_path / "blobs", now_s=lambda: time.time() + 86_400.0))
            assert len(leftovers(tmp_path)) == 1
            more.set()
    assert [one.sha256 for one in stored] == [DIGEST]


async def test_what_another_replica_receives_stays_whatever_the_clocks_say(tmp_path: Path) -> None:
    blobs, both = FolderBlobs(tmp_path / "blobs"), tmp_path / "blobs"
    begun, more = (trio.Event(), trio.Event()), trio.Event()

    async def slowly(number: int) -> AsyncIterator[bytes]:
        yield DATA[: 2 * 2**20]
        begun[number].set()
        await more.wait()
        yield DATA[2 * 2**20 :]

    stored: list[StoredBlob] = []

    async def put() -> None:
        stored.append(await blobs.put(slowly(0), len(DATA), DIGEST))

    async def put_output() -> None:
        stored.append(await blobs.put_output("job_1", 1, "a", slowly(1), DIGEST))

    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(put)
            nursery.start_soon(put_output)
            for one in begun:
                await one.wait()
            assert leftovers(tmp_path)
            assert os.listdir(both / "parts")
            ahead = await trio.to_thread.run_sync(lambda: FolderBlobs(both, now_s=lambda: time.time() + 2 * ORPHAN_S))
            assert await trio.to_thread.run_sync(ahead.sweep, lambda _key: True, lambda _job: True) == 0
            more.set()
    assert [one.sha256 for one in stored] == [DIGEST, DIGEST]


# ---- signatures --------------------------------------------------------------------------------------------


def signature(url: str) -> tuple[str, str]:
    query = parse_qs(urlsplit(url).query)
    return query["exp"][0], query["sig"][0]


def test_a_signature_is_good_for_its_own_request_only(blobs: FolderBlobs) -> None:
    expires, good = signature(blobs.url(ABSENT, 60))
    blobs.check("GET", ABSENT, expires, good)
    upload_expires, upload = signature(blobs.upload_template("job_1", 2, 60))
    mine = f"job_1/2/{WIDEST.text()}"
    blobs.check("PUT", mine, upload_expires, upload)
    for method, scope, exp, sig in (
        ("PUT", ABSENT, expires, good),
        ("GET", ABSENT[:-1] + "1", expires, good),
        ("GET", ABSENT, str(int(expires) + 1), good),
        ("GET", ABSENT, expires, good[:-1] + ("0" if good[-1] != "0" else "1")),
        ("GET", ABSENT, expires, ""),
        ("GET", ABSENT, "", good),
        ("GET", ABSENT, "x", good),
        ("GET", ABSENT, expires, "ü"),
        ("PUT", mine.replace("/2/", "/1/"), upload_expires, upload),
        ("PUT", mine.replace("job_1", "job_2"), upload_expires, upload),
        ("PUT", mine + "0", upload_expires, upload),  # ten times as much
        ("GET", mine, upload_expires, upload),
    ):
        with pytest.raises(FaultError) as caught:
            blobs.check(method, scope, exp, sig)
        assert code(caught) == "forbidden"


def test_a_url_expires(tmp_path: Path) -> None:
    now = 1_000_000.0
    blobs = FolderBlobs(tmp_path / "blobs", now_s=lambda: now)
    expires, good = signature(blobs.url(ABSENT, 60))
    now += 60
    blobs.check("GET", ABSENT, expires, good)
    now += 1
    with pytest.raises(FaultError, match="expired"):
        blobs.check("GET", ABSENT, expires, good)


def test_the_secret_is_private_survives_and_differs(tmp_path: Path) -> None:
    first = FolderBlobs(tmp_path / "a")
    expires, good = signature(first.url(ABSENT, 60))
    assert stat.S_IMODE((tmp_path / "a" / "secret").stat().st_mode) == 0o600
    FolderBlobs(tmp_path / "a").check("GET", ABSENT, expires, good)
    with pytest.raises(FaultError):
        FolderBlobs(tmp_path / "b").check("GET", ABSENT, expires, good)
    (tmp_path / "a" / "secret").write_bytes(b"short")
    with pytest.raises(ValueError, match="fewer than 32 bytes"):
        FolderBlobs(tmp_path / "a")
