"""Blobs: one contract on a folder and on S3; and what only S3 has: places, claims, presigned URLs, refusals."""

from __future__ import annotations

import hashlib
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import httpx
import pytest
from anyio import to_thread

from coordinator.blobs.base import ORPHAN_S, Blobs
from coordinator.blobs.bounds import NONE, Bounds
from coordinator.blobs.opening import BlobsConfig, BlobsRefusal, open_blobs
from coordinator.testing_link import pieces
from protocol.faults import FaultError
from protocol.link_wire import RESULT_FILE

pytest.importorskip("obstore", reason="the extra s3 is not installed")
pytest.importorskip("moto", reason="moto, the S3 server of these tests, is not installed")

if TYPE_CHECKING:
    from tests.coordinator.s3_rig import S3Rig

DATA = random.Random(1).randbytes(3 * 2**20 + 17)
DIGEST = hashlib.sha256(DATA).hexdigest()
ABSENT = "blob_" + "0" * 26
ODD = "a b?%2e#ü+&=*.png"
Make = Callable[..., Blobs]
TWO = Bounds(2, 3 * 2**20, 4 * 2**20)


def config(rig: S3Rig, tmp_path: Path, **more: Any) -> BlobsConfig:
    return BlobsConfig(**{"url": f"s3://files/pre/{tmp_path.name}", "endpoint": rig.endpoint, **more})


@pytest.fixture
def s3(rig: S3Rig, keys: None, tmp_path: Path) -> Blobs:
    return open_blobs(config(rig, tmp_path), tmp_path / "state")


def code(caught: pytest.ExceptionInfo[FaultError]) -> str:
    return caught.value.fault.code


# ---- the contract ------------------------------------------------------------------------------------------


async def test_what_is_put_is_what_is_read_whole_and_in_parts(make: Make) -> None:
    blobs = make()
    stored = await blobs.put(pieces(DATA), len(DATA), DIGEST)
    assert (stored.size, stored.sha256, blobs.size(stored.key)) == (len(DATA), DIGEST, len(DATA))
    assert await make().read(stored.key, len(DATA)) == DATA
    async with await blobs.open(stored.key) as file:
        await file.seek(2**20 - 5)
        assert await file.read(10) == DATA[2**20 - 5 : 2**20 + 5]
        await file.seek(len(DATA) - 3)
        assert await file.read(10) == DATA[-3:]
    with pytest.raises(FaultError) as caught:
        await blobs.read(stored.key, len(DATA) - 1)
    assert code(caught) == "payload_too_large"
    empty = await blobs.put(pieces(b""), 0)
    assert await blobs.read(empty.key, 0) == b""


async def test_lines_are_read_from_anywhere(make: Make) -> None:
    blobs = make()
    stored = await blobs.put(pieces(b"first\nsecond\nthird"), 100)
    with blobs.reader(stored.key) as file:
        file.seek(6)
        assert file.readline() == b"second\n"
        assert file.tell() == 13
        assert file.readline() == b"third"
        assert file.readline() == b""


@pytest.mark.parametrize(
    ("limit", "expected", "fault"), [(len(DATA) - 1, "", "payload_too_large"), (2**30, "0" * 64, "upload_failed")]
)
async def test_a_refused_file_leaves_nothing(make: Make, tmp_path: Path, limit: int, expected: str, fault: str) -> None:
    blobs = make()
    with pytest.raises(FaultError) as caught:
        await blobs.put(pieces(DATA), limit, expected)
    assert code(caught) == fault
    assert [path for path in tmp_path.rglob("*") if path.is_file() and path.name != "secret"] == []


@pytest.mark.parametrize("key", ["", "secret", "../secret", "blob_../../secret", f"job/1/{DIGEST}-a/b", ABSENT + "\n"])
async def test_no_key_leads_elsewhere(make: Make, key: str) -> None:
    blobs = make()
    for call in (blobs.size, blobs.reader):
        with pytest.raises(FaultError) as caught:
            call(key)
        assert code(caught) == "not_found"


async def test_outputs_are_found_by_size_and_digest_under_any_name(make: Make) -> None:
    blobs = make()
    stored = await blobs.put_output("job_1", 2, ODD, pieces(b"abc"))
    digest = hashlib.sha256(b"abc").hexdigest()
    assert stored.key == f"job_1/2/{digest}-{ODD}"
    assert await blobs.find_output("job_1", 2, ODD, 3, digest) == stored.key
    for wrong in (
        ("job_1", 2, ODD, 4, digest),
        ("job_1", 2, ODD, 3, "0" * 64),
        ("job_1", 1, ODD, 3, digest),
        ("job_10", 2, ODD, 3, digest),
        ("job_1", 2, "b.png", 3, digest),
    ):
        assert await blobs.find_output(*wrong) is None, wrong
    assert await blobs.find_named("job_1", 2, ODD) == stored.key
    assert await blobs.find_named("job_1", 2, "other") is None
    assert await blobs.find_named("job_1", 20, ODD) is None
    assert await blobs.read(stored.key, 3) == b"abc"


