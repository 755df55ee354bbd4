"""Resumed downloads over real HTTP with cut connections."""

from __future__ import annotations

import collections
import datetime
import email.utils
import errno
import hashlib
import os
import subprocess
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest

from supervisor import pull_fetch
from supervisor.pull_fetch import FetchFailed, Remote, client, fetch, is_loopback, need_space

BODY = os.urandom(300_000)
DIGEST = hashlib.sha256(BODY).hexdigest()
PATH = "/model.gguf"


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(pull_fetch, "FIRST_WAIT_S", 0.001)
    monkeypatch.setattr(pull_fetch, "LONGEST_WAIT_S", 0.01)


@pytest.fixture
def target(tmp_path: Path, site) -> Path:
    site.files[PATH] = BODY
    return tmp_path / "new" / "model.gguf"


def get(site, target: Path, *, notes: list[str] | None = None, **fields: object) -> str:
    seen: list[int] = []
    with client() as http:
        remote = Remote(url=site.url + PATH, **fields)  # type: ignore[arg-type]
        found = fetch(http, remote, target, seen.append, (notes if notes is not None else []).append)
    assert seen == sorted(seen) or notes is not None
    return found


def test_a_whole_file(site, target: Path):
    assert get(site, target, sha256=DIGEST) == DIGEST
    assert target.read_bytes() == BODY
    assert os.listdir(target.parent) == ["model.gguf"], "no part is left"


def test_cut_connections_are_resumed_where_they_were_cut(site, target: Path):
    site.cut_after[PATH] = [100_000, 50_000]
    notes: list[str] = []
    assert get(site, target, notes=notes) == DIGEST
    assert site.ranges_asked() == ["", "bytes=100000-", "bytes=150000-"]
    assert [asked["if-range"] for asked in site.asked] == ["", f'"{DIGEST}"', f'"{DIGEST}"']
    assert len(notes) == 2
    assert "resuming at 150000 bytes" in notes[1]


def test_a_part_of_an_earlier_pull_is_taken_up(site, target: Path, monkeypatch):
    monkeypatch.setattr(pull_fetch, "ATTEMPTS", 1)
    site.cut_after[PATH] = [120_000]
    with pytest.raises(FetchFailed, match="run the same command again"):
        get(site, target)
    assert target.with_name("model.gguf.part").stat().st_size == 120_000
    assert not target.exists()
    assert get(site, target) == DIGEST
    assert site.ranges_asked() == ["", "bytes=120000-"]


def test_the_reading_of_an_earlier_part_is_told_as_progress(site, target: Path, monkeypatch):
    monkeypatch.setattr(pull_fetch, "ATTEMPTS", 1)
    monkeypatch.setattr(pull_fetch, "BLOCK_BYTES", 2**14)
    site.cut_after[PATH] = [120_000]
    with pytest.raises(FetchFailed):
        get(site, target, sha256=DIGEST)
    had = target.with_name("model.gguf.part").stat().st_size
    assert had > 2**15
    told: list[int] = []
    with client() as http:
        remote = Remote(url=site.url + PATH, sha256=DIGEST)
        fetch(http, remote, target, told.append, lambda _text: None)
    assert told[:2] == [2**14, 2**15]
    assert had in told


def test_a_file_that_changed_meanwhile_starts_over(site, target: Path, monkeypatch):
    monkeypatch.setattr(pull_fetch, "ATTEMPTS", 1)
    site.cut_after[PATH] = [120_000]
    with pytest.raises(FetchFailed):
        get(site, target)
    other = os.urandom(200_000)
    site.files[PATH] = other
    # With `notes` the bytes told may fall: the earlier part is told as it is read, and then comes to nothing.
    assert get(site, target, notes=[]) == hashlib.sha256(other).hexdigest()
    assert target.read_bytes() == other


def test_without_a_validator_and_a_digest_nothing_is_spliced(site, target: Path):
    site.etags = False
    site.cut_after[PATH] = [100_000]
    assert get(site, target, notes=[]) == DIGEST
    assert site.ranges_asked() == ["", ""]


