"""The register's file: other processes, old versions, a disk that is full, a file that is damaged."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from coordinator.cli.main import main
from coordinator.keys import Keys, digest
from coordinator.register import SqliteRegister, Turn
from coordinator.register.schema import MIGRATIONS
from coordinator.store import StoreError
from coordinator.store.base import StoreTooNew
from protocol.faults import FaultError

OLD = """
CREATE TABLE keys (
    hash BLOB PRIMARY KEY, prefix TEXT NOT NULL, scope TEXT NOT NULL, tenant TEXT NOT NULL, name TEXT NOT NULL,
    worker TEXT NOT NULL, created_ms INTEGER NOT NULL, revoked_ms INTEGER
) WITHOUT ROWID
"""
OLD_SECRET = "bhc_" + "o" * 43


@pytest.mark.parametrize("registrations", [False, True])
def test_a_file_of_the_first_version_keeps_working(tmp_path: Path, registrations: bool) -> None:
    path = tmp_path / "keys.sqlite"
    db = sqlite3.connect(path, isolation_level=None)
    db.execute(OLD)
    row = (digest(OLD_SECRET), OLD_SECRET[:12], "client", "acme", "old", "", 5)
    db.execute("INSERT INTO keys VALUES (?, ?, ?, ?, ?, ?, ?, NULL)", row)
    if registrations:
        for statement in MIGRATIONS[0]:
            db.execute(statement.format(blob="BLOB", int="INTEGER", rowless=" WITHOUT ROWID"))
        db.execute("PRAGMA user_version = 1")
    db.close()
    keys = Keys(path)
    try:
        found = keys.find(OLD_SECRET)
        assert found is not None
        assert (found.tenant, found.created_ms, found.rpm, found.models) == ("acme", 5, 0, ())
        keys.revoke(OLD_SECRET[:12])
        assert keys.find(OLD_SECRET) is None
    finally:
        keys.close()


def test_a_file_of_a_later_version_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "keys.sqlite"
    SqliteRegister(path).close()
    db = sqlite3.connect(path)
    db.execute("PRAGMA user_version = 99")
    db.close()
    with pytest.raises(StoreTooNew, match="install that version"):
        SqliteRegister(path)


def fill(keys: Keys) -> None:
    for _ in range(1000):
        keys.create("client", name="n" * 200)


def test_a_full_disk_is_said_and_keys_are_found_all_the_same(tmp_path: Path) -> None:
    register = SqliteRegister(tmp_path / "keys.sqlite")
    keys = Keys(register)
    secret = keys.create("client")
    pages = register._writer.execute("PRAGMA page_count").fetchone()[0]
    register._writer.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(FaultError, match="disk is full"):
        fill(keys)
    assert keys.find(secret) is not None
    register._writer.execute("PRAGMA max_page_count = 1000000")
    assert keys.find(keys.create("client")) is not None
    keys.close()


def test_a_transaction_that_fails_leaves_nothing(tmp_path: Path) -> None:
    keys = Keys(tmp_path / "keys.sqlite")

    def fail(turn: Turn) -> None:
        turn.act("me", "half an act")
        raise KeyError

    with pytest.raises(KeyError):
        keys.known.register.write(fail)
    assert not keys.known.register.read("SELECT * FROM acts")
    assert keys.known.register.read("SELECT number FROM changes")[0]["number"] == 1
    keys.close()
    with pytest.raises(StoreError, match="closed"):
        keys.create("client")


@pytest.mark.parametrize("damage", [b"", b"not a database", b"SQLite format 3\0" + b"\xff" * 4080])
def test_a_damaged_file_is_named_with_its_cure(
    tmp_path: Path, damage: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "keys.sqlite"
    path.write_bytes(damage)
    path.chmod(0o600)
    code = main(["keys", "list", "--state", str(tmp_path)])
    if not damage:
        assert code == 0  # an empty file is an empty register
        return
    assert code == 1
    said = capsys.readouterr().err
    assert f"coordinator: {path} cannot be opened as the register of keys" in said
    assert "backup" in said


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "keys.sqlite").mkdir()
    assert main(["keys", "list", "--state", str(tmp_path)]) == 1
    assert "cannot be opened as the register of keys" in capsys.readouterr().err


def test_processes_that_create_and_revoke_beside_each_other_lose_nothing(tmp_path: Path) -> None:
    """The first of them also makes the file, and all of them its tables."""
    code = (
        "import sys; from pathlib import Path; from coordinator.keys import Keys\n"
        "keys = Keys(Path(sys.argv[1]))\n"
        "for n in range(8):\n"
        "    secret = keys.create('client')\n"
        "    if n % 2: keys.revoke(secret[:12])\n"
        "    else: print(secret)\n"
    )
    path = tmp_path / "keys.sqlite"
    argv = [sys.executable, "-c", code, str(path)]
    beside = [subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    made = [secret for process in beside for secret in process.communicate(timeout=300)[0].split()]
    assert [process.returncode for process in beside] == [0, 0, 0]
    keys = Keys(path)
    assert len(made) == 12
    assert all(keys.find(secret) is not None for secret in made)
    assert sum(1 for key in keys.list() if key.revoked_ms is None) == 12
    assert keys.known.register.read("SELECT number FROM changes")[0]["number"] == 1 + 3 * 12
    keys.close()