async def test_delete_takes_a_jobs_files_and_no_others(make: Make) -> None:
    blobs = make()
    mine, other = await blobs.put(pieces(b"x"), 9), await blobs.put(pieces(b"y"), 9)
    gone = [await blobs.put_output("job_1", n, ODD, pieces(b"x")) for n in (1, 2)]
    kept = await blobs.put_output("job_10", 1, "a", pieces(b"x"))
    blobs.delete("job_1", [mine.key, ABSENT])
    assert [blobs.size(one.key) for one in (mine, *gone)] == [None] * 3
    assert [blobs.size(one.key) for one in (other, kept)] == [1, 1]
    with pytest.raises(FaultError) as caught:
        blobs.reader(mine.key)
    assert code(caught) == "not_found"


async def test_orphans_are_swept_when_they_are_old(make: Make) -> None:
    first = make()
    used, orphan = await first.put(pieces(b"x"), 9), await first.put(pieces(b"y"), 9)
    known = await first.put_output("job_known", 1, "a", pieces(b"x"))
    lost = await first.put_output("job_lost", 1, "a", pieces(b"x"))

    def sweep(blobs: Blobs) -> int:
        return blobs.sweep(lambda key: key == used.key, lambda job: job == "job_known")

    assert sweep(first) == 0
    later = make(now_s=lambda: time.time() + ORPHAN_S + 60)
    assert sweep(later) == 2
    assert [later.size(one.key) for one in (used, orphan, known, lost)] == [1, None, 1, None]


async def test_replicas_share_the_secret_and_one_has_no_way_into_anothers_parts(make: Make) -> None:
    one, two = make(), make()
    expires, signature = (part.partition("=")[2] for part in urlsplit(one.client_url(ABSENT, 60)).query.split("&"))
    two.check("GET", ABSENT, expires, signature)
    broken = iter([DATA[: 2 * 2**20]])

    async def data() -> Any:
        for piece in broken:
            yield piece
        assert await two.received("job_1", 1, DIGEST) == 0, "it is being written by another replica"
        stored = await two.put_output("job_1", 1, "a", pieces(DATA), DIGEST)
        assert stored.size == len(DATA)
        raise ConnectionResetError

    with pytest.raises(ConnectionResetError):
        await one.put_output("job_1", 1, "a", data(), DIGEST)
    assert await one.read(f"job_1/1/{DIGEST}-a", len(DATA)) == DATA


# ---- S3 alone ----------------------------------------------------------------------------------------------


async def asked(method: str, url: str, content: bytes = b"") -> httpx.Response:
    return await to_thread.run_sync(lambda: httpx.request(method, url, content=content))


async def placed(blobs: Blobs, data: bytes, name: str = ODD, sha256: str = "") -> tuple[str, str]:
    sha256 = sha256 or hashlib.sha256(data).hexdigest()
    url = await blobs.place("job_1", 1, name, sha256)
    assert (await asked("PUT", url, data)).status_code == 200
    return url, sha256


async def test_an_output_goes_past_us_and_is_taken_over_byte_for_byte(s3: Blobs) -> None:
    assert s3.upload_template("job_1", 1, 60).endswith("&direct=1")
    url, sha256 = await placed(s3, DATA)
    assert await s3.find_output("job_1", 1, ODD, len(DATA), sha256) is None, "nobody has looked at it"
    stored = await s3.claim("job_1", 1, ODD, len(DATA), sha256)
    assert await s3.claim("job_1", 1, ODD, len(DATA), sha256) == stored, "asked twice, as the answer was lost"
    assert await s3.find_output("job_1", 1, ODD, len(DATA), sha256) == stored.key
    assert (await asked("PUT", url, b"other bytes, by the same URL")).status_code == 200
    assert await s3.claim("job_1", 1, ODD, len(DATA), sha256) == stored
    assert await s3.read(stored.key, len(DATA)) == DATA
    assert (await asked("GET", s3.url(stored.key, 60))).content == DATA


@pytest.mark.parametrize("wrong", ["bytes", "size", "absent", "huge"])
async def test_what_is_not_as_declared_is_refused_and_deleted(s3: Blobs, wrong: str) -> None:
    data, size = b"x" * 1000, 1000
    sha256 = hashlib.sha256(data).hexdigest()
    if wrong == "bytes":
        await placed(s3, b"y" * 1000, sha256=sha256)
    elif wrong == "size":
        await placed(s3, data, sha256=sha256)
        size = 999
    elif wrong == "huge":
        s3.max_output_bytes = 999
        await placed(s3, data)
    with pytest.raises(FaultError) as caught:
        await s3.claim("job_1", 1, ODD, size, sha256)
    assert code(caught) == ("payload_too_large" if wrong == "huge" else "upload_failed")
    assert [name for name, _ in s3._listed("") if name != "secret"] == []  # type: ignore[attr-defined]


