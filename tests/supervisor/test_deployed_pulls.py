"""Deployed models that are fetched side by side by real pulls: each comes to its own end."""

from __future__ import annotations

import hashlib
import threading
from pathlib import Path
from typing import Any

import pytest
import trio

from protocol.faults import Fault
from supervisor.config import load
from supervisor.deployed import Deployed
from supervisor.link.remote import Refused, Serve, Unserve
from supervisor.pulls import Pulls
from supervisor.settings import ModelTable

CHAT = Path(__file__).parents[2] / "engines" / "llm" / "fixture" / "chat-q8_0.gguf"
BYTES = CHAT.read_bytes()
FILE = "chat-Q8_0.gguf"
PATIENCE_S = 300.0
PLENTY_GB = 1.0


class House:
    """A worker with a worker.toml, real pulls, and no engines."""

    def __init__(self, config: Path, nursery: trio.Nursery) -> None:
        self.config, self.pulls = config, Pulls(config, nursery)
        self.settings = load(config)
        self.deployed = Deployed(lambda: self.settings, self.pulls, self, self.reload)
        self.answers: dict[str, str] = {}

    async def reload(self) -> None:
        self.settings = load(self.config)

    async def take_on(self, table: ModelTable) -> Fault | None:
        return None

    async def let_go(self, model: str, reason: str, *, within_s: float) -> Fault | None:
        return None

    async def ask(self, order: Serve) -> None:
        try:
            self.answers[order.name] = await self.deployed.serve(order)
        except Refused as refused:
            self.answers[order.name] = str(refused)

    def on_disk(self) -> set[str]:
        folder = self.config.parent / "state" / "models"
        return {path.name for path in folder.iterdir() if path.name != ".store"} if folder.is_dir() else set()


@pytest.fixture
def hub(site: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    pytest.importorskip("huggingface_hub")
    monkeypatch.setenv("HF_ENDPOINT", site.url)
    for name in ("good", "wrong", "held"):
        site.repos[f"owner/{name}"] = {FILE: BYTES}
    site.hold = threading.Event()
    return site


def written(folder: Path, max_gb: float) -> Path:
    config = folder / "worker.toml"
    config.write_text(
        f'[worker]\nstate_dir = "state"\n[coordinator.deploy]\nsources = ["owner/*"]\nmax_gb = {max_gb:.9f}\n'
    )
    return config


def ordered(hub: Any, name: str, sha256: str = "") -> Serve:
    return Serve(name=f"{name}@0123456789", source=f"owner/{name}@{hub.commit}", sha256=sha256)


def hold(hub: Any, name: str, times: int = 1) -> None:
    """A part of it comes, and then nothing more for a minute."""
    hub.cut_after[f"/owner/{name}/resolve/{hub.commit}/{FILE}"] = [1000] * times


def begun(config: Path) -> bool:
    """Whether a part of a file is on the disk."""
    parts = (config.parent / "state" / "models").glob(".pulling-*/*.part")
    return any(part.stat().st_size for part in parts)


async def test_one_comes_while_another_hangs_and_a_third_has_other_bytes(tmp_path: Path, hub: Any) -> None:
    hold(hub, "held", 20)
    async with trio.open_nursery() as nursery:
        house = House(written(tmp_path, PLENTY_GB), nursery)
        good, held = ordered(hub, "good", hashlib.sha256(BYTES).hexdigest()), ordered(hub, "held")
        with trio.fail_after(PATIENCE_S):
            async with trio.open_nursery() as asking:
                asking.start_soon(house.ask, held)
                await trio.to_thread.run_sync(hub.holding.wait, PATIENCE_S)
                await house.ask(ordered(hub, "wrong", "a" * 64))
                await house.ask(good)
                assert house.answers[good.name] == f"{good.name} is served."
                assert "the hub lists" in house.answers["wrong@0123456789"]
                assert held.name not in house.answers
                assert [table.name for table in house.settings.models] == [good.name]
                await house.deployed.unserve(Unserve(name=held.name))
            assert house.answers[held.name] == f"{held.name} is wanted no more."
            assert house.pulls.running() == 0
            assert "wanted" not in await house.deployed.unserve(Unserve(name="wrong@0123456789"))
        assert house.on_disk() == {"good--0123456789"}, "nothing is left of the others"
        nursery.cancel_scope.cancel()


async def test_what_two_are_to_become_is_more_than_the_owner_gives(tmp_path: Path, hub: Any) -> None:
    """The second is refused when its size is known, not when the disk is full."""
    hold(hub, "held")
    async with trio.open_nursery() as nursery:
        house = House(written(tmp_path, 1.5 * len(BYTES) / 2**30), nursery)
        held, good = ordered(hub, "held"), ordered(hub, "good")
        with trio.fail_after(PATIENCE_S):
            async with trio.open_nursery() as asking:
                asking.start_soon(house.ask, held)
                await trio.to_thread.run_sync(hub.holding.wait, PATIENCE_S)
                await house.ask(good)
                assert good.name not in [table.name for table in house.settings.models]
                assert "max_gb" in house.answers[good.name]
                hub.hold.set()
            assert house.answers[held.name] == f"{held.name} is served."
        nursery.cancel_scope.cancel()


async def test_a_worker_that_is_killed_in_a_download_goes_on_with_it(tmp_path: Path, hub: Any) -> None:
    hold(hub, "held")
    config, held = written(tmp_path, PLENTY_GB), ordered(hub, "held")
    with trio.fail_after(PATIENCE_S):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(House(config, nursery).ask, held)
            await trio.to_thread.run_sync(hub.holding.wait, PATIENCE_S)
            while not begun(config):  # noqa: ASYNC110  what was sent is on the disk a moment later
                await trio.sleep(0.01)
            nursery.cancel_scope.cancel()
        hub.hold.set()
        async with trio.open_nursery() as nursery:
            house = House(config, nursery)
            await house.ask(held)
            nursery.cancel_scope.cancel()
    assert house.answers[held.name] == f"{held.name} is served."
    asked = [one["range"] for one in hub.asked if one["method"] == "GET" and "/resolve/" in one["path"]]
    assert asked[-1].startswith("bytes="), "the second life asked for the rest"
