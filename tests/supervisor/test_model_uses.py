"""What a load does to the models folder, and what is said when a file is missing."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from protocol.engine_wire import Model
from protocol.faults import FaultError, Owner
from supervisor.host.work import EngineSpec, ModelSpec
from supervisor.model_guess import Guess
from supervisor.model_store import Kept, Manifest, Store
from supervisor.model_uses import ModelUses


async def fine(_spec: ModelSpec) -> str:
    return "revision"


def spec(path: Path, **files: Path) -> ModelSpec:
    named = {role: str(file) for role, file in {"model": path, **files}.items()}
    return ModelSpec(
        name="chat", engine=EngineSpec(name="llm", module="x", python="x"), model=Model(name="chat", files=named)
    )


@pytest.fixture
def store(tmp_path: Path) -> Store:
    made = Store(tmp_path / "models")
    made.open_for_writing()
    made.staging("m").mkdir()
    (made.staging("m") / "f").write_bytes(b"abc")
    kept = {"f": Kept(size_bytes=3, sha256="ab" * 32)}
    made.settle(
        "m",
        Manifest(
            name="chat",
            kind="hub",
            source="o/r",
            file="f",
            origin="o/r",
            pulled_at=1,
            files=kept,
            guess=Guess(main="f"),
        ),
    )
    return made


async def missing(store: Store) -> str:
    (store.folder("m") / "f").unlink(missing_ok=True)
    with pytest.raises(FaultError) as caught:
        await ModelUses(fine).verify(spec(store.folder("m") / "f"))
    fault = caught.value.fault
    assert (fault.code, fault.owner, fault.field) == ("load_failed", Owner.ENGINE, "files.model")
    assert fault.detail["missing"] == str(store.folder("m") / "f")
    return fault.message


async def test_a_load_is_noted_and_keeps_the_model(store: Store):
    uses = ModelUses(fine)
    assert await uses.verify(spec(store.folder("m") / "f")) == "revision"
    assert await uses.verify(spec(store.folder("m") / "f")) == "revision"
    assert store.is_loaded("m")
    assert store.remove("m") is False
    uses.close()
    assert not store.is_loaded("m")
    assert store.last_loaded("m") is not None


async def test_a_reload_without_the_model_lets_go_of_it(store: Store, tmp_path: Path):
    uses = ModelUses(fine)
    await uses.verify(spec(store.folder("m") / "f"))
    uses.keep_only({store.folder("m") / "f", tmp_path / "other"})
    assert store.is_loaded("m")
    uses.keep_only({tmp_path / "other"})
    assert not store.is_loaded("m")


async def test_files_that_were_not_pulled_are_left_alone(tmp_path: Path):
    (tmp_path / "own.gguf").write_bytes(b"x")
    assert await ModelUses(fine).verify(spec(tmp_path / "own.gguf")) == "revision"
    assert [path.name for path in tmp_path.iterdir()] == ["own.gguf"]


async def test_what_verify_finds_goes_through(store: Store):
    async def corrupt(_spec: ModelSpec) -> str:
        raise ValueError("as asked")

    with pytest.raises(ValueError, match="as asked"):
        await ModelUses(corrupt).verify(spec(store.folder("m") / "f"))


async def test_a_model_that_is_being_deleted_is_refused_after_a_while(store: Store, autojump_clock: MockClock):
    path = store.folder("m") / "f"
    with store._alone("m"), pytest.raises(FaultError, match="is being deleted"):
        await ModelUses(fine).verify(spec(path))
    assert 1.0 < trio.current_time() < 10.0
    assert await ModelUses(fine).verify(spec(path)) == "revision"


# ---- why a file is missing -----------------------------------------------------------------------------------


async def test_a_failed_pull_is_told_with_its_cure(store: Store):
    store.note_failure("m", "o/r is gated: accept its terms on its page.")
    message = await missing(store)
    assert "Model 'chat'" in message
    assert "failed: o/r is gated: accept its terms on its page." in message


async def test_a_pull_at_work_is_told(store: Store):
    with store.pulling("m"):
        assert "a pull of it is at work" in await missing(store)


async def test_a_deleted_file_names_the_command_that_brings_it_back(store: Store):
    assert "`supervisor models pull o/r:f --name chat --force`" in await missing(store)


async def test_an_interrupted_pull_is_told(store: Store):
    store.remove("m")
    store.staging("m").mkdir()
    assert "its pull was interrupted" in await missing(store)


async def test_a_model_that_was_never_pulled_is_told(store: Store):
    store.remove("m")
    assert "`supervisor models pull` brings it" in await missing(store)


async def test_another_role_and_a_file_of_ones_own(tmp_path: Path):
    (tmp_path / "own.gguf").write_bytes(b"x")
    with pytest.raises(FaultError, match=r"correct the path in worker\.toml") as caught:
        await ModelUses(fine).verify(spec(tmp_path / "own.gguf", mmproj=tmp_path / "gone.gguf"))
    assert caught.value.fault.field == "files.mmproj"
