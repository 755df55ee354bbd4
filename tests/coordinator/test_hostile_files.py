"""Files of workers and clients as attacks: what they are served as, what names and sizes do, who may have them."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest
import trio
from starlette.applications import Starlette
from starlette.testclient import TestClient

from coordinator.blobs.answers import part_of
from coordinator.blobs.drafts import WRITE_BYTES
from coordinator.blobs.folder import FolderBlobs
from coordinator.blobs.routes import blob_routes
from coordinator.testing import OfferedJob, Running
from coordinator.testing_link import pieces
from protocol.faults import FaultError
from protocol.work import FreeResult

HTML = b"<!doctype html><script>alert(1)</script>"
POLYGLOTS = {
    "page.html": (HTML, "text/html"),
    "picture.svg": (b'<svg xmlns="http://www.w3.org/2000/svg" onload="alert(1)"/>', "image/svg+xml"),
    "gif.js": (b"GIF89a/*" + HTML + b"*/=1;alert(1)//", "image/gif"),
    "png.html": (b"\x89PNG\r\n\x1a\n" + HTML, "image/png"),
    "feed.xml": (b'<?xml version="1.0"?><x xmlns="http://www.w3.org/1999/xhtml"/>', "application/xhtml+xml"),
    "doc.pdf": (b"%PDF-1.7 /JS (app.alert(1))", "application/pdf"),
    "odd": (HTML, "text/html\r\nx-injected: 1"),
    'a";filename="b.exe': (HTML, "text/html; charset=x\x00"),
}
INERT = {"x-content-type-options": "nosniff", "content-security-policy": "default-src 'none'; sandbox"}


@pytest.fixture
def blobs(tmp_path: Path) -> FolderBlobs:
    return FolderBlobs(tmp_path / "blobs", max_output_bytes=4 * WRITE_BYTES)


@pytest.fixture
def client(blobs: FolderBlobs) -> Iterator[TestClient]:
    with TestClient(Starlette(routes=blob_routes(blobs))) as client:
        yield client


def left(tmp_path: Path) -> list[Path]:
    return [path for path in (tmp_path / "blobs").rglob("*") if path.is_file() and path.name != "secret"]


# ---- what they are served as --------------------------------------------------------------------------------


def inert(answer: httpx.Response) -> None:
    """No browser renders it, guesses its type, or runs what is in it."""
    assert answer.status_code in (200, 206)
    for name, value in INERT.items():
        assert answer.headers[name] == value
    assert answer.headers["content-disposition"].startswith("attachment; filename*=utf-8''")
    assert "x-injected" not in answer.headers


def test_whatever_a_worker_left_is_never_a_page_of_ours(http: httpx.Client, served: Running, serve: Any) -> None:
    def script(job: OfferedJob) -> None:
        job.started()
        for name, (data, mime) in POLYGLOTS.items():
            job.upload(name, data, mime)
        job.complete(FreeResult())

    serve(script, "hostile", "x-hostile")
    job = http.post("/v1/jobs", json={"kind": "x-hostile", "model": "hostile", "wait": 30}).json()
    assert len(job["files"]) == len(POLYGLOTS)
    for file in job["files"]:
        answer = http.get(file["url"])
        inert(answer)
        assert answer.content == POLYGLOTS[file["name"]][0]
        assert answer.headers["content-type"] in ("application/octet-stream", "image/gif", "image/png")
        signed = served.coordinator.parts.blobs.client_url(f"{job['id']}/1/{file['sha256']}-{file['name']}", 60)
        inert(httpx.get(served.url + signed))


def test_what_a_client_uploaded_is_inert_too(http: httpx.Client) -> None:
    for name, (data, mime) in POLYGLOTS.items():
        file = http.post(
            "/v1/files", data={"purpose": "user_data"}, files={"file": (name, data, mime.split("\r")[0].strip("\x00"))}
        ).json()
        inert(http.get(f"/v1/files/{file['id']}/content"))


# ---- sizes, names, URLs -------------------------------------------------------------------------------------


def test_a_huge_declared_size_is_refused_before_a_byte_is_read(blobs: FolderBlobs, tmp_path: Path) -> None:
    read = []

    async def receive() -> dict[str, Any]:
        read.append(True)
        return {"type": "http.request", "body": b"x", "more_body": True}

    app = Starlette(routes=blob_routes(blobs))
    url = blobs.upload_template("job_1", 1, 60).replace("{name}", "a")
    path, _, query = url.partition("?")
    for length in (b"99999999999999999999", b"-1", b"1e9", str(blobs.max_output_bytes + 1).encode()):
        sent: list[Any] = []

        async def send(message: Any) -> None:
            sent.append(message)  # noqa: B023

        scope = {
            "type": "http",
            "method": "PUT",
            "path": path,
            "raw_path": path.encode(),
            "query_string": query.encode(),
            "headers": [(b"content-length", length)],
        }
        asyncio.run(app(scope, receive, send))
        assert sent[0]["status"] == 413, length
    assert read == []
    assert left(tmp_path) == []


@pytest.mark.parametrize(
    "name", ["..", "%2e%2e", "a%00b", "a%0ab", "%2fetc%2fpasswd", "..%5c..%5cx", "x" * 151, "%ff%fe", "CON%2e%2e%2f"]
)
def test_no_name_leads_anywhere(client: TestClient, blobs: FolderBlobs, tmp_path: Path, name: str) -> None:
    answer = client.put(blobs.upload_template("job_1", 1, 60).replace("{name}", name), content=b"x")
    inside = tmp_path / "blobs" / "out" / "job_1" / "1"
    assert answer.status_code in (201, 400, 403, 404, 405)
    assert all(path.parent == inside for path in left(tmp_path))
    assert [path for path in tmp_path.iterdir() if path.name != "blobs"] == []


def test_a_url_of_one_job_opens_no_other(client: TestClient, blobs: FolderBlobs) -> None:
    mine = client.put(blobs.upload_template("job_1", 1, 60).replace("{name}", "a"), content=b"x").json()["key"]
    theirs = client.put(blobs.upload_template("job_2", 1, 60).replace("{name}", "a"), content=b"x").json()["key"]
    query = blobs.client_url(mine, 60).partition("?")[2]
    upload = blobs.upload_template("job_1", 1, 60).partition("?")[2]
    expired = blobs.client_url(mine, -1).partition("?")[2]
    for method, url in (
        ("GET", f"/v1/blobs/{theirs}?{query}"),
        ("GET", f"/v1/blobs/{mine}?{upload}"),
        ("GET", f"/v1/blobs/{mine}?{expired}"),
        ("PUT", f"/v1/blobs/job_2/1/a?{upload}"),
        ("PUT", f"/v1/blobs/job_1/2/a?{upload}"),
        ("GET", f"/v1/blobs/job_2/1/a/received?{upload}"),
        ("GET", f"/v1/blobs/job_2/1/a/place?{upload}"),
        ("PUT", f"/v1/blobs/job_1/1/a?{query}"),
    ):
        assert client.request(method, url, content=b"y" if method == "PUT" else None).status_code == 403, url
    assert client.get(f"/v1/blobs/{mine}?{query}").content == b"x"


# ---- ranges -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("header", "status", "content"),
    [
        ("bytes=0-0", 206, b"0"),
        ("bytes=8-", 206, b"89"),
        ("bytes=-3", 206, b"789"),
        ("bytes=-99", 206, b"0123456789"),
        ("bytes=2-99999999999999999", 206, b"23456789"),
        ("bytes=10-", 416, b""),
        ("bytes=-0", 416, b""),
        ("bytes=5-2", 200, b"0123456789"),
        ("bytes=-", 200, b"0123456789"),
        ("bytes=" + "0-0," * 2000 + "0-0", 200, b"0123456789"),
        ("bytes=0-" + "9" * 400, 200, b"0123456789"),
        ("lines=0-1", 200, b"0123456789"),
        ("bytes=\u00b2-", 200, b"0123456789"),
    ],
)
def test_no_range_asks_for_more_than_the_file(
    client: TestClient, blobs: FolderBlobs, header: str, status: int, content: bytes
) -> None:
    stored = anyio.run(blobs.put, pieces(b"0123456789"), 100)
    answer = client.get(blobs.client_url(stored.key, 60), headers={"range": header.encode("latin-1")})
    assert (answer.status_code, answer.content) == (status, content)
    assert int(answer.headers["content-length"]) == len(content)
    stale = {"range": header.encode("latin-1"), "if-range": '"another"'}
    assert client.get(blobs.client_url(stored.key, 60), headers=stale).content == b"0123456789"


def test_an_empty_file_has_no_parts(client: TestClient, blobs: FolderBlobs) -> None:
    stored = anyio.run(blobs.put, pieces(b""), 100)
    answer = client.get(blobs.client_url(stored.key, 60), headers={"range": "bytes=0-"})
    assert (answer.status_code, answer.content) == (200, b"")
    assert part_of("bytes=0-", 0) == (0, 0)


# ---- two at once, slow ones, full disks ---------------------------------------------------------------------


async def test_of_two_uploads_of_one_file_the_later_lives_and_none_mixes(blobs: FolderBlobs, tmp_path: Path) -> None:
    data = os.urandom(3 * WRITE_BYTES)
    digest = hashlib.sha256(data).hexdigest()
    begun, ended = trio.Event(), []

    async def slow() -> Any:
        yield data[: 2 * WRITE_BYTES]
        begun.set()
        await trio.sleep_forever()

    async def first() -> None:
        with pytest.raises(FaultError, match="newer connection"):
            await blobs.put_output("job_1", 1, "a", slow(), digest)
        ended.append("first")

    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(first)
            await begun.wait()
            stored = await blobs.put_output("job_1", 1, "a", pieces(data), digest)
    assert ended == ["first"]
    assert await blobs.read(stored.key, len(data)) == data
    assert [path.name for path in left(tmp_path)] == [f"{digest}-a"]


async def test_many_at_once_under_one_name_are_each_whole(blobs: FolderBlobs) -> None:
    contents = [os.urandom(WRITE_BYTES + n) for n in range(6)]
    keys: dict[int, str] = {}

    async def one(n: int) -> None:
        keys[n] = (await blobs.put_output("job_1", 1, "same", pieces(contents[n]))).key

    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            for n in range(6):
                nursery.start_soon(one, n)
    for n, data in enumerate(contents):
        assert await blobs.read(keys[n], len(data)) == data


async def test_a_disk_that_fills_in_the_middle_of_a_part_leaves_room_again(
    blobs: FolderBlobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = os.urandom(3 * WRITE_BYTES)
    digest = hashlib.sha256(data).hexdigest()
    write, room = os.write, [WRITE_BYTES + 100]

    def short(fd: int, view: Any) -> int:
        if not room[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        count = write(fd, view[: room[0]])
        room[0] -= count
        return count

    monkeypatch.setattr("coordinator.blobs.drafts.os.write", short)
    with pytest.raises(FaultError) as caught:
        await blobs.put_output("job_1", 1, "a", pieces(data), digest)
    assert (caught.value.fault.code, caught.value.fault.http_status) == ("storage_full", 507)
    assert left(tmp_path) == [], "a part on a full disk helps nobody"
    assert await blobs.received("job_1", 1, digest) == 0
    room[0] = 2**40
    assert (await blobs.put_output("job_1", 1, "a", pieces(data), digest)).size == len(data)


async def test_a_disk_that_is_full_when_the_name_is_made_leaves_nothing(
    blobs: FolderBlobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_self: Path, **_more: Any) -> None:
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    monkeypatch.setattr("coordinator.blobs.drafts.Path.mkdir", full)
    with pytest.raises(FaultError) as caught:
        await blobs.put_output("job_1", 1, "a", pieces(b"x" * WRITE_BYTES))
    assert caught.value.fault.code == "storage_full"
    assert left(tmp_path) == []


def test_a_client_that_stops_reading_holds_one_piece_and_no_lock(blobs: FolderBlobs) -> None:
    """Its answer waits in `send`; the file can be deleted and read by others meanwhile."""
    stored = anyio.run(blobs.put, pieces(os.urandom(3 * WRITE_BYTES)), 4 * WRITE_BYTES)
    url = blobs.client_url(stored.key, 60)
    path, _, query = url.partition("?")
    sent: list[int] = []
    loops: list[asyncio.AbstractEventLoop] = []

    async def main() -> None:
        stuck = asyncio.Event()
        loops.append(asyncio.get_running_loop())

        async def receive() -> dict[str, Any]:
            await asyncio.sleep(3600)
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            if message["type"] == "http.response.body":
                sent.append(len(message.get("body", b"")))
                stuck.set()
                await asyncio.sleep(3600)

        scope = {
            "type": "http",
            "method": "GET",
            "path": path,
            "raw_path": path.encode(),
            "query_string": query.encode(),
            "headers": [],
        }
        task = asyncio.ensure_future(Starlette(routes=blob_routes(blobs))(scope, receive, send))
        await asyncio.wait_for(stuck.wait(), 60)
        blobs.delete("", [stored.key])
        task.cancel()
        await asyncio.wait([task], timeout=60)
        assert task.done()

    before = set(threading.enumerate())
    asyncio.run(main())
    assert len(sent) == 1
    assert sent[0] <= 2**18
    for thread in set(threading.enumerate()) - before:  # the loop's own, which end behind it
        if getattr(thread, "loop", None) in loops:
            thread.join(60)
            assert not thread.is_alive()
    assert blobs.size(stored.key) is None
