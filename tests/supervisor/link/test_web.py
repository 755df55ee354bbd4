"""Answers of a server that lies, and what of them reaches us; every dialect's requests go this way."""

from __future__ import annotations

import contextlib
import functools
import gc
import gzip
import hashlib
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import httpx
import pytest
import trio

from protocol.engine_wire import OutputFile
from protocol.faults import FaultError
from protocol.link_wire import FileRef
from supervisor.link.dialects import goliat_http, studio_http
from supervisor.link.reconnect import Backoff
from supervisor.link.session import Address
from supervisor.link.transfer import Transfer
from supervisor.link.web import ANSWER_S, Moving, Web

Reply = Callable[[trio.SocketStream], Awaitable[None]]
SHA_ABC = hashlib.sha256(b"abc").hexdigest()


def says(status: str = "200 OK", headers: str = "", body: bytes = b"") -> Reply:
    """An answer of these parts."""

    async def reply(stream: trio.SocketStream) -> None:
        head = f"HTTP/1.1 {status}\r\n{headers}Content-Length: {len(body)}\r\n\r\n"
        await stream.send_all(head.encode("latin-1") + body)

    return reply


async def without_end(stream: trio.SocketStream) -> None:
    """A body that goes on for as long as it is read."""
    await stream.send_all(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    while True:
        await stream.send_all(b"10000\r\n" + bytes(65536) + b"\r\n")


async def half_a_body(stream: trio.SocketStream) -> None:
    """One that never comes to its end."""
    await stream.send_all(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\nx")
    await trio.sleep_forever()


async def early_hints(stream: trio.SocketStream) -> None:
    """A head that never comes to its end."""
    while True:
        await stream.send_all(b"HTTP/1.1 103 Early Hints\r\n\r\n")
        await trio.sleep(0.01)


@contextlib.asynccontextmanager
async def server(reply: Reply) -> AsyncIterator[tuple[int, list[bytes]]]:
    """The port of one that takes requests whole and answers each with `reply`, and the heads that came."""
    heads: list[bytes] = []

    async def talk(stream: trio.SocketStream) -> None:
        data = b""
        while b"\r\n\r\n" not in data:
            if not (more := await stream.receive_some(65536)):
                return
            data += more
        head, _, body = data.partition(b"\r\n\r\n")
        heads.append(head)
        lines = (line.partition(b":") for line in head.lower().split(b"\r\n"))
        size = next((int(value) for name, _, value in lines if name == b"content-length"), 0)
        while len(body) < size:
            body += await stream.receive_some(65536)
        with contextlib.suppress(trio.BrokenResourceError):
            await reply(stream)

    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(functools.partial(trio.serve_tcp, talk, 0, host="127.0.0.1"))
        yield listeners[0].socket.getsockname()[1], heads
        nursery.cancel_scope.cancel()


async def asked(reply: Reply, **fields: float) -> tuple[httpx.Response, bytes | None]:
    with trio.fail_after(30):
        async with server(reply) as (port, _heads), Web(None, 20.0) as web:
            client = await web.client()
            return await web.ask(client.build_request("GET", f"http://127.0.0.1:{port}/"), **fields)  # type: ignore[arg-type]


def packed(layers: int) -> bytes:
    """Zeros, 64 MiB of them, packed so often."""
    body = bytes(2**26)
    for _ in range(layers):
        body = gzip.compress(body, 9)
    return body


async def test_an_answer_is_read_whole():
    response, body = await asked(says("201 Created", body=b"done"))
    assert (response.status_code, body) == (201, b"done")


@pytest.mark.parametrize(
    "reply",
    [
        says(headers="Content-Encoding: gzip\r\n", body=packed(1)),
        says(headers="Content-Encoding: gzip, gzip\r\n", body=packed(2)),
        says(headers="Content-Encoding: gzip\r\n", body=b"this is not gzip"),
        without_end,
        half_a_body,
    ],
    ids=["packed", "packed twice", "packed badly", "without end", "half"],
)
async def test_a_body_that_cannot_be_believed_is_left_and_the_status_counts(reply: Reply):
    response, body = await asked(reply, within_s=3.0 if reply is half_a_body else 20.0)
    assert (response.status_code, body) == (200, None)


async def test_a_head_that_does_not_end_is_no_answer():
    with pytest.RaisesGroup(pytest.RaisesExc(httpx.ReadTimeout, match="no answer in time"), flatten_subgroups=True):
        await asked(early_hints, within_s=0.3)


async def test_cookies_are_not_kept_and_nothing_is_asked_to_be_packed():
    async with (
        server(says(headers="Set-Cookie: a=b; Path=/\r\nConnection: close\r\n")) as (port, heads),
        Web(None, 20) as web,
    ):
        client = await web.client()
        for _ in range(2):
            await web.ask(client.build_request("GET", f"http://127.0.0.1:{port}/"))
    assert len(heads) == 2
    assert not any(b"cookie:" in head.lower() for head in heads)
    assert all(b"accept-encoding: identity" in head.lower() for head in heads)


# ---- the same, as files meet it


@contextlib.asynccontextmanager
async def transfer(reply: Reply) -> AsyncIterator[Transfer]:
    async with server(reply) as (port, _heads):
        address = Address(url=f"ws://127.0.0.1:{port}", token="t")
        pauses = {"fetch_patience_s": 0.0, "upload_patience_s": 0.0}
        async with Transfer(address, backoff=lambda: Backoff(0.01, 0.01), **pauses) as made:
            yield made


LIES = {
    "packed": says(headers="Content-Encoding: gzip\r\n", body=packed(1)),
    "packed badly": says(headers="Content-Encoding: gzip\r\n", body=b"this is not gzip"),
    "packed by nobody's means": says(headers="Content-Encoding: br, zstd\r\n", body=b"abc"),
    "deep": says(body=b'{"more":' + b"[" * 100_000),
}


@pytest.mark.parametrize("lie", list(LIES))
async def test_an_input_that_is_a_lie_fails_its_job_alone(lie: str, tmp_path: Path):
    file = FileRef(name="audio", url="v1/in", size=3, sha256=SHA_ABC)
    async with transfer(LIES[lie]) as made:
        with pytest.raises(FaultError) as refused:
            await made.fetch(file, lambda: os.open(tmp_path / "in", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600))
    assert refused.value.fault.code == "input_unavailable"


@pytest.mark.parametrize("lie", list(LIES))
async def test_an_output_was_taken_when_the_status_says_so_whatever_comes_with_it(lie: str):
    async with transfer(LIES[lie]) as made:
        await made.upload("v1/out/{name}", OutputFile("out", "text/plain", 3, SHA_ABC), b"abc")


@pytest.mark.parametrize("lie", list(LIES))
async def test_a_place_that_is_a_lie_is_told_as_that(lie: str):
    body = bytes(2**20)
    file = OutputFile("out", "text/plain", len(body), hashlib.sha256(body).hexdigest())
    async with transfer(LIES[lie]) as made:
        with pytest.raises(FaultError, match="named no place") as refused:
            await made.upload("v1/out/{name}?direct=1", file, body)
    assert refused.value.fault.code == "upload_failed"


async def test_what_goes_out_gives_its_answer_new_patience(autojump_clock: trio.abc.Clock):
    counted: list[int] = []
    moving = Moving(counted.append)
    await trio.sleep(10)
    moving(7)
    assert counted == [7]
    assert moving.patience.deadline == trio.current_time() + ANSWER_S


@pytest.mark.parametrize(
    "lie", [b"[" * 100_000, b'{"more":' + b"[" * 100_000, b"\xff\xfe", b'{"\\ud800": 1}', b"1" * 5000]
)
async def test_json_that_cannot_be_read_is_a_trouble_of_its_request(lie: bytes):
    with trio.fail_after(30):
        async with server(says(body=lie)) as (port, _heads):
            base = f"http://127.0.0.1:{port}"
            async with goliat_http.Http(base) as dashboard:
                with pytest.raises(goliat_http.Trouble):
                    await dashboard.json("GET", "api/assignment")
            async with studio_http.Http() as studio:
                _status, answer = await studio.json("GET", base)
                with pytest.raises(studio_http.Trouble):
                    answer.read(dict[str, int])


@pytest.mark.parametrize("kind", ["native", "studio", "goliat"])
async def test_a_request_that_is_called_off_while_it_goes_out_leaves_nothing_to_the_collector(kind):
    """A generator that is left is a warning of trio's, and here an error."""
    calling_off = trio.CancelScope()

    async def deaf(stream: trio.SocketStream) -> None:
        """Hears how the body begins, and no more."""
        heard = 0
        while heard < 2**17 and (piece := await stream.receive_some(2**16)):
            heard += len(piece)
        calling_off.cancel()
        await trio.sleep_forever()

    async with trio.open_nursery() as nursery:
        listener, *_ = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, deaf, [listener])
        url = f"http://127.0.0.1:{listener.socket.getsockname()[1]}/"
        body = "x" * 2**25  # more than the buffers of a connection hold
        with trio.fail_after(60), calling_off:
            if kind == "native":
                async with Web(None, 30.0) as web:
                    await web.ask((await web.client()).build_request("POST", url, json=body))
            elif kind == "studio":
                async with studio_http.Http() as studio:
                    await studio.json("POST", url, body=body)
            else:
                async with goliat_http.Http(url) as goliat:
                    await goliat.json("POST", "x", body=body)
        gc.collect()
        nursery.cancel_scope.cancel()
    assert calling_off.cancelled_caught
