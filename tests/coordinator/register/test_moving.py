"""`coordinator migrate` takes the register along."""

from __future__ import annotations

from pathlib import Path

from coordinator.keys import Keys
from coordinator.register import FILE_NAME, open_register
from coordinator.store import SqliteStore
from coordinator.store.moving import move
from coordinator.tenants import Tenants


def test_keys_tenants_and_revocations_go_with_the_jobs(space: str, tmp_path: Path) -> None:
    SqliteStore(tmp_path / "coordinator.sqlite").close()
    keys = Keys(tmp_path / FILE_NAME)
    live, revoked = keys.create("client", rpm=7), keys.create("worker", worker="w")
    keys.revoke(revoked[:12])
    Tenants(keys.known).set("acme", weight=3.0, store_content=False)
    keys.close()
    counts = move(tmp_path / "coordinator.sqlite", space, lambda _text: None)
    assert (counts["keys"], counts["tenants"]) == (2, 1)
    there = Keys(open_register(space, tmp_path / "other.sqlite"))
    try:
        found = there.find(live)
        assert found is not None
        assert found.rpm == 7
        assert there.find(revoked) is None
        assert Tenants(there.known).get("acme").weight == 3.0
        assert not Tenants(there.known).get("acme").store_content
        assert there.find(there.create("client")) is not None
    finally:
        there.close()


def test_a_store_without_a_register_beside_it_is_moved_alone(space: str, tmp_path: Path) -> None:
    SqliteStore(tmp_path / "coordinator.sqlite").close()
    assert "keys" not in move(tmp_path / "coordinator.sqlite", space, lambda _text: None)
