"""What goes when the models folder is over its budget: the pure choice, and the look at a real folder."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from supervisor.config import load
from supervisor.model_gc import Held, Links, is_named, named_paths, plan, survey
from supervisor.model_guess import Guess
from supervisor.model_store import Kept, Manifest, Store

NUMBERS = iter(range(1, 1_000_000))


def held(key: str, size: int, last_used: float, keep: str = "", what: str = "model") -> Held:
    inodes = {(1, next(NUMBERS)): Links(size, 1, 1)}
    return Held(key=key, what=what, last_used=last_used, keep=keep, inodes=inodes)  # type: ignore[arg-type]


def keys(chosen) -> list[str]:
    return [going.held.key for going in chosen.going]


def test_the_longest_unused_go_first_and_only_as_many_as_needed():
    chosen = plan([held("new", 10, 3), held("old", 10, 1), held("middle", 10, 2)], 15)
    assert keys(chosen) == ["old", "middle"]
    assert (chosen.before_bytes, chosen.after_bytes) == (30, 10)


def test_what_is_kept_stays_even_over_the_budget():
    chosen = plan([held("named", 100, 1, keep="worker.toml names it"), held("other", 5, 9)], 50)
    assert keys(chosen) == ["other"]
    assert chosen.after_bytes == 100


def test_within_the_budget_only_leftovers_go():
    chosen = plan([held("m", 10, 1), held(".replaced-x", 5, 0, what="leftover")], 100)
    assert keys(chosen) == [".replaced-x"]


def test_a_link_to_a_file_elsewhere_takes_no_room_and_is_not_deleted_for_room():
    linked = Held(key="linked", what="model", last_used=0, inodes={(1, next(NUMBERS)): Links(1000, 1, 2)})
    chosen = plan([linked, held("own", 10, 5)], 0)
    assert keys(chosen) == ["own"]
    assert (chosen.before_bytes, chosen.after_bytes) == (10, 0)


def test_two_models_that_share_a_file_free_it_together():
    shared = {(1, next(NUMBERS)): Links(1000, 1, 2)}
    twins = [Held(key=key, what="model", last_used=0, inodes=shared) for key in ("a", "b")]
    chosen = plan(twins, 0)
    assert chosen.before_bytes == 1000
    assert [(going.held.key, going.frees_bytes) for going in chosen.going] == [("a", 0), ("b", 1000)]


@pytest.mark.parametrize("seed", range(50))
def test_promises_hold_for_any_folder(seed: int):
    """Seeds are the parameter: `pytest -k 'any_folder and 17'` replays one."""
    dice = random.Random(seed)
    found = [
        held(f"m{n}", dice.randrange(1, 100), dice.random(), keep=dice.choice(("", "", "named")))
        for n in range(dice.randrange(20))
    ]
    budget = dice.randrange(600)
    chosen = plan(found, budget)
    gone = {going.held.key for going in chosen.going}
    stay = [one for one in found if one.key not in gone]
    sizes = {one.key: next(iter(one.inodes.values())).size_bytes for one in found}
    assert chosen.after_bytes == sum(sizes[one.key] for one in stay)
    assert not any(one.keep for one in found if one.key in gone)
    if chosen.after_bytes > budget:
        assert all(one.keep for one in stay), "over the budget nothing stays that may go"
    if chosen.going:
        last = chosen.going[-1]
        assert chosen.after_bytes + last.frees_bytes > budget, "the last one had to go"
        assert all(one.keep or one.last_used >= last.held.last_used for one in stay), "nothing older stays"


# ---- a real folder -------------------------------------------------------------------------------------------


@pytest.fixture
def store(tmp_path: Path) -> Store:
    made = Store(tmp_path / "models")
    made.open_for_writing()
    return made


def pulled(store: Store, key: str, at: float = 1.0) -> Path:
    store.staging(key).mkdir()
    (store.staging(key) / "f").write_bytes(b"abc")
    kept = {"f": Kept(size_bytes=3, sha256="ab" * 32)}
    store.settle(
        key, Manifest(name=key, kind="url", source="u", origin="u", pulled_at=at, files=kept, guess=Guess(main="f"))
    )
    return store.folder(key)


def reasons(store: Store, named: list[str]) -> dict[str, str]:
    return {one.key: one.keep for one in survey(store, named)}


def test_reasons_to_stay(store: Store):
    named, loaded, linked = pulled(store, "named"), pulled(store, "loaded"), pulled(store, "linked")
    pulled(store, "free")
    (store.folder("by-hand")).mkdir()
    link = store.models.parent / "link"
    link.symlink_to(linked)
    lock = store.use("loaded")
    assert lock is not None
    found = reasons(store, [str(named / "f"), str(link / "f")])
    os.close(lock)
    assert loaded.is_dir()
    assert found == {
        "named": "worker.toml names it",
        "linked": "worker.toml names it",
        "loaded": "a running supervisor has loaded it",
        "by-hand": "it was not pulled by this program",
        "free": "",
    }


def test_the_last_load_counts_not_the_pull(store: Store):
    pulled(store, "never", at=100.0)
    pulled(store, "loaded", at=1.0)
    lock = store.use("loaded")
    assert lock is not None
    os.close(lock)
    (first, second) = survey(store, [])
    assert (first.key, second.key, second.last_used) == ("loaded", "never", 100.0)
    assert first.last_used > 1e9


def test_interrupted_pulls_may_go_unless_one_is_at_work(store: Store):
    store.staging("begun").mkdir()
    (store.staging("begun") / "f.part").write_bytes(b"12345")
    (store.models / ".replaced-x").mkdir()
    found = {one.key: one for one in survey(store, [])}
    assert (found["begun"].what, found["begun"].keep) == ("interrupted", "")
    assert found[".replaced-x"].what == "leftover"
    with store.pulling("begun"):
        assert reasons(store, [])["begun"] == "a pull works on it"


def test_a_model_is_named_by_options_and_grants_too(tmp_path: Path):
    folder = tmp_path / "models" / "lora"
    folder.mkdir(parents=True)
    toml = tmp_path / "worker.toml"
    toml.write_text(
        f'[engines.odd]\nmodule = "odd.engine"\noptions = {{ deep = {{ adapters = ["{folder}/x.gguf"] }} }}\n'
        f'[[models]]\nname = "s"\nengine = "server"\n'
        f'options = {{ argv = ["serve", "--lora={folder}/y.gguf"] }}\n'
    )
    named = named_paths(load(toml))
    assert is_named(folder, [text for text in named if "x.gguf" in text])
    assert is_named(folder, [text for text in named if "y.gguf" in text])
    assert not is_named(tmp_path / "models" / "lor", named)