async def test_a_url_is_good_for_its_own_file_method_and_time(s3: Blobs, rig: S3Rig) -> None:
    url, sha256 = await placed(s3, b"mine")
    other = "1" if sha256[0] != "1" else "2"
    good = url.rpartition("X-Amz-Signature=")
    forged = good[0] + good[1] + ("0" if good[2][0] != "0" else "1") + good[2][1:]
    stale = s3._presigned("PUT", "up/x", 1).replace("X-Amz-Expires=1", "X-Amz-Expires=9999")  # type: ignore[attr-defined]
    for method, bad in (
        ("PUT", forged),
        ("GET", url),
        ("PUT", url.replace(sha256, other + sha256[1:])),
        ("PUT", url.replace("/job_1/1/", "/job_1/2/")),
        ("PUT", url.replace("/job_1/", "/job_2/")),
        ("PUT", url.replace("/up/", "/out/")),
        ("PUT", stale),
        ("PUT", url.partition("?")[0]),
    ):
        assert (await asked(method, bad, b"x" if method == "PUT" else b"")).status_code == 403, bad
    assert set(rig.refused) <= {"SignatureDoesNotMatch", "AccessDenied"}


async def test_what_is_on_its_way_past_us_counts_and_goes_with_its_attempt(s3: Blobs) -> None:
    assert "direct=1" not in s3.upload_template("job_1", 1, 60, NONE)
    assert await s3.place("job_1", 1, RESULT_FILE, DIGEST, TWO) == ""
    await placed(s3, b"one", "one")
    for name in ("two", "three"):
        assert await s3.place("job_1", 1, name, DIGEST, TWO)
    with pytest.raises(FaultError, match="at most 2 output files") as caught:
        await s3.place("job_1", 1, "four", DIGEST, TWO)
    assert code(caught) == "payload_too_large"
    assert s3.left_lately(3600.0) == {("job_1", 1): {""}}
    s3.tidy("job_1", 1, ())
    assert [name for name, _ in s3._listed("") if name != "secret"] == []  # type: ignore[attr-defined]
    assert s3.lasting_s > 900.0, "until then a URL may be used once more"


async def test_what_workers_left_undeclared_is_swept(s3: Blobs) -> None:
    await placed(s3, b"undeclared")
    assert s3.sweep(lambda _key: True, lambda _job: True) == 0
    s3._now_s = lambda: time.time() + 6 * 3600 + 60
    assert s3.sweep(lambda _key: True, lambda _job: True) == 1
    await placed(s3, b"of a job that is deleted")
    s3.delete("job_1")
    assert [name for name, _ in s3._listed("") if name != "secret"] == []  # type: ignore[attr-defined]


# ---- refusals at the start ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "env", "words"),
    [
        ({"url": "s3://nobody-has-this/x"}, {}, r"NoSuchBucket. Make the bucket, or correct blobs\.url"),
        ({}, {"AWS_ACCESS_KEY_ID": "AKIDOTHER"}, "InvalidAccessKeyId. Correct AWS_ACCESS_KEY_ID"),
        ({}, {"AWS_SECRET_ACCESS_KEY": "not-it"}, "SignatureDoesNotMatch. Correct AWS_SECRET_ACCESS_KEY"),
        ({"region": "eu-west-9"}, {}, "SignatureDoesNotMatch"),
        ({"url": "s3://"}, {}, "Expected s3://BUCKET"),
        ({"url": "s3://me:hush-hush@files"}, {}, "no credentials in it"),
        ({"url": "gs://files"}, {}, r"blobs\.url: Expected s3://"),
        ({"url": ""}, {}, r"blobs\.url: Expected s3://"),
        ({"endpoint": "files.example.org"}, {}, r"blobs\.endpoint: Expected https://HOST"),
        ({"credentials": "/nowhere/keys"}, {}, "cannot be read: No such file"),
    ],
)
def test_a_store_that_cannot_be_used_is_refused_with_the_cure(
    rig: S3Rig, keys: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: Any, env: Any, words: str
) -> None:
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(BlobsRefusal, match=words) as caught:
        open_blobs(config(rig, tmp_path, **more), tmp_path / "state")
    assert "hush-hush" not in str(caught.value)
    assert "the/secret" not in str(caught.value)
    assert "not-it" not in str(caught.value)


def test_credentials_come_from_a_file(rig: S3Rig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.coordinator.s3_rig import ID, SECRET

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "wrong")
    file = tmp_path / "keys"
    file.write_text(f"[default]\naws_access_key_id = {ID}\naws_secret_access_key = {SECRET}\n")
    open_blobs(config(rig, tmp_path, credentials=str(file)), tmp_path / "state")
    file.write_text("hush-hush")
    with pytest.raises(BlobsRefusal, match="no file with a section") as caught:
        open_blobs(config(rig, tmp_path, credentials=str(file)), tmp_path / "state")
    assert "hush-hush" not in str(caught.value)


async def test_trouble_later_is_a_fault_without_urls_and_keys(
    s3: Blobs, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, rig: S3Rig
) -> None:
    stored = await s3.put(pieces(b"x"), 9)
    monkeypatch.setattr("tests.coordinator.s3_rig.SECRET", "changed")
    with pytest.raises(FaultError) as caught:
        s3.size(stored.key)
    assert code(caught) == "overloaded"
    assert "SignatureDoesNotMatch" in caplog.text or "trouble" in caplog.text
    assert "AKIDTEST" not in caplog.text
    assert rig.endpoint not in caplog.text
