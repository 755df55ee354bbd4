"""Keys: made, found, revoked; key files."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from coordinator import keys as module
from coordinator.keys import KeyRefusal, Keys, digest, new_secret, secret_file
from coordinator.register import known as known_module
from coordinator.store import StoreError


@pytest.fixture
def keys(tmp_path: Path) -> Iterator[Keys]:
    it = Keys(tmp_path / "keys.sqlite")
    yield it
    it.close()


def test_a_secret_is_found_and_never_stored(keys: Keys, tmp_path: Path) -> None:
    secret = keys.create("client", name="laptop", tenant="acme")
    key = keys.find(secret)
    assert key is not None
    assert (key.scope, key.tenant, key.name, key.prefix) == ("client", "acme", "laptop", secret[:12])
    stored = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert secret.encode() not in stored
    assert digest(secret) in stored


def test_secrets_have_256_random_bits_and_tell_their_scope() -> None:
    assert {new_secret(scope)[:4] for scope in module.SCOPES} == {"bhc_", "bhw_", "bha_"}
    assert len(new_secret("client")) == 4 + 43
    assert new_secret("client") != new_secret("client")


@pytest.mark.parametrize("secret", ["", "bhc_", "x" * 10_000, "bhc_" + "é" * 43, "bhc_" + "a" * 42 + "\n", "\udc80"])
def test_what_is_no_secret_is_not_found(keys: Keys, secret: str) -> None:
    assert keys.find(secret) is None


def test_a_revocation_by_another_process_takes_effect_within_the_cache_time(keys: Keys, tmp_path: Path) -> None:
    secret = keys.create("client")
    later = 0.0
    keys.known.clock = lambda: time.monotonic() + later
    assert keys.find(secret) is not None
    other = Keys(tmp_path / "keys.sqlite")
    assert other.revoke(secret[:12]).prefix == secret[:12]
    other.close()
    later = known_module.CACHE_S + 0.01
    assert keys.find(secret) is None
    assert [key.revoked_ms is None for key in keys.list()] == [False]


def test_revoking_needs_one_match(keys: Keys) -> None:
    keys.create("client")
    keys.create("client")
    keys.known.register.write(lambda turn: turn.all("UPDATE keys SET prefix = 'bhc_samesame' RETURNING prefix"))
    with pytest.raises(KeyRefusal, match="2 live keys"):
        keys.revoke("bhc_s")
    with pytest.raises(KeyRefusal, match="No live key"):
        keys.revoke("bhw_nothing")
    with pytest.raises(KeyRefusal, match="No live key"):
        keys.revoke("bhc_")


def test_an_unknown_scope_is_refused(keys: Keys) -> None:
    with pytest.raises(KeyRefusal, match="client, worker, admin"):
        keys.create("root")


def test_a_secret_for_this_boot_is_not_written_down(keys: Keys) -> None:
    keys.admit_for_this_boot("any token of the supervisor", "worker", worker="w1")
    key = keys.find("any token of the supervisor")
    assert key is not None
    assert (key.scope, key.worker) == ("worker", "w1")
    assert list(keys.list()) == []


def test_the_database_is_private(keys: Keys, tmp_path: Path) -> None:
    keys.create("client")
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o600}


class TestSecretFile:
    def test_it_is_made_once_and_private(self, keys: Keys, tmp_path: Path) -> None:
        path = tmp_path / "client.key"
        assert secret_file(path, keys, "client", "first")
        assert path.stat().st_mode & 0o777 == 0o600
        secret = path.read_text().strip()
        assert keys.find(secret)
        assert not secret_file(path, keys, "client", "first")
        assert path.read_text().strip() == secret

    def test_it_is_taken_up_again_by_an_empty_database(self, keys: Keys, tmp_path: Path) -> None:
        path = tmp_path / "client.key"
        secret_file(path, keys, "client", "first")
        fresh = Keys(tmp_path / "fresh.sqlite")
        secret_file(path, fresh, "client", "first")
        assert fresh.find(path.read_text().strip())
        fresh.close()

    def test_a_restart_does_not_undo_a_revocation(self, keys: Keys, tmp_path: Path) -> None:
        path = tmp_path / "client.key"
        secret_file(path, keys, "client", "first")
        secret = path.read_text().strip()
        keys.revoke(secret[:12])
        secret_file(path, keys, "client", "first")
        assert keys.find(secret) is None

    def test_a_file_that_others_may_read_is_refused(self, keys: Keys, tmp_path: Path) -> None:
        path = tmp_path / "client.key"
        secret_file(path, keys, "client", "first")
        path.chmod(0o644)
        with pytest.raises(KeyRefusal, match="chmod 600"):
            secret_file(path, keys, "client", "first")

    def test_a_file_without_a_key_is_refused(self, keys: Keys, tmp_path: Path) -> None:
        path = tmp_path / "client.key"
        path.write_text("hunter2")
        path.chmod(0o600)
        with pytest.raises(KeyRefusal, match="does not hold a key"):
            secret_file(path, keys, "client", "first")


def test_a_broken_database_is_told_apart(tmp_path: Path) -> None:
    path = tmp_path / "keys.sqlite"
    path.write_bytes(os.urandom(4096))
    with pytest.raises(StoreError, match=r"not a database\. Restore it"):
        Keys(path)


def test_what_is_bound_to_a_key_is_found_by_its_hash_as_long_as_it_lives(keys: Keys, tmp_path: Path) -> None:
    secret = keys.create("admin", name="boss")
    found = keys.by_hash(digest(secret))
    assert found is not None
    assert (found.scope, found.name) == ("admin", "boss")
    assert keys.by_hash(digest("bha_" + "a" * 43)) is None
    beside = Keys(tmp_path / "keys.sqlite")  # another process
    beside.revoke(found.prefix)
    beside.close()
    assert keys.by_hash(digest(secret)) is None
    keys.admit_for_this_boot("anything", "admin")
    assert keys.by_hash(digest("anything")) is not None
