"""`supervisor models search | list | verify | gc | remove` on a real folder and a real worker.toml."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from supervisor.errors import ExitCode
from supervisor.model_commands import read_size
from supervisor.model_gc import plan
from supervisor.model_store import Store, StoreError

CHAT = Path(__file__).parents[2] / "engines" / "llm" / "fixture" / "chat-q8_0.gguf"
SIZE = CHAT.stat().st_size


@pytest.fixture
def box(models_box: Any) -> Any:
    """`conftest.ModelsBox`."""
    return models_box


@pytest.fixture
def store(box: Any) -> Store:
    return Store(box.models)


def bring(box: Any, name: str, *, named: bool = True, loaded_at: float = 0.0) -> Path:
    """Pull a model that is a file of its own, not a link; `named` leaves its entry in worker.toml."""
    shutil.copy(CHAT, f"{name}.gguf")
    assert box.run("pull", f"{name}.gguf") == 0, box.err
    Path(f"{name}.gguf").unlink()
    if not named:
        assert box.run("remove", name, "--keep-files") == 0
    if loaded_at:
        use = box.models / ".store" / "uses" / name
        use.touch()
        os.utime(use, (loaded_at, loaded_at))
    folder: Path = box.models / name
    return folder


# ---- search --------------------------------------------------------------------------------------------------


def test_search_shows_what_can_be_pulled(box: Any):
    assert box.run("search") == 0
    assert "qwen3-4b" in box.out
    assert "Apache-2.0" in box.out
    assert box.run("search", "whisper", "large") == 0
    assert "whisper-large-v3" in box.out
    assert "qwen3-4b" not in box.out
    assert box.run("search", "--json", "embedding") == 0
    assert {row["kind"] for row in json.loads(box.out)} == {"embedding"}


def test_search_finds_nothing(box: Any):
    assert box.run("search", "quen3-4b") == ExitCode.FAILED
    assert "Did you mean qwen3-4b?" in box.err
    assert box.err.count("\n") == 1
    assert box.run("search", "zzz") == ExitCode.FAILED
    assert "catalogue.toml" in box.err
    assert box.run("search", "zzz", "--json") == ExitCode.FAILED
    assert json.loads(box.out) == []


def test_a_broken_catalogue_is_told_with_its_line(box: Any):
    box.toml.parent.mkdir(parents=True)
    (box.toml.parent / "catalogue.toml").write_text("[m]\nsource = 1\n")
    assert box.run("search") == ExitCode.BAD_CONFIG
    assert "catalogue.toml:2: m.source" in box.err


# ---- list ----------------------------------------------------------------------------------------------------


def test_the_list_knows_whence_when_and_who(box: Any, store: Store):
    bring(box, "first", loaded_at=1_700_000_000.0)
    bring(box, "second", named=False)
    store.staging("third").mkdir()
    store.note_failure("third", "It was gated.")
    assert box.run("list", "--json") == 0
    rows = {row["name"]: row for row in json.loads(box.out)}
    assert {name: row["state"] for name, row in rows.items()} == {
        "first": "ready",
        "second": "unnamed",
        "third": "interrupted",
    }
    assert rows["first"]["last_loaded"] == 1_700_000_000.0
    assert rows["first"]["bytes"] == rows["second"]["bytes"] == SIZE
    assert rows["first"]["source"].endswith("first.gguf")
    assert abs(rows["first"]["pulled_at"] - time.time()) < 600
    assert rows["second"]["last_loaded"] is None
    assert rows["third"]["problem"] == "It was gated."
    lock = store.use("second")
    assert lock is not None
    assert box.run("list") == 0
    assert "now" in box.out
    assert "interrupted" in box.out
    os.close(lock)


# ---- verify --------------------------------------------------------------------------------------------------


def test_verify_reads_everything_again(box: Any):
    good, bad = bring(box, "good"), bring(box, "bad", named=False)
    assert box.run("verify") == 0, box.err
    assert "good: as it was pulled" in box.out
    data = bytearray((bad / "bad.gguf").read_bytes())
    data[1000] ^= 1
    (bad / "bad.gguf").write_bytes(data)
    assert box.run("verify") == ExitCode.FAILED
    assert "bad: NOT as it was pulled" in box.out
    assert hashlib.sha256(data).hexdigest() in box.out
    assert "--force" in box.err
    assert box.run("verify", "good") == 0
    assert "bad" not in box.out
    assert box.run("verify", "--json") == ExitCode.FAILED
    assert {row["name"]: row["ok"] for row in json.loads(box.out)} == {"good": True, "bad": False}
    assert good.is_dir()
    assert box.run("verify", "nonesuch") == ExitCode.FAILED
    assert "no model nonesuch" in box.err


def test_verify_takes_models_of_ones_own_by_worker_toml(box: Any):
    own = box.folder / "own.gguf"
    shutil.copy(CHAT, own)
    Path("worker.toml").write_text(f'[[models]]\nname = "own"\nengine = "llm"\npath = "{own}"\n')
    assert box.run("verify") == 0
    assert "own: no digest to compare with" in box.out


# ---- gc ------------------------------------------------------------------------------------------------------


def test_gc_takes_the_longest_unused_and_leaves_what_is_named(box: Any):
    bring(box, "named", loaded_at=1.0)
    bring(box, "old", named=False)
    bring(box, "new", named=False, loaded_at=time.time() + 60)
    assert box.run("gc", "--budget", f"{2 * SIZE}", "--dry-run") == 0, box.err
    assert "old would go" in box.out
    assert (box.models / "old").is_dir()
    assert box.run("gc", "--budget", f"{2 * SIZE}", "--json") == 0
    told = json.loads(box.out)
    assert [row["name"] for row in told["deleted"]] == ["old"]
    assert (told["before_bytes"], told["after_bytes"]) == (3 * SIZE, 2 * SIZE)
    assert sorted(path.name for path in box.models.iterdir()) == [".store", "named", "new"]
    assert box.run("gc", "--budget", "0") == ExitCode.FAILED
    assert "new is deleted" in box.out
    assert "named: worker.toml names it" in box.err
    box.check()


def test_gc_never_takes_what_a_supervisor_has_loaded(box: Any, store: Store):
    bring(box, "loaded", named=False)
    lock = store.use("loaded")
    assert lock is not None
    assert box.run("gc", "--budget", "0") == ExitCode.FAILED
    assert "a running supervisor has loaded it" in box.err
    os.close(lock)
    assert box.run("gc", "--budget", "0") == 0
    assert not (box.models / "loaded").exists()


def test_gc_spares_what_another_worker_toml_names(box: Any):
    bring(box, "other")
    Path("worker.toml").write_text("")
    assert box.run("gc", "--budget", "0") == ExitCode.FAILED, "it was pulled for the one in the home folder"
    assert (box.models / "other").is_dir()
    box.toml.write_text("[[models]]\n")
    assert box.run("gc", "--budget", "0") == ExitCode.BAD_CONFIG
    assert "nothing was deleted" in box.err
    assert (box.models / "other").is_dir()


def test_gc_spares_what_was_entered_after_it_had_chosen(box: Any, monkeypatch: pytest.MonkeyPatch):
    """A pull adopts the model between the choice and the deletion."""
    folder = bring(box, "m", named=False)

    def chosen_then_entered(*args: Any) -> Any:
        chosen = plan(*args)
        assert [going.held.key for going in chosen.going] == ["m"]
        with box.toml.open("a") as file:
            file.write(f'\n[[models]]\nname = "m"\nengine = "llm"\npath = "{folder}/m.gguf"\n')
        return chosen

    monkeypatch.setattr("supervisor.model_commands.plan", chosen_then_entered)
    assert box.run("gc", "--budget", "0") == ExitCode.FAILED
    box.check()


def test_gc_without_a_worker_toml_deletes_nothing(box: Any):
    bring(box, "m")
    box.toml.unlink()
    assert box.run("gc", "--budget", "0") == ExitCode.FAILED
    assert "--config" in box.err
    assert (box.models / "m").is_dir()


def test_gc_clears_what_a_killed_deletion_left(box: Any, store: Store):
    bring(box, "m")
    leftover = box.models / ".replaced-x"
    leftover.mkdir()
    (leftover / "f").write_bytes(b"12345")
    store.staging("begun").mkdir()
    assert box.run("gc", "--budget", "1TB") == 0
    assert not leftover.exists()
    assert store.interrupted() == ["begun"], "within the budget an interrupted pull may still be resumed"


@pytest.mark.parametrize(
    ("text", "count"),
    [("0", 0), ("50GB", 50 * 10**9), ("20 GiB", 20 * 2**30), ("1.5tb", 1_500_000_000_000), ("7", 7)],
)
def test_sizes(text: str, count: int):
    assert read_size(text) == count


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "5 parsecs", "1e3"])
def test_what_is_no_size(text: str):
    with pytest.raises(StoreError, match="is no size"):
        read_size(text)


# ---- remove --------------------------------------------------------------------------------------------------


def test_removing_a_loaded_model_leaves_its_files_to_gc(box: Any, store: Store):
    folder = bring(box, "m")
    lock = store.use("m")
    assert lock is not None
    assert box.run("remove", "m") == 0
    assert "a running supervisor uses" in box.out
    assert folder.is_dir()
    os.close(lock)
    assert box.run("gc", "--budget", "0") == 0
    assert not folder.exists()


def forget_entry(box: Any) -> None:
    """As a pull that was killed before it wrote the entry leaves worker.toml."""
    box.toml.write_text("")


def test_what_a_pull_left_is_deleted_by_its_name(box: Any):
    folder = bring(box, "m")
    forget_entry(box)
    assert box.run("remove", "m") == 0
    assert "what a pull of it left is deleted" in box.out
    assert not folder.exists()


def test_what_a_pull_left_and_somebody_works_on_is_told_as_that(box: Any, store: Store):
    folder = bring(box, "m")
    forget_entry(box)
    with store.pulling("m"):
        assert box.run("remove", "m") == ExitCode.FAILED
        assert "in use" in box.err
        assert "has no model named" not in box.err
    lock = store.use("m")
    assert lock is not None
    assert box.run("remove", "m") == ExitCode.FAILED
    assert "in use" in box.err
    os.close(lock)
    assert folder.is_dir()
    assert box.run("remove", "m") == 0


def test_what_a_pull_at_work_has_fetched_so_far_stays(box: Any, store: Store):
    store.staging("m").mkdir(parents=True)
    with store.pulling("m"):
        assert box.run("remove", "m") == ExitCode.FAILED
        assert "in use" in box.err
    assert store.staging("m").is_dir()
    assert box.run("remove", "m") == 0
    assert not store.staging("m").exists()


def test_what_was_entered_just_before_its_deletion_stays(box: Any, monkeypatch: pytest.MonkeyPatch):
    folder = bring(box, "m")
    entries = box.toml.read_text()
    forget_entry(box)
    alone = Store._alone

    def entered(self: Store, key: str) -> Any:
        box.toml.write_text(entries)
        return alone(self, key)

    monkeypatch.setattr(Store, "_alone", entered)
    assert box.run("remove", "m") == ExitCode.FAILED
    assert folder.is_dir()


def test_a_part_that_another_worker_toml_began_stays(box: Any, store: Store):
    store.staging("m").mkdir(parents=True)
    other = box.folder / "other.toml"
    with store.pulling("m", str(other)):
        pass
    assert box.run("remove", "m") == ExitCode.FAILED
    assert "has no model named m" in box.err
    assert store.staging("m").is_dir()
    with store.pulling("m", str(box.toml.resolve())):
        pass
    assert box.run("remove", "m") == 0
    assert not store.staging("m").exists()
