from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import trio

from protocol.engine_wire import OutputFile
from protocol.faults import FaultError
from protocol.link_wire import FileRef
from supervisor.link.reconnect import Backoff
from supervisor.link.session import Address
from supervisor.link.transfer import Transfer


class Shop:
    """A real HTTP server: GET gives `goods`, PUT takes; `moods` are statuses to answer with first."""

    def __init__(self) -> None:
        self.goods: dict[str, bytes] = {}
        self.taken: dict[str, tuple[bytes, dict[str, str]]] = {}
        self.moods: list[int] = []
        self.requests: list[tuple[str, str, str]] = []
        self.cut_short = 0
        shop = self

        class Talk(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self, status: int, body: bytes = b"") -> None:
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def do_GET(self) -> None:
                shop.requests.append(("GET", self.path, self.headers.get("Authorization", "")))
                if shop.moods:
                    return self.answer(shop.moods.pop(0))
                body = shop.goods.get(self.path)
                if body is None:
                    return self.answer(404)
                if shop.cut_short:
                    shop.cut_short -= 1
                    self.send_response(200)
                    self.send_header("Content-Length", str(len(body)))
                    self.end_headers()
                    self.wfile.write(body[: len(body) // 2])
                    self.close_connection = True
                    return None
                return self.answer(200, body)

            def do_PUT(self) -> None:
                shop.requests.append(("PUT", self.path, self.headers.get("Authorization", "")))
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if len(body) < int(self.headers["Content-Length"]):
                    self.close_connection = True
                    return None
                if shop.moods:
                    return self.answer(shop.moods.pop(0))
                shop.taken[self.path] = (body, {name.lower(): value for name, value in self.headers.items()})
                return self.answer(201)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Talk)
        self.port = self.server.server_address[1]
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.02,))
        self.thread.start()

    def close(self) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


@pytest.fixture
def shop():
    shop = Shop()
    yield shop
    shop.close()


@pytest.fixture
async def transfer(shop):
    address = Address(url=f"ws://127.0.0.1:{shop.port}/pre", token="t0ken")
    async with Transfer(address, backoff=lambda: Backoff(0.01, 0.01), fetch_patience_s=5) as transfer:
        yield transfer


def ref(content: bytes, url: str = "/v1/blobs/a?sig=1", **fields: Any) -> FileRef:
    fields = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()} | fields
    return FileRef(name="audio", url=url, **fields)


def out(name: str, content: bytes, **fields: Any) -> OutputFile:
    fields = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()} | fields
    return OutputFile(name=name, mime="image/png", **fields)


def into(path: Path) -> Callable[[], int]:
    return lambda: os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)


def from_(path: Path) -> Callable[[], int]:
    return lambda: os.open(path, os.O_RDONLY)


CONTENT = os.urandom(3 * 2**20 + 17)


async def test_a_relative_url_belongs_to_the_coordinator_and_gets_the_token(shop, transfer, tmp_path):
    shop.goods["/pre/v1/blobs/a?sig=1"] = CONTENT
    await transfer.fetch(ref(CONTENT), into(tmp_path / "audio"))
    assert (tmp_path / "audio").read_bytes() == CONTENT
    assert shop.requests == [("GET", "/pre/v1/blobs/a?sig=1", "Bearer t0ken")]


async def test_an_absolute_url_elsewhere_gets_no_token(shop, transfer, tmp_path):
    shop.goods["/x"] = b"abc"
    await transfer.fetch(ref(b"abc", f"http://localhost:{shop.port}/x"), into(tmp_path / "audio"))
    assert shop.requests == [("GET", "/x", "")]


async def test_trouble_that_passes_is_waited_out(shop, transfer, tmp_path):
    shop.goods["/pre/v1/blobs/a?sig=1"] = CONTENT
    shop.moods = [503, 429, 500]
    shop.cut_short = 1
    await transfer.fetch(ref(CONTENT), into(tmp_path / "audio"))
    assert (tmp_path / "audio").read_bytes() == CONTENT
    assert len(shop.requests) == 5


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"size": 5}, "more than 5 of 5 bytes came"),
        ({"size": 9}, "6 of 9 bytes came"),
        ({"sha256": "0" * 64}, "its sha256 is"),
        ({"url": "/gone"}, "HTTP 404"),
        ({"url": "http://127.0.0.1:9/x"}, "ConnectError"),
    ],
)
async def test_inputs_that_are_not_what_was_said(shop, tmp_path, fields, words):
    shop.goods["/v1/blobs/a?sig=1"] = b"abcdef"
    address = Address(url=f"ws://127.0.0.1:{shop.port}", token="t")
    async with Transfer(address, backoff=lambda: Backoff(0.01, 0.01), fetch_patience_s=0.05) as transfer:
        with pytest.raises(FaultError) as caught:
            await transfer.fetch(ref(b"abcdef", **fields), into(tmp_path / "audio"))
    assert caught.value.fault.code == "input_unavailable"
    assert words in caught.value.fault.message


async def test_a_full_disk_is_the_workers_own_trouble(shop, transfer):
    shop.goods["/pre/v1/blobs/a?sig=1"] = CONTENT
    with pytest.raises(FaultError) as caught:
        await transfer.fetch(ref(CONTENT), into(Path("/dev/full")))
    assert caught.value.fault.code == "worker_disk_full"


