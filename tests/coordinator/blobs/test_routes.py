"""`/v1/blobs` over HTTP."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import anyio
import pytest
from starlette.applications import Starlette
from starlette.testclient import TestClient

from coordinator.blobs.bounds import NONE
from coordinator.blobs.folder import FolderBlobs
from coordinator.blobs.routes import blob_routes
from coordinator.testing_link import pieces


async def admit(job: str, attempt: int) -> bool:
    return (job, attempt) != ("job_over", 1)


@pytest.fixture
def blobs(tmp_path: Path) -> FolderBlobs:
    return FolderBlobs(tmp_path / "blobs", max_output_bytes=1000)


@pytest.fixture
def client(blobs: FolderBlobs) -> Iterator[TestClient]:
    with TestClient(Starlette(routes=blob_routes(blobs, admit))) as client:
        yield client


def template(blobs: FolderBlobs, name: str, job: str = "job_1", ttl_s: float = 60) -> str:
    return blobs.upload_template(job, 1, ttl_s).replace("{name}", quote(name, safe=""))


def test_an_upload_is_stored_and_comes_back(client: TestClient, blobs: FolderBlobs) -> None:
    digest = hashlib.sha256(b"hello").hexdigest()
    answer = client.put(template(blobs, "a b.txt"), content=b"hello", headers={"X-Content-SHA256": digest.upper()})
    assert answer.status_code == 201
    assert answer.json() == {"key": f"job_1/1/{digest}-a b.txt", "size": 5, "sha256": digest}
    got = client.get(blobs.url(answer.json()["key"], 60))
    assert (got.status_code, got.content) == (200, b"hello")
    assert got.headers["x-content-type-options"] == "nosniff"
    assert got.headers["content-disposition"].startswith("attachment")
    assert "sandbox" in got.headers["content-security-policy"]


def test_names_may_hold_what_means_something_in_a_url(client: TestClient, blobs: FolderBlobs) -> None:
    name = "a?b#c ü&d=e+.txt"
    answer = client.put(template(blobs, name), content=b"hello")
    assert answer.json()["key"].endswith("-" + name)
    assert client.get(blobs.url(answer.json()["key"], 60)).content == b"hello"


def test_ranges_and_head_work_for_resumed_downloads(client: TestClient, blobs: FolderBlobs) -> None:
    stored = anyio.run(blobs.put, pieces(b"0123456789"), 100)
    url = blobs.url(stored.key, 60)
    part = client.get(url, headers={"Range": "bytes=4-"})
    assert (part.status_code, part.content) == (206, b"456789")
    head = client.head(url)
    assert (head.status_code, head.headers["content-length"]) == (200, "10")


@pytest.mark.parametrize(
    ("change", "status", "fault"),
    [
        ({"headers": {"X-Content-SHA256": "0" * 64}}, 502, "upload_failed"),
        ({"content": b"x" * 1001}, 413, "payload_too_large"),
        ({"content": iter([b"x" * 600, b"x" * 600])}, 413, "payload_too_large"),
        ({"name": "a\\b"}, 400, "invalid_request"),
        ({"job": "job_over"}, 409, "conflict"),
        ({"ttl_s": -10}, 403, "forbidden"),
    ],
)
def test_bad_uploads_are_refused_and_leave_nothing(
    client: TestClient, blobs: FolderBlobs, tmp_path: Path, change: dict[str, object], status: int, fault: str
) -> None:
    url = template(blobs, str(change.pop("name", "a")), str(change.pop("job", "job_1")), float(change.pop("ttl_s", 60)))  # type: ignore[arg-type]
    answer = client.put(url, **{"content": b"hello", **change})  # type: ignore[arg-type]
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, fault)
    assert [path for path in (tmp_path / "blobs").rglob("*") if path.is_file() and path.name != "secret"] == []


def test_a_slash_in_the_name_leads_nowhere(client: TestClient, blobs: FolderBlobs, tmp_path: Path) -> None:
    for name in ("../../../escaped", "%2e%2e%2fescaped", "..%2f..%2fescaped"):
        answer = client.put(blobs.upload_template("job_1", 1, 60).replace("{name}", name), content=b"x")
        assert answer.status_code in (400, 403, 404, 405), name
    assert [path for path in tmp_path.rglob("*escaped*")] == []


def test_a_url_from_before_it_told_what_may_be_left_is_as_good_as_it_was(
    client: TestClient, blobs: FolderBlobs
) -> None:
    """An attempt outlives the upgrade of its coordinator."""
    path, old = "/v1/blobs/job_1/1/a", blobs._signed("PUT", "job_1/1/", 60)
    assert client.put(f"{path}?{old}", content=b"hello").status_code == 201
    assert client.get(f"{path}/received?{old}", headers={"X-Content-SHA256": "0" * 64}).status_code == 200
    new = template(blobs, "a").partition("?")[2]
    bare = new.partition("&")[2]
    assert new.startswith("max=")
    assert not bare.startswith("max=")
    assert client.put(f"{path}?{bare}", content=b"hello").status_code == 403
    assert client.put(f"{path}?max={NONE.text()}&{old}", content=b"hello").status_code == 403


def test_without_a_signature_nothing_is_said(client: TestClient, blobs: FolderBlobs) -> None:
    stored = anyio.run(blobs.put, pieces(b"secret words"), 100)
    for answer in (
        client.get(f"/v1/blobs/{stored.key}"),
        client.get("/v1/blobs/secret"),
        client.get("/v1/blobs/..%2fsecret"),
        client.put("/v1/blobs/job_1/1/a", content=b"x"),
    ):
        assert answer.status_code == 403
        assert b"secret words" not in answer.content


def test_a_deleted_file_is_not_found(client: TestClient, blobs: FolderBlobs) -> None:
    stored = anyio.run(blobs.put, pieces(b"x"), 100)
    blobs.delete("job_1", [stored.key])
    answer = client.get(blobs.url(stored.key, 60))
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")


def test_the_rest_of_a_file_is_taken_only_where_it_belongs(
    client: TestClient, blobs: FolderBlobs, tmp_path: Path
) -> None:
    digest = hashlib.sha256(b"hello world").hexdigest()
    part = tmp_path / "blobs" / "parts" / f"job_1.1.{digest}"
    part.write_bytes(b"hello ")
    headers = {"X-Content-SHA256": digest}
    path, _, query = template(blobs, "a.txt").partition("?")
    told = client.get(f"{path}/received?{query}", headers=headers)
    assert (told.status_code, told.headers["upload-offset"]) == (200, "6")
    assert client.get(f"{path}/received?{query}", headers={"X-Content-SHA256": "x"}).status_code == 400
    assert client.get(f"{path}/received?exp=1&sig=2", headers=headers).status_code == 403
    for wrong, status in (("bytes 5-10/11", 409), ("bytes 6-9/11", 400), ("words", 400)):
        answer = client.put(f"{path}?{query}", content=b"world", headers={**headers, "Content-Range": wrong})
        assert answer.status_code == status
        if not part.exists():  # fewer bytes than a kept part is worth
            part.write_bytes(b"hello ")
    answer = client.put(f"{path}?{query}", content=b"world", headers={**headers, "Content-Range": "bytes 6-10/11"})
    assert (answer.status_code, answer.json()["size"]) == (201, 11)
    assert client.get(blobs.url(answer.json()["key"], 60)).content == b"hello world"
    assert list(part.parent.iterdir()) == []


def test_parts_go_with_their_job_and_with_time(blobs: FolderBlobs, tmp_path: Path) -> None:
    parts = tmp_path / "blobs" / "parts"
    for job in ("job_1", "job_10", "job_2"):
        (parts / f"{job}.1.{'a' * 64}").write_bytes(b"x")
    blobs.delete("job_1")
    assert sorted(part.name[:6] for part in parts.iterdir()) == ["job_10", "job_2."]
    assert blobs.sweep(lambda _key: True, lambda _job: True) == 0
    for part in parts.iterdir():
        os.utime(part, (1, 1))
    assert blobs.sweep(lambda _key: True, lambda _job: True) == 2


def test_an_upload_that_stalls_is_ended_and_what_came_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coordinator.blobs.routes.IDLE_S", 0.05)
    blobs, data = FolderBlobs(tmp_path / "blobs"), os.urandom(2**21)
    digest = hashlib.sha256(data).hexdigest()
    path, _, query = template(blobs, "a").partition("?")
    sent: list[Any] = []
    given = [data[: 2**20]]

    async def receive() -> Any:
        if given:
            return {"type": "http.request", "body": given.pop(), "more_body": True}
        await anyio.sleep_forever()

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "method": "PUT",
        "path": path,
        "raw_path": path.encode(),
        "query_string": query.encode(),
        "headers": [(b"content-length", b"%d" % len(data)), (b"x-content-sha256", digest.encode())],
    }

    async def main() -> None:
        with anyio.fail_after(60):
            await Starlette(routes=blob_routes(blobs))(scope, receive, send)
        assert await blobs.received("job_1", 1, digest) == 2**20

    anyio.run(main)
    assert sent[0]["status"] == 502, "worth another try"


@pytest.mark.parametrize("digits", [11, 20, 5000])
def test_a_number_that_is_no_attempt_has_no_address(client: TestClient, digits: int) -> None:
    for method, path in (("PUT", "out"), ("GET", "out/place"), ("GET", "out/received")):
        assert client.request(method, f"/v1/blobs/job_1/{'9' * digits}/{path}").status_code in (403, 404, 405)
