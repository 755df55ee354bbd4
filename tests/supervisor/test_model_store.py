"""The models folder: its locks, its manifests, and what is left when somebody is killed half way."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from supervisor.errors import NoPermission
from supervisor.model_guess import Guess
from supervisor.model_store import Kept, Manifest, Store, StoreError, folder_bytes, home_of

HOLD = """
import sys
from pathlib import Path
from supervisor.model_store import Store
store = Store(Path(sys.argv[1]))
if sys.argv[2] == "pull":
    lock = store.pulling("m")
    lock.__enter__()
else:
    lock = store.use("m")
print("held", flush=True)
sys.stdin.read()
"""


def manifest(**fields: object) -> Manifest:
    plain = {"name": "m", "kind": "local", "source": "/x", "origin": "/x", "pulled_at": 1.0, "guess": Guess(main="f")}
    return Manifest(**{**plain, "files": {"f": Kept(size_bytes=3, sha256="ab" * 32)}, **fields})  # type: ignore[arg-type]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    made = Store(tmp_path / "models")
    made.open_for_writing()
    return made


def pulled(store: Store, key: str = "m", text: bytes = b"abc") -> Path:
    store.staging(key).mkdir(parents=True)
    (store.staging(key) / "f").write_bytes(text)
    store.settle(key, manifest())
    return store.folder(key)


@pytest.fixture
def holder(store: Store):
    """Start another process that holds a lock; killed with SIGKILL, as the worst end."""
    running: list[subprocess.Popen[str]] = []

    def hold(what: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", HOLD, str(store.models), what],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        running.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        return process

    yield hold
    for process in running:
        process.kill()
        process.communicate()


def test_a_store_that_does_not_exist_is_empty(tmp_path: Path):
    nothing = Store(tmp_path / "none")
    assert nothing.keys() == []
    assert nothing.interrupted() == []
    assert nothing.manifest("m") is None
    assert nothing.failure("m") is None
    assert nothing.last_loaded("m") is None
    assert not nothing.is_loaded("m")
    assert not (tmp_path / "none").exists(), "asking makes nothing"


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(NoPermission, match="--models-dir"):
        Store(tmp_path / "file" / "models").open_for_writing()


def test_a_model_gets_its_place_and_its_manifest(store: Store):
    store.note_failure("m", "It was gated.")
    folder = pulled(store)
    assert (folder / "f").read_bytes() == b"abc"
    assert os.listdir(folder) == ["f"], "the folder holds the model alone: its digest is over all files"
    assert store.manifest("m") == manifest()
    assert store.keys() == ["m"]
    assert store.interrupted() == []
    assert store.failure("m") is None, "a pull that succeeds takes back the failure"


def test_an_older_model_is_replaced(store: Store):
    pulled(store)
    pulled(store, text=b"new")
    assert (store.folder("m") / "f").read_bytes() == b"new"
    assert store.replaced() == []


def test_a_damaged_manifest_is_none(store: Store):
    pulled(store)
    (store.models / ".store" / "manifests" / "m").write_text("{")
    assert store.manifest("m") is None


def test_two_pulls_of_one_model_exclude_each_other_and_a_killed_one_lets_go(store: Store, holder):
    other = holder("pull")
    assert store.is_pulled_now("m")
    with pytest.raises(StoreError, match=rf"pid {other.pid}\); wait for it"), store.pulling("m"):
        pass
    with store.pulling("another"):
        pass
    assert store.remove_staging("m") is False
    other.kill()
    other.wait()
    assert not store.is_pulled_now("m")
    with store.pulling("m"):
        assert store.is_pulled_now("m")


def test_what_is_loaded_cannot_be_removed_until_its_supervisor_ends(store: Store, holder):
    pulled(store)
    supervisor = holder("use")
    assert store.is_loaded("m")
    assert store.last_loaded("m") is not None
    assert store.remove("m") is False
    assert store.folder("m").is_dir()
    supervisor.kill()
    supervisor.wait()
    assert store.remove("m") is True
    assert not store.folder("m").exists()
    assert store.manifest("m") is None
    assert store.last_loaded("m") is None, "the next model of this name was never loaded"


def test_a_model_that_was_named_meanwhile_is_not_removed(store: Store):
    pulled(store)
    lock = store.use("m")
    assert lock is not None
    os.close(lock)
    before = store.last_loaded("m")
    assert store.remove("m", lambda: True) is False
    assert store.folder("m").is_dir()
    assert store.last_loaded("m") == before
    assert store.remove("m", lambda: False) is True


def test_several_supervisors_may_use_one_model(store: Store, holder):
    pulled(store)
    holder("use")
    mine = store.use("m")
    assert mine is not None
    os.close(mine)
    assert store.is_loaded("m")


def test_a_model_that_is_being_deleted_cannot_be_used(store: Store):
    pulled(store)
    with store._alone("m") as alone:
        assert alone
        assert store.use("m") is None


def test_paths_find_their_model(store: Store, tmp_path: Path):
    folder = pulled(store)
    for path in (folder, folder / "f", folder / "deep" / "er"):
        found = home_of(path)
        assert found is not None
        assert (found[0].models, found[1]) == (store.models, "m")
    assert home_of(tmp_path / "own.gguf") is None
    assert home_of(store.models / ".store" / "manifests") is None


def test_sizes_are_of_all_files(tmp_path: Path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x").write_bytes(b"123")
    (tmp_path / "y").write_bytes(b"45")
    assert folder_bytes(tmp_path) == 5
