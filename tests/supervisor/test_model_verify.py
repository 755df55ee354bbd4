"""Rehashing: what is found, and that the supervisor's memory of digests does not outlive it."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from supervisor.machine.weights import Digests, folder_digest
from supervisor.model_guess import Guess
from supervisor.model_store import Kept, Manifest
from supervisor.model_verify import compared, damages
from supervisor.pull_wire import Progress
from supervisor.settings import ModelTable


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "m" / "sub").mkdir(parents=True)
    (tmp_path / "m" / "a.gguf").write_bytes(b"abc")
    (tmp_path / "m" / "sub" / "b").write_bytes(b"defg")
    return tmp_path / "m"


def manifest(main: str = "a.gguf") -> Manifest:
    kept = {"a.gguf": Kept(size_bytes=3, sha256=sha(b"abc")), "sub/b": Kept(size_bytes=4, sha256=sha(b"defg"))}
    return Manifest(name="m", kind="url", source="u", origin="u", pulled_at=1, files=kept, guess=Guess(main=main))


def found(folder: Path, main: str = "a.gguf") -> list[str]:
    seen: list[Progress] = []
    return damages(folder, manifest(main), seen.append)


def test_a_whole_model(folder: Path):
    assert found(folder) == []
    assert found(folder, main="") == []


def test_every_kind_of_damage(folder: Path):
    (folder / "a.gguf").write_bytes(b"abX")
    (folder / "sub" / "b").write_bytes(b"def")
    first, second = found(folder)
    assert first == f"a.gguf is damaged: it has the sha256 {sha(b'abX')} where {sha(b'abc')} was pulled"
    assert second == "sub/b has 3 bytes where 4 were pulled"
    (folder / "sub" / "b").unlink()
    assert found(folder)[1] == "sub/b cannot be read: No such file or directory"


def test_a_file_too_many_counts_where_the_engine_takes_the_folder(folder: Path):
    (folder / "more.bin").write_bytes(b"")
    assert found(folder) == []
    assert found(folder, main="") == ["more.bin was not pulled"]


def test_bit_rot_under_unchanged_metadata_is_refused_at_the_next_load(folder: Path):
    path = folder / "a.gguf"
    memory = Digests()
    assert memory.digest(path) == sha(b"abc")
    before = path.stat()
    path.write_bytes(b"abX")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert memory.digest(path) == sha(b"abc"), "the memory believes the metadata"
    assert len(found(folder)) == 1
    assert memory.digest(path) == sha(b"abX")


def test_a_model_of_ones_own_is_compared_with_worker_toml(folder: Path):
    path = str(folder / "a.gguf")
    table = ModelTable(name="m", engine="llm", path=path, sha256={"model": sha(b"abc").upper()})
    result = compared(table, lambda _progress: None)
    assert (result.ok, result.bytes, result.problems) == (True, 3, ())
    (folder / "a.gguf").write_bytes(b"abX")
    result = compared(table, lambda _progress: None)
    assert result.ok is False
    assert "worker.toml says" in result.problems[0]
    assert compared(ModelTable(name="m", engine="llm", path=path), print).ok is None


def test_a_folder_of_ones_own(folder: Path):
    digest = folder_digest({"a.gguf": sha(b"abc"), "sub/b": sha(b"defg")})
    table = ModelTable(name="m", engine="whisper", path=str(folder), sha256={"model": digest})
    assert compared(table, lambda _progress: None).ok
    (folder / "sub" / "b").unlink()
    assert not compared(table, lambda _progress: None).ok


def test_progress_is_told_for_large_files(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("supervisor.model_verify._EVERY_S", 0.0)
    seen: list[Progress] = []
    damages(folder, manifest(), seen.append)
    assert [(each.done_bytes, each.total_bytes, each.phase) for each in seen] == [(3, 7, "hash"), (7, 7, "hash")]