def test_without_a_validator_a_digest_is_enough_to_resume(site, target: Path):
    site.etags = False
    site.cut_after[PATH] = [100_000]
    assert get(site, target, sha256=DIGEST) == DIGEST
    assert site.ranges_asked() == ["", "bytes=100000-"]


def test_a_server_without_ranges_is_read_from_the_start(site, target: Path):
    site.ranges = False
    site.cut_after[PATH] = [100_000]
    assert get(site, target, notes=[]) == DIGEST
    assert target.read_bytes() == BODY


def test_a_damaged_part_is_found_by_the_digest_and_fetched_anew(site, target: Path, monkeypatch):
    monkeypatch.setattr(pull_fetch, "ATTEMPTS", 1)
    site.cut_after[PATH] = [120_000]
    with pytest.raises(FetchFailed):
        get(site, target, sha256=DIGEST)
    part = target.with_name("model.gguf.part")
    data = bytearray(part.read_bytes())
    data[5] ^= 1
    part.write_bytes(data)
    notes: list[str] = []
    assert get(site, target, sha256=DIGEST, notes=notes) == DIGEST
    assert "damaged; starting over" in notes[0]
    assert target.read_bytes() == BODY


def test_a_wrong_digest_is_refused_and_nothing_stays(site, target: Path):
    with pytest.raises(FetchFailed) as caught:
        get(site, target, sha256="0" * 64)
    assert DIGEST in str(caught.value)
    assert "0" * 64 in str(caught.value)
    assert os.listdir(target.parent) == []


def test_a_part_that_is_longer_than_the_file_starts_over(site, target: Path):
    get(site, target)
    target.rename(target.with_name("model.gguf.part"))
    part = target.with_name("model.gguf.part")
    part.write_bytes(BODY + b"more")
    about = f'{{"url": "{site.url}{PATH}", "validator": "\\"{DIGEST}\\""}}'
    target.with_name("model.gguf.part.json").write_text(about)
    assert get(site, target, notes=[]) == DIGEST


def test_a_complete_part_needs_only_its_name(site, target: Path):
    get(site, target)
    part = target.with_name("model.gguf.part")
    target.rename(part)
    about = f'{{"url": "{site.url}{PATH}", "validator": "\\"{DIGEST}\\""}}'
    target.with_name("model.gguf.part.json").write_text(about)
    assert get(site, target) == DIGEST
    assert target.read_bytes() == BODY


def test_a_complete_file_is_not_fetched_again(site, target: Path):
    get(site, target, sha256=DIGEST)
    asked = len(site.asked)
    assert get(site, target, sha256=DIGEST) == DIGEST
    assert len(site.asked) == asked
    target.write_bytes(b"damaged")
    assert get(site, target, sha256=DIGEST) == DIGEST
    assert target.read_bytes() == BODY


def test_busy_answers_are_tried_again(site, target: Path):
    site.status[PATH] = [503, 429]
    notes: list[str] = []
    assert get(site, target, notes=notes) == DIGEST
    assert "503" in notes[0]


@pytest.mark.parametrize(("status", "said"), [(401, "token"), (403, "does not let you"), (404, "check the address")])
def test_refusals_are_one_sentence(site, target: Path, status: int, said: str):
    site.status[PATH] = [status]
    with pytest.raises(FetchFailed, match=said):
        get(site, target)


def test_a_dead_server_ends_after_some_tries(site, target: Path):
    site.status[PATH] = [500] * 20
    with pytest.raises(FetchFailed, match="answers 500; run the same command again"):
        get(site, target)
    assert len(site.asked) == pull_fetch.ATTEMPTS


def test_redirects_are_followed_but_not_into_plain_http(site, target: Path):
    site.redirects["/moved"] = PATH
    with client() as http:
        assert fetch(http, Remote(url=f"{site.url}/moved"), target, print, print) == DIGEST
    site.redirects["/away"] = "http://models.example/x"
    with client() as http, pytest.raises(FetchFailed, match="not encrypted"):
        fetch(http, Remote(url=f"{site.url}/away"), target.with_name("other"), print, print)


