"""Every request is bounded in time and size, and every trouble says whether trying again can help."""

from __future__ import annotations

import functools
from collections.abc import AsyncIterator

import pytest
import trio

from supervisor.link.dialects import goliat_http
from supervisor.link.dialects.goliat_http import Http, Trouble
from supervisor.testing_goliat import Answer, Dashboard, open_dashboard

PATH = "/api/heartbeat"


@pytest.fixture
async def dashboard() -> AsyncIterator[Dashboard]:
    async with open_dashboard() as dashboard:
        yield dashboard


@pytest.fixture
async def http(dashboard: Dashboard) -> AsyncIterator[Http]:
    async with Http(dashboard.url) as http:
        yield http


async def trouble(http: Http, method: str = "POST", path: str = PATH) -> Trouble:
    with pytest.raises(Trouble) as caught:
        await http.json(method, path, body={"machineId": "m"})
    return caught.value


async def test_a_good_answer_is_read(http: Http) -> None:
    assert (await http.json("POST", PATH, body={"machineId": "m"}))["success"] is True
    assert await http.json("GET", "api/assignment", query={"machineId": "a & b"}) == {"assigned": False}


@pytest.mark.parametrize(
    ("answer", "status", "again", "away"),
    [
        (Answer(400, {"error": "no id", "code": "INVALID_REQUEST"}), 400, False, False),
        (Answer(404, b"<html>"), 404, False, False),
        (Answer(429, {"error": "slow", "code": "RATE_LIMIT_EXCEEDED"}), 429, True, False),
        (Answer(408), 408, True, False),
        (Answer(500, {"error": "x", "details": "y"}), 500, True, True),
        (Answer(503), 503, True, True),
        (Answer(302, b"", (("location", "http://127.0.0.1:9/"),)), 302, False, False),
        (Answer(200, b"<html>"), 0, True, True),
        (Answer(200, b"\xff"), 0, True, True),
        (Answer(200, b""), 0, True, True),
        (Answer(200, {"success": False, "error": "full"}), 0, True, True),
        ("drop", 0, True, True),
    ],
)
async def test_troubles(
    dashboard: Dashboard, http: Http, answer: Answer | str, status: int, again: bool, away: bool
) -> None:
    dashboard.stumbles[PATH] = [answer]
    found = await trouble(http)
    assert (found.status, found.again, found.away) == (status, again, away)
    assert str(found)
    assert (await http.json("POST", PATH, body={"machineId": "m"}))["success"] is True


async def test_the_words_of_a_refusal_are_passed_on(dashboard: Dashboard, http: Http) -> None:
    dashboard.stumbles[PATH] = [Answer(400, {"error": "no machine", "code": "INVALID_REQUEST"})]
    assert "INVALID_REQUEST, no machine" in str(await trouble(http))


@pytest.mark.parametrize(("after", "expected"), [("7", 7.0), ("99999", 600.0), ("soon", 0.0), ("-1", 0.0)])
async def test_retry_after_is_bounded(dashboard: Dashboard, http: Http, after: str, expected: float) -> None:
    dashboard.stumbles[PATH] = [Answer(429, b"", (("retry-after", after),))]
    assert (await trouble(http)).retry_after_s == expected


async def test_nobody_there_is_away(dashboard: Dashboard, http: Http) -> None:
    dashboard.away = True
    assert (await trouble(http)).away


async def test_a_peer_that_says_nothing_is_left() -> None:
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")

    async def silent(stream: trio.SocketStream) -> None:
        async with stream:
            await trio.sleep_forever()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.serve_listeners, silent, listeners)
        url = f"http://127.0.0.1:{listeners[0].socket.getsockname()[1]}"
        async with Http(url, request_s=0.1) as http:
            found = await trouble(http)
        nursery.cancel_scope.cancel()
    assert found.away
    assert "no answer in time" in str(found)


STALLED = {
    "/api/ok": b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\nx",
    "/api/bad-gateway": b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 1000\r\n\r\nx",
    "/api/not-found": b"HTTP/1.1 404 Not Found\r\nContent-Length: 1000\r\n\r\nx",
}
PACKED = {
    "/api/ok": b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 1\r\n\r\nx",
    "/api/bad-gateway": b"HTTP/1.1 503 Busy\r\nContent-Encoding: gzip\r\nContent-Length: 1\r\n\r\nx",
    "/api/not-found": b"HTTP/1.1 404 Not Found\r\nContent-Encoding: gzip\r\nContent-Length: 1\r\n\r\nx",
}


async def bodies_left(answers: dict[str, bytes], request_s: float) -> dict[str, Trouble]:
    """What comes of requests, side by side, whose answers have these bytes, and then nothing."""
    found: dict[str, Trouble] = {}

    async def talk(stream: trio.SocketStream) -> None:
        async with stream:
            data = b""
            while b"\r\n\r\n" not in data:
                data += await stream.receive_some(65536)
            await stream.send_all(answers[data.split(b" ")[1].decode()])
            await trio.sleep_forever()

    async def ask(http: Http, path: str) -> None:
        found[path] = await trouble(http, path=path)

    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(functools.partial(trio.serve_tcp, talk, 0, host="127.0.0.1"))
        async with Http(f"http://127.0.0.1:{listeners[0].socket.getsockname()[1]}", request_s=request_s) as http:
            async with trio.open_nursery() as asking:
                for path in answers:
                    asking.start_soon(ask, http, path)
        nursery.cancel_scope.cancel()
    return found


async def test_an_answer_that_stalls_halfway_may_come_whole_the_next_time() -> None:
    found = await bodies_left(STALLED, request_s=6.0)
    assert {path: (one.status, one.again, one.away) for path, one in found.items()} == {
        "/api/ok": (0, True, True),
        "/api/bad-gateway": (502, True, True),
        "/api/not-found": (404, False, False),
    }
    assert "no whole answer in time" in str(found["/api/ok"])


async def test_an_answer_that_cannot_be_read_is_refused_for_good_only_where_it_is_a_good_one() -> None:
    found = await bodies_left(PACKED, request_s=60.0)
    assert {path: (one.status, one.again, one.away) for path, one in found.items()} == {
        "/api/ok": (200, False, False),
        "/api/bad-gateway": (503, True, True),
        "/api/not-found": (404, False, False),
    }


async def test_a_config_is_a_file_as_it_is(dashboard: Dashboard, http: Http) -> None:
    dashboard.configs["c"] = b"\x00not json"
    assert await http.config(f"{dashboard.url}/configs/c") == b"\x00not json"
    assert await http.config("/configs/c") == b"\x00not json"


async def test_a_config_that_is_too_large_is_refused_for_good(
    dashboard: Dashboard, http: Http, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(goliat_http, "MAX_CONFIG_BYTES", 2**20)
    dashboard.configs["c"] = bytes(2**20 + 1)
    with pytest.raises(Trouble, match="more than 1 MiB") as caught:
        await http.config("/configs/c")
    assert not caught.value.again
    dashboard.configs["c"] = bytes(2**20)
    assert len(await http.config("/configs/c")) == 2**20


@pytest.mark.parametrize("url", ["file:///etc/passwd", "ftp://h/x", "data:,x", "http://", "http://[", "gopher:x"])
async def test_other_addresses_of_a_config_are_refused(http: Http, url: str) -> None:
    with pytest.raises(Trouble) as caught:
        await http.config(url)
    assert not caught.value.again
