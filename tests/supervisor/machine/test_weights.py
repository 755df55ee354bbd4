"""Digests of model files: caching, folders, damage."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import trio

from protocol.engine_wire import Model
from protocol.faults import FaultError
from supervisor.host.work import EngineSpec, ModelSpec
from supervisor.machine import weights
from supervisor.machine.weights import Digests, folder_digest, hash_file, verify

FIXTURE = Path(__file__).parents[3] / "engines" / "whisper" / "fixture" / "whisper-tiny-test"
ENGINE = EngineSpec(name="whisper", module="engines.whisper.engine", python="python")


def spec(path: Path, sha256: str = "", **options: object) -> ModelSpec:
    model = Model(name="m", files={"model": str(path)}, options=dict(options))
    return ModelSpec(name="m", engine=ENGINE, model=model, sha256={"model": sha256} if sha256 else {})


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF" + bytes(range(256)) * 40)
    return path


async def test_a_good_file_passes_and_upper_case_digests_are_the_same(file: Path):
    wanted = sha(file.read_bytes())
    assert await verify(spec(file, wanted)) == await verify(spec(file, wanted.upper()))


async def test_a_flipped_bit_is_refused_with_both_digests(file: Path):
    wanted = sha(file.read_bytes())
    data = bytearray(file.read_bytes())
    data[100] ^= 0x10
    file.write_bytes(data)
    with pytest.raises(FaultError) as caught:
        await verify(spec(file, wanted))
    fault = caught.value.fault
    assert fault.code == "model_corrupt"
    assert str(file) in fault.message
    assert wanted in fault.message
    assert sha(bytes(data)) in fault.message


async def test_a_truncated_file_is_refused(file: Path):
    wanted = sha(file.read_bytes())
    os.truncate(file, 1000)
    with pytest.raises(FaultError, match="damaged"):
        await verify(spec(file, wanted))


async def test_a_bit_flip_inside_a_model_folder_is_refused(tmp_path: Path):
    folder = tmp_path / "whisper"
    shutil.copytree(FIXTURE, folder)
    good = Digests().digest(folder)
    await verify(spec(folder, good))
    data = bytearray((folder / "model.bin").read_bytes())
    data[len(data) // 2] ^= 1
    (folder / "model.bin").write_bytes(data)
    with pytest.raises(FaultError) as caught:
        await verify(spec(folder, good))
    assert caught.value.fault.code == "model_corrupt"


@pytest.mark.parametrize("change", ["add", "remove", "rename"])
def test_the_digest_of_a_folder_covers_names_and_members(tmp_path: Path, change: str):
    folder = tmp_path / "model"
    shutil.copytree(FIXTURE, folder)
    before = Digests().digest(folder)
    if change == "add":
        (folder / "more.json").write_text("{}")
    elif change == "remove":
        (folder / "config.json").unlink()
    else:
        (folder / "config.json").rename(folder / "konfig.json")
    assert Digests().digest(folder) != before


def test_the_digest_of_a_folder_is_what_the_documented_command_says(tmp_path: Path):
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    (folder / "b.txt").write_bytes(b"b")
    (folder / "sub" / "ä.txt").write_bytes(b"a")
    (folder / "sub.txt").write_bytes(b"c")
    command = "find -L . -type f -printf '%P\\0' | LC_ALL=C sort -z | xargs -0 sha256sum | sha256sum"
    said = subprocess.run(["bash", "-c", command], cwd=folder, capture_output=True, text=True, check=True)
    assert said.stdout.split()[0] == Digests().digest(folder)
    names = {"b.txt": sha(b"b"), "sub/ä.txt": sha(b"a"), "sub.txt": sha(b"c")}
    assert folder_digest(names) == Digests().digest(folder)


def test_an_unchanged_file_is_hashed_once_also_across_restarts(file: Path, tmp_path: Path, monkeypatch):
    hashed: list[Path] = []

    def counting(path: Path, checkpoint: object = None) -> str:
        hashed.append(path)
        return hash_file(path)

    monkeypatch.setattr(weights, "hash_file", counting)
    state = tmp_path / "state" / "digests.json"
    first = Digests(state).digest(file)
    assert Digests(state).digest(file) == first
    assert len(hashed) == 1


@pytest.mark.parametrize("how", ["mtime", "inode", "size"])
def test_a_changed_file_is_hashed_again(file: Path, tmp_path: Path, how: str):
    digests = Digests(tmp_path / "digests.json")
    before = digests.digest(file)
    state = file.stat()
    data = bytearray(file.read_bytes())
    data[50] ^= 1
    if how == "size":
        data += b"x"
    if how == "inode":
        other = file.with_suffix(".new")
        other.write_bytes(data)
        other.replace(file)
    else:
        file.write_bytes(data)
    if how != "mtime":  # the same time: only inode or size can tell
        os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))
    else:
        os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns + 1))
    assert digests.digest(file) != before


def test_a_damaged_cache_file_costs_only_a_rehash(file: Path, tmp_path: Path):
    state = tmp_path / "digests.json"
    state.write_text("{ not json")
    assert Digests(state).digest(file) == sha(file.read_bytes())
    assert Digests(state).digest(file) == sha(file.read_bytes())


def test_the_cache_forgets_the_oldest(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(weights, "MAX_REMEMBERED", 2)
    digests = Digests(tmp_path / "digests.json")
    for name in "abc":
        (tmp_path / name).write_text(name)
        digests.digest(tmp_path / name)
    assert (tmp_path / "digests.json").read_text().count('"sha256"') == 2


async def test_the_revision_changes_with_files_and_options_only(file: Path):
    one = await verify(spec(file, n_ctx=512))
    assert one == await verify(spec(file, n_ctx=512))
    assert one != await verify(spec(file, n_ctx=1024))
    file.write_bytes(b"other")
    assert one != await verify(spec(file, n_ctx=512))


async def test_missing_files_and_empty_folders_are_load_faults(tmp_path: Path):
    for path in (tmp_path / "absent.gguf", tmp_path / "empty"):
        if path.name == "empty":
            path.mkdir()
        with pytest.raises(FaultError) as caught:
            await verify(spec(path))
        assert caught.value.fault.code == "load_failed"
        assert caught.value.fault.field == "files.model"


async def test_a_digest_for_an_unknown_role_is_refused(file: Path):
    model = Model(name="m", files={"model": str(file)})
    bad = ModelSpec(name="m", engine=ENGINE, model=model, sha256={"vae": "0" * 64})
    with pytest.raises(FaultError, match="'vae'"):
        await verify(bad)


async def test_hashing_stops_at_the_next_chunk_when_cancelled(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(weights, "CHUNK_BYTES", 4096)
    big = tmp_path / "big"
    big.write_bytes(bytes(2**20))
    reached = trio.Event()
    chunks = 0
    real = trio.from_thread.check_cancelled

    def watched() -> None:
        nonlocal chunks
        chunks += 1
        if chunks == 3:
            trio.from_thread.run_sync(reached.set)
            while True:  # until the cancel arrives
                real()

    monkeypatch.setattr(trio.from_thread, "check_cancelled", watched)
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(verify, spec(big))
            await reached.wait()
            nursery.cancel_scope.cancel()
    assert chunks == 3