def test_the_text_of_a_redirect_is_not_read(target: Path):
    """It may be as long as the memory is, packed or not."""
    over = threading.Event()

    class Long(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(302)
            self.send_header("Location", "http://models.example/x")
            self.send_header("Content-Encoding", "gzip")
            self.send_header("Content-Length", str(2**40))
            self.end_headers()
            over.wait(30)

        def log_message(self, *_words: object) -> None:
            """Quiet."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Long) as server, client() as http:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            with pytest.raises(FetchFailed, match="not encrypted"):
                fetch(http, Remote(url=f"http://127.0.0.1:{server.server_port}/x"), target, print, print)
            assert not over.is_set()
        finally:
            over.set()
            server.shutdown()
            thread.join()


def test_a_chain_of_redirects_without_an_end_is_told(site, target: Path):
    site.redirects[PATH] = PATH
    with pytest.raises(FetchFailed, match="leads from address to address"):
        get(site, target)


@pytest.mark.parametrize("url", ["https://xn--/m", "https://\u2024/m", "https://h:x/m"])
def test_what_is_no_address_is_told(target: Path, url: str):
    with client() as http, pytest.raises(FetchFailed, match="is no address"):
        fetch(http, Remote(url=url), target, print, print)


def test_plain_http_is_for_this_machine_only():
    with client() as http, pytest.raises(FetchFailed, match="not encrypted"):
        http.get("http://192.0.2.1/model")


def test_a_token_does_not_follow_to_another_host(site, target: Path):
    port = httpx.URL(site.url).port
    site.redirects["/gate"] = f"http://localhost:{port}{PATH}"
    with client() as http:
        remote = Remote(url=f"{site.url}/gate", headers={"Authorization": "Bearer secret"})
        assert fetch(http, remote, target, print, print) == DIGEST
    assert [asked["authorization"] for asked in site.asked] == ["Bearer secret", ""]


def test_too_little_space_is_told_before_the_first_byte(site, target: Path, monkeypatch):
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda _path: usage(0, 0, 1000))
    with pytest.raises(FetchFailed, match="--models-dir"):
        get(site, target)
    with pytest.raises(FetchFailed, match="GiB free"):
        need_space(target.parent, 1)


def test_a_disk_that_fills_up_is_told(site, target: Path, monkeypatch):
    def full(*_args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pull_fetch._Download, "_receive", full)
    with pytest.raises(FetchFailed, match="No space is left"):
        get(site, target)


@pytest.mark.parametrize(
    ("host", "ours"),
    [("127.0.0.1", True), ("::1", True), ("[::1]", True), ("localhost", True), ("10.0.0.1", False), ("a.b", False)],
)
def test_loopback(host: str, ours: bool):
    assert is_loopback(host) is ours


# ---- what servers get wrong ------------------------------------------------------------------------------------


def test_the_wait_that_a_server_asks_for_is_kept(site, target: Path, monkeypatch):
    waits: list[float] = []
    monkeypatch.setattr("time.sleep", waits.append)
    site.status[PATH] = [429]
    site.retry_after = "7"
    assert get(site, target, notes=[]) == DIGEST
    assert waits == [7.0]


def test_a_wait_may_be_a_date(site, target: Path, monkeypatch):
    waits: list[float] = []
    monkeypatch.setattr("time.sleep", waits.append)
    site.status[PATH] = [503]
    site.retry_after = email.utils.format_datetime(
        datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=40), usegmt=True
    )
    assert get(site, target, notes=[]) == DIGEST
    assert 20 < waits[0] <= 41


def test_a_wait_of_an_hour_is_told_instead(site, target: Path):
    site.status[PATH] = [429]
    site.retry_after = "3600"
    with pytest.raises(FetchFailed, match=r"left alone for 3600 s \(the server answers 429\); run the same command"):
        get(site, target)
    assert len(site.asked) == 1


@pytest.mark.parametrize("listed", [299_999, 300_001])
def test_another_size_than_announced_is_another_file(site, target: Path, listed: int):
    with pytest.raises(FetchFailed, match=rf"has 300000 bytes at 127.0.0.1 where {listed} were announced"):
        get(site, target, size_bytes=listed)
    assert os.listdir(target.parent) == []


def test_slow_bytes_arrive(site, target: Path):
    site.drip = 20_000
    assert get(site, target, sha256=DIGEST) == DIGEST


def test_a_server_that_falls_silent_is_asked_again(site, target: Path, monkeypatch):
    monkeypatch.setattr(pull_fetch, "READ_TIMEOUT_S", 1.5)  # the server is asked once more, and answers within it
    site.cut_after[PATH] = [100_000]
    site.hold = threading.Event()
    notes: list[str] = []
    assert get(site, target, sha256=DIGEST, notes=notes) == DIGEST
    assert "ReadTimeout" in notes[0]
    assert site.ranges_asked() == ["", "bytes=100000-"]


def test_the_same_file_at_another_address_is_resumed_by_its_digest(site, target: Path, monkeypatch):
    """A repository that moved on to another commit has the same file under another URL."""
    monkeypatch.setattr(pull_fetch, "ATTEMPTS", 1)
    site.cut_after[PATH] = [120_000]
    with pytest.raises(FetchFailed):
        get(site, target, sha256=DIGEST)
    site.files["/new.gguf"] = BODY
    with client() as http:
        remote = Remote(url=f"{site.url}/new.gguf", sha256=DIGEST)
        assert fetch(http, remote, target, lambda _bytes: None, print) == DIGEST
    assert site.ranges_asked() == ["", "bytes=120000-"]


@pytest.mark.parametrize(
    ("number", "said"),
    [(errno.ENOSPC, "No space is left"), (errno.EDQUOT, "quota"), (errno.EFBIG, "size are not allowed")],
)
def test_no_room_of_any_kind_is_told(site, target: Path, monkeypatch, number: int, said: str):
    def full(*_args: object) -> None:
        raise OSError(number, "as asked")

    monkeypatch.setattr(pull_fetch, "_write", full)
    with pytest.raises(FetchFailed, match=said):
        get(site, target)


def test_a_full_disk_keeps_what_was_fetched(site, tmp_path: Path):
    """A real one: a tmpfs of 256 KiB, half of it taken."""
    disk = tmp_path / "disk"
    disk.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)], capture_output=True, check=False
    )
    if made.returncode != 0:
        pytest.skip("no tmpfs can be mounted here")
    try:
        site.files[PATH] = BODY
        target = disk / "model.gguf"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pull_fetch, "need_space", lambda *_args: None)  # it would refuse before the first byte
            with pytest.raises(FetchFailed, match="what was fetched is kept"):
                get(site, target, sha256=DIGEST)
            part = disk / "model.gguf.part"
            have = part.stat().st_size
            assert 200_000 < have < len(BODY)
            assert part.read_bytes() == BODY[:have]
            subprocess.run(["mount", "-o", "remount,size=4m", str(disk)], check=True)
            assert get(site, target, sha256=DIGEST) == DIGEST
        assert site.ranges_asked() == ["", f"bytes={have}-"]
        with pytest.raises(FetchFailed, match="GiB free"):
            need_space(disk, 2**20)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("told", [True, False])
def test_a_file_larger_than_it_may_be_is_not_fetched(site, target: Path, told: bool):
    if not told:
        site.cut_after[PATH] = [len(BODY)]
    with pytest.raises(FetchFailed, match="GiB are granted for it"):
        get(site, target, limit_bytes=len(BODY) - 1, notes=[])
    assert not list(target.parent.glob("*.part"))
    assert get(site, target, limit_bytes=len(BODY)) == DIGEST
