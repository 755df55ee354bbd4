"""The log is turned up and down while the coordinator runs."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator

import httpx
import pytest

from coordinator import logs
from coordinator.testing import Running


@pytest.fixture
def admin(served: Running) -> Iterator[httpx.Client]:
    """As it was before, afterwards."""
    level, disabled = logging.getLogger().level, logs.access_log.disabled
    headers = {"authorization": f"Bearer {served.coordinator.keys.create('admin')}"}
    with httpx.Client(base_url=served.url, headers=headers, timeout=60) as client:
        yield client
    logging.getLogger().setLevel(level)
    logs.access_log.disabled = disabled
    for name in logs.CHATTY:
        logging.getLogger(name).setLevel(logging.NOTSET)


def test_the_level_changes_and_goes_back(admin: httpx.Client, served: Running) -> None:
    assert admin.put("/v1/log", json={"level": "error"}).json()["level"] == "error"
    assert admin.put("/v1/log", json={"level": "debug", "for_s": 60}).json()["level"] == "debug"
    assert admin.put("/v1/log", json={"level": "info", "for_s": 0.01}).json()["level"] == "info"

    until = time.monotonic() + 60
    while logs.level_now() != "error":
        assert time.monotonic() < until
        served.call(_a_turn)
    assert admin.get("/v1/log").json()["level"] == "error"


async def _a_turn() -> None:
    """Let the coordinator's loop go on."""


def test_the_access_log_is_switched(admin: httpx.Client) -> None:
    assert admin.put("/v1/log", json={"access": True}).json()["access"] is True
    assert admin.put("/v1/log", json={"access": False}).json()["access"] is False


def test_only_an_admin_may(admin: httpx.Client, http: httpx.Client) -> None:
    assert http.get("/v1/log").status_code == 403
    assert admin.put("/v1/log", json={"level": "loud"}).status_code == 400
