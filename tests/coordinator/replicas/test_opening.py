"""The table `[replica]`: what it gives, and each refusal with its key and its cure."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from coordinator.config import load
from coordinator.replicas.opening import ReplicaTable, in_folder, make_secret, open_doorway
from coordinator.server import Refusal

SECRET = "0123456789abcdef"


def table(folder: Path, **changed: str) -> ReplicaTable:
    secret = folder / "secret"
    secret.write_text(SECRET + "\n")
    return ReplicaTable(**{"listen": "127.0.0.1:0", "secret_file": str(secret), **changed})


def test_a_door_is_told_by_its_own_address_or_by_another(tmp_path: Path) -> None:
    one = open_doorway(table(tmp_path))
    with one.listener:
        assert one.url == f"ws://127.0.0.1:{one.listener.getsockname()[1]}"
        assert (one.secret, one.certificate) == (SECRET, None)
    other = open_doorway(table(tmp_path, listen="0.0.0.0:0", advertise="replica-1.internal:9090"))
    with other.listener:
        assert other.url == "ws://replica-1.internal:9090"


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"listen": "nonsense"}, "replica.listen"),
        ({"listen": "0.0.0.0:0"}, "replica.advertise: Give HOST:PORT"),
        ({"advertise": "ws://x:1/"}, "replica.advertise"),
        ({"secret_file": "/nowhere/at/all"}, "replica.secret_file"),
        ({"tls_cert": "/nowhere.pem"}, "belong together"),
        ({"tls_ca": "/nowhere.pem"}, "replica.tls_ca"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path: Path, changed: dict[str, str], words: str) -> None:
    with pytest.raises(Refusal, match=words):
        open_doorway(table(tmp_path, **changed))


@pytest.mark.parametrize("secret", [b"short", b"", b"two words in one line\n", b"\xff" * 20, b"x" * 5000])
def test_a_secret_that_is_none_is_refused_with_the_cure(tmp_path: Path, secret: bytes) -> None:
    given = table(tmp_path)
    (tmp_path / "secret").write_bytes(secret)
    with pytest.raises(Refusal, match=r"replica\.secret_file"):
        open_doorway(given)


def test_a_secret_is_made_once_for_all_who_start_together(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda _: make_secret(path), range(16)))
    assert made.count(True) == 1
    assert path.stat().st_mode & 0o777 == 0o600
    kept = path.read_text()
    given = ReplicaTable(listen="127.0.0.1:0", secret_file=str(path))
    doors = [open_doorway(given), open_doorway(given)]
    for one in doors:
        one.listener.close()
    assert {one.secret for one in doors} == {kept.strip()}
    assert len(kept.strip()) == 64
    assert [entry.name for entry in tmp_path.iterdir()] == ["secret"]


def test_a_door_opens_with_a_secret_of_its_own_making_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    door = open_doorway(ReplicaTable(listen="127.0.0.1:0", secret_file=str(tmp_path / "secret")))
    door.listener.close()
    assert door.secret == (tmp_path / "secret").read_text().strip()
    assert "replicas on other machines need a copy of it" in caplog.text


def test_paths_belong_to_the_folder_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "coordinator.toml"
    path.write_text('config_version = 1\n[replica]\nlisten = "127.0.0.1:9090"\nsecret_file = "secret"\n')
    found = load(path).replica
    assert found is not None
    assert (found.secret_file, found.tls_cert) == (str(tmp_path / "secret"), "")
    assert in_folder(found, Path("/elsewhere")).secret_file == str(tmp_path / "secret")
    path.write_text('config_version = 1\n[replica]\nlisten = "127.0.0.1:9090"\n')
    with pytest.raises(Refusal, match="secret_file"):
        load(path)
