"""Every failure has OpenAI's shape and a request id."""

from __future__ import annotations

import asyncio
import logging
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import anyio
import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from coordinator.errors import EXCEPTION_HANDLERS, RequestIds, fault_response
from coordinator.server import Server, Serving, base_url, listen, uvicorn_config
from protocol.faults import CODES, Fault, refuse


@pytest.mark.parametrize("code", sorted(CODES))
def test_every_code_becomes_a_response(code: str) -> None:
    response = fault_response(Fault(code, "It is so.", field="x"))
    assert response.status_code == CODES[code].http_status
    assert ("retry-after" in response.headers) == (response.status_code in (429, 503) and CODES[code].retryable)


def test_a_fault_may_say_when_to_come_again() -> None:
    assert fault_response(Fault("overloaded", "Full.", detail={"retry_after_s": 17})).headers["retry-after"] == "17"
    assert fault_response(Fault("unauthorized", "No.")).headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize(("method", "path", "status"), [("GET", "/nowhere", 404), ("PUT", "/v1/models", 405)])
def test_routing_refusals_are_json(http: httpx.Client, method: str, path: str, status: int) -> None:
    answer = http.request(method, path)
    error = answer.json()["error"]
    assert (answer.status_code, error["type"]) == (status, "invalid_request_error")
    assert path in error["message"]
    assert answer.headers["x-request-id"].startswith("req_")


def test_every_response_has_its_own_request_id(http: httpx.Client) -> None:
    answers = [
        http.get("/healthz"),
        http.get("/v1/models"),
        http.get("/nowhere"),
        httpx.get(http.base_url.join("/v1/models")),
    ]
    assert [answer.status_code for answer in answers] == [200, 200, 404, 401]
    assert len({answer.headers["x-request-id"] for answer in answers}) == 4
    assert {answer.headers["x-content-type-options"] for answer in answers} == {"nosniff"}


async def test_a_bug_is_answered_and_logged_with_its_id(caplog: pytest.LogCaptureFixture) -> None:
    async def broken(_request: Request) -> Response:
        raise ZeroDivisionError("a secret of the inside")

    async def refusing(_request: Request) -> Response:
        raise refuse("forbidden", "Not you.", "x")

    routes = [Route("/broken", broken), Route("/refusing", refusing)]
    app = RequestIds(Starlette(routes=routes, exception_handlers=EXCEPTION_HANDLERS))
    transport: Any = httpx.ASGITransport(app=app)
    with caplog.at_level(logging.ERROR):
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            answer = await client.get("/broken")
            refusal = await client.get("/refusing")
    assert answer.status_code == 500
    assert answer.json()["error"]["code"] == "internal"
    assert "secret" not in answer.text
    assert answer.headers["x-request-id"] in caplog.text
    assert "ZeroDivisionError" in caplog.text
    assert (refusal.status_code, refusal.json()["error"]["param"]) == (403, "x")


async def test_a_bug_in_the_middle_of_a_body_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    async def broken(_request: Request) -> Response:
        async def body() -> Any:
            yield b"some"
            raise ZeroDivisionError

        return StreamingResponse(body())

    app = RequestIds(Starlette(routes=[Route("/", broken)], exception_handlers=EXCEPTION_HANDLERS))
    transport: Any = httpx.ASGITransport(app=app)
    with caplog.at_level(logging.ERROR):
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            with pytest.raises(AssertionError):  # the transport's word for a body that never ended
                await client.get("/")
    assert len([record for record in caplog.records if record.name == "coordinator.errors"]) == 1


def test_a_request_that_the_servers_end_cuts_short_is_told_to_come_again() -> None:
    """uvicorn cancels what has no answer in its last second; its own words for that are a bare 500."""
    asked = threading.Event()

    async def hangs(_request: Request) -> Response:
        asked.set()
        await anyio.sleep_forever()
        raise AssertionError

    app = RequestIds(Starlette(routes=[Route("/", hangs)], exception_handlers=EXCEPTION_HANDLERS))
    server, listener = Server(uvicorn_config(app, Serving())), listen("127.0.0.1:0")

    def serve() -> None:
        with asyncio.Runner(loop_factory=server.config.get_loop_factory()) as runner:
            runner.run(server.serve(sockets=[listener]))

    with ThreadPoolExecutor(2) as pool:
        serving = pool.submit(serve)
        answering = pool.submit(httpx.get, base_url(listener, secure=False), timeout=60)
        assert asked.wait(60)
        server.should_exit = True
        answer = answering.result(60)
        serving.result(60)
    assert answer.status_code == 503
    assert answer.json()["error"]["code"] == "overloaded"
    assert int(answer.headers["retry-after"]) > 0
    assert answer.headers["x-request-id"]
