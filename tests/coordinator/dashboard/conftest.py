"""A browser as HTTP sees it: a session of an admin key, and the headers that a browser sends by itself."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest

from coordinator.testing import Running


@pytest.fixture
def boss(served: Running) -> str:
    """An admin key."""
    return served.coordinator.keys.create("admin", name="boss")


@pytest.fixture
def browser(served: Running, boss: str) -> Iterator[httpx.Client]:
    """Has logged in; keeps cookies as a browser does."""
    with httpx.Client(base_url=served.url, headers={"origin": served.url}, timeout=60) as client:
        page = client.post("/dashboard/login", json={"key": boss}).json()["page"]
        client.headers["x-bulkhead-page"] = page
        yield client
