"""Who may come in."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from coordinator.access import bearer, worker_scope
from coordinator.keys import Keys


@pytest.fixture
def keys(tmp_path: Path) -> Iterator[Keys]:
    it = Keys(tmp_path / "keys.sqlite")
    yield it
    it.close()


@pytest.mark.parametrize(
    ("header", "token"),
    [("Bearer x", "x"), ("bearer  x ", "x"), ("Basic x", ""), ("", ""), ("Bearer", ""), ("Bearer ", "")],
)
def test_bearer_tokens(header: str, token: str) -> None:
    assert bearer(header) == token


async def test_worker_tokens_open_the_gateway_and_nothing_else(keys: Keys) -> None:
    pinned = await worker_scope(keys, keys.create("worker", worker="w1"))
    assert pinned is not None
    assert pinned.worker == "w1"
    assert await worker_scope(keys, keys.create("client")) is None
    assert await worker_scope(keys, keys.create("admin")) is None
    assert await worker_scope(keys, "") is None


def test_every_route_needs_a_key_but_health(served: Any) -> None:
    for path in ("/v1/models", "/v1/jobs", "/metrics", "/v1/videos/x", "/nowhere", "/docs", "/healthz/x"):
        answer = httpx.get(served.url + path)
        assert (path, answer.status_code) == (path, 401)
        assert answer.json()["error"]["code"] == "unauthorized"
        assert answer.headers["www-authenticate"] == "Bearer"
    assert httpx.get(served.url + "/healthz").json() == {"status": "ok"}
    # A blob URL carries its own right, or none.
    assert httpx.get(served.url + "/v1/blobs/blob_x").status_code == 403


def test_scopes(served: Any) -> None:
    def status(secret: str, path: str = "/v1/models") -> int:
        return httpx.get(served.url + path, headers={"authorization": f"Bearer {secret}"}).status_code

    keys = served.coordinator.keys
    assert status(keys.create("admin")) == 200
    assert status(keys.create("client"), "/metrics") == 200
    assert status(served.worker_token) == 403
    assert status("bhc_" + "a" * 43) == 401


def test_a_revoked_key_is_refused(served: Any) -> None:
    secret = served.coordinator.keys.create("client")
    headers = {"authorization": f"Bearer {secret}"}
    assert httpx.get(served.url + "/v1/models", headers=headers).status_code == 200
    served.coordinator.keys.revoke(secret[:12])
    assert httpx.get(served.url + "/v1/models", headers=headers).status_code == 401
