"""A studio session that ends by trouble of the coordinator's own."""

from __future__ import annotations

from typing import Any

import pytest

from protocol.faults import refuse
from tests.coordinator.studio_rig import CHAT, House


async def full(*_what: Any, **_more: Any) -> None:
    raise refuse("storage_full", "The disk is full.")


def told(caplog: pytest.LogCaptureFixture) -> list[tuple[str, bool]]:
    """What is in the log of such ends, and whether a traceback is."""
    lines = [one for one in caplog.records if one.name == "coordinator.studio.session" and one.levelname == "ERROR"]
    return [(one.getMessage(), bool(one.exc_info)) for one in lines]


def test_a_full_disk_that_ends_a_session_is_told_in_one_line(
    house: House, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its worker comes again and again: by tracebacks the log would fill another disk."""
    monkeypatch.setattr(house.there.coordinator.parts.dispatcher.attempts, "join", full)
    worker = house.worker()
    with worker.open() as it:
        it.send("hello", authToken=worker.token, capabilities=worker.said)
        assert it.ending()[0] == "internal_error"
    assert told(caplog) == [(f"Session of worker {worker.id} ended by trouble of ours: The disk is full.", False)]


def test_a_full_disk_that_ends_it_while_an_offer_is_declined_too(
    house: House, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with house.worker().session() as it:
        with monkeypatch.context() as patched:
            patched.setattr(house.there.coordinator.parts.dispatcher.attempts, "decline", full)
            job = house.submit(params={**CHAT, "seed": 7})  # the contract has no word for it
            assert it.ending()[0] == "internal_error"
    house.client.post(f"/v1/jobs/{job}/cancel")
    assert told(caplog) == [(f"Session of worker {it.worker.id} ended by trouble of ours: The disk is full.", False)]
