"""Waiting while the client is there, and what ended jobs say."""

from __future__ import annotations

from typing import Any

import anyio
import msgspec
import pytest
import trio
import trio.lowlevel
from starlette.requests import ClientDisconnect

from coordinator.answers import ending_fault, result_of, usage_tokens, while_connected
from coordinator.records import JobRecord
from protocol.faults import Fault, FaultError, refuse
from protocol.work import FreeResult


def record(**more: Any) -> JobRecord:
    base: dict[str, Any] = {"id": "j", "kind": "llm", "model": "m", "state": "succeeded", "tenant": "t", "attempt": 1}
    return JobRecord(**{**base, "created_ms": 0, "params": b"", **more})


async def never() -> dict[str, Any]:
    await anyio.sleep_forever()
    raise AssertionError


async def test_work_that_ends_gives_its_value_or_its_own_exception() -> None:
    async def seven() -> int:
        return 7

    async def failing() -> int:
        raise refuse("conflict", "No.")

    assert await while_connected(never, seven) == 7
    with pytest.raises(FaultError):
        await while_connected(never, failing)


async def test_a_client_that_leaves_cancels_the_work() -> None:
    cancelled = trio.Event()

    async def work() -> None:
        try:
            await trio.sleep_forever()
        finally:
            cancelled.set()

    async def receive() -> dict[str, Any]:
        await trio.lowlevel.checkpoint()
        return {"type": "http.disconnect"}

    with pytest.raises(ClientDisconnect):
        await while_connected(receive, work)
    assert cancelled.is_set()


def test_results_are_not_trusted() -> None:
    good = msgspec.msgpack.encode(FreeResult(output=1))
    assert result_of(record(kind="x-a", result=good)).output == 1
    for result in (None, b"\xc1", msgspec.msgpack.encode({"content": 5})):
        with pytest.raises(FaultError) as caught:
            result_of(record(result=result))
        assert caught.value.fault.code == "engine_protocol"


def test_every_ending_has_a_fault() -> None:
    fault = Fault("engine_failed", "x")
    assert ending_fault(record(state="failed", fault=fault)) is fault
    assert ending_fault(record(state="cancelled")).code == "cancelled"
    assert ending_fault(record(state="failed")).code == "internal"


def test_usage() -> None:
    assert usage_tokens(record()) == {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}