async def test_an_address_that_is_none_costs_that_job_alone(transfer, tmp_path):
    for url in ("http://[bad", "http://x:port/", "https://\x00/"):
        with pytest.raises(FaultError) as caught:
            await transfer.fetch(ref(b"x", url), into(tmp_path / "x"))
        assert caught.value.fault.code == "input_unavailable"
        with pytest.raises(FaultError) as caught:
            await transfer.upload(url, out("x", b"x"), b"x")
        assert caught.value.fault.code == "upload_failed"


async def test_uploads_carry_name_digest_and_type_and_survive_bad_answers(shop, transfer, tmp_path):
    path = tmp_path / "a b.png"
    path.write_bytes(CONTENT)
    shop.moods = [502]
    await transfer.upload("/v1/blobs/job/1/{name}?exp=1&sig=2", out("a b.png", CONTENT), from_(path))
    body, headers = shop.taken["/pre/v1/blobs/job/1/a%20b.png?exp=1&sig=2"]
    assert body == CONTENT
    assert headers["x-content-sha256"] == hashlib.sha256(CONTENT).hexdigest()
    assert headers["content-type"] == "image/png"
    assert headers["content-length"] == str(len(CONTENT))
    assert [method for method, _path, _token in shop.requests].count("PUT") == 2


async def test_content_from_memory(shop, transfer):
    await transfer.upload("/{name}", out("result.msgpack", b"xyz"), b"xyz")
    assert shop.taken["/pre/result.msgpack"][0] == b"xyz"


async def test_a_refusal_is_not_tried_again(shop, transfer, tmp_path):
    shop.moods = [409]
    with pytest.raises(FaultError, match="HTTP 409") as caught:
        await transfer.upload("/{name}", out("x", b"xyz"), b"xyz")
    assert caught.value.fault.code == "upload_failed"
    assert len(shop.requests) == 1


async def test_no_patience_beyond_the_jobs_deadline(shop, transfer):
    shop.moods = [500] * 1000
    with pytest.raises(FaultError, match="HTTP 500"):
        await transfer.upload("/{name}", out("x", b"xyz"), b"xyz", until=trio.current_time() + 0.1)


async def test_an_offer_without_a_place_for_outputs(transfer):
    with pytest.raises(FaultError, match="names no place"):
        await transfer.upload("", out("x", b""), b"")


def _short(path: Path) -> None:
    path.write_bytes(CONTENT[:-1])


def _other(path: Path) -> None:
    path.write_bytes(b"x" + CONTENT[1:])


def _grown(path: Path) -> None:
    path.write_bytes(CONTENT + b"x")


@pytest.mark.parametrize(("make", "words"), [(_short, "shrank to"), (_other, "The sha256 of"), (_grown, "grew to")])
async def test_a_file_that_is_not_what_the_engine_said_never_arrives_whole(transfer, tmp_path, shop, make, words):
    make(tmp_path / "x")
    with pytest.raises(FaultError) as caught:
        await transfer.upload("/{name}", out("x", CONTENT), from_(tmp_path / "x"))
    assert caught.value.fault.code == "engine_protocol"
    assert words in caught.value.fault.message
    assert shop.taken == {}


async def test_an_empty_output_with_a_wrong_digest(transfer, tmp_path, shop):
    (tmp_path / "x").touch()
    with pytest.raises(FaultError, match="sha256"):
        await transfer.upload("/{name}", out("x", b"", sha256="0" * 64), from_(tmp_path / "x"))
    await transfer.upload("/{name}", out("x", b""), from_(tmp_path / "x"))
    assert shop.taken["/pre/x"][0] == b""


async def test_no_descriptor_is_left_open(transfer, tmp_path, shop):
    (tmp_path / "x").write_bytes(CONTENT)
    await transfer.upload("/{name}", out("x", CONTENT), from_(tmp_path / "x"))
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        shop.moods = [500]
        await transfer.upload("/{name}", out("x", CONTENT), from_(tmp_path / "x"))
        _short(tmp_path / "y")
        with pytest.raises(FaultError):
            await transfer.upload("/{name}", out("y", CONTENT), from_(tmp_path / "y"))
    with trio.fail_after(30):
        while len(os.listdir("/proc/self/fd")) > before + 1:  # noqa: ASYNC110  the server's threads close theirs, too
            await trio.sleep(0.01)


async def test_bytes_are_counted_as_they_move_those_of_tries_that_failed_too(shop, transfer, tmp_path):
    came: list[int] = []
    went: list[int] = []
    shop.goods["/pre/v1/blobs/a?sig=1"] = CONTENT
    shop.cut_short = 1
    await transfer.fetch(ref(CONTENT), into(tmp_path / "audio"), came.append)
    assert sum(came) == len(CONTENT) + 2**20, "of what was cut short, the whole pieces"
    shop.moods = [503]
    (tmp_path / "x").write_bytes(CONTENT)
    await transfer.upload("/{name}", out("x", CONTENT), from_(tmp_path / "x"), moved=went.append)
    await transfer.upload("/{name}", out("y", b"xyz"), b"xyz", moved=went.append)
    assert sum(went) == 2 * len(CONTENT) + 3
